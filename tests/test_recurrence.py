"""The layer on every backend against the float64 reference: outputs and all gradients, for every cell."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.cells import CELLS
from tests.helpers import (
    BACKENDS,
    DTYPES,
    ISAS,
    assert_as_accurate,
    instruction_set,
    make_layer,
    needs_kernels,
    threads,
)

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 5, 9, 100, 2),
    (7, 3, 10, 17, 2),
    (9, 33, 20, 33, 1),
    (19, 1, 40, 100, 1),
    (1, 1, 12300, 16, 1),  # few rows, many columns: weight gradients in tiles, the last of them past the edge
    (2, 1, 6150, 5, 1),
]  # T, B, I, H, D


def names(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def lengths_like(pattern: str, T: int, B: int) -> Tensor | None:
    spread = torch.linspace(1, T, B).round().long()
    return {
        "none": None,
        "sorted": spread.flip(0),
        "unsorted": spread[torch.randperm(B)],
        "zeros": torch.where(torch.arange(B) % 3 == 1, 0, spread),
        "all zero": torch.zeros(B, dtype=torch.long),
    }[pattern]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("T", "B", "I", "H", "D"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(cell: str, T: int, B: int, I: int, H: int, D: int, dtype: torch.dtype, isa: str) -> None:
    bias = H != 33 or dtype in (torch.bfloat16, torch.float16)
    layer = make_layer(cell, T, B, I, H, D=D, dtype=dtype, bias=bias, seed=T * H)
    assert_as_accurate(layer.run("cpu"), layer.run_reference(), layer.run_torch(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_as_accurate_as_torch(cell: str, dtype: torch.dtype) -> None:
    layer = make_layer(cell, 7, 3, 10, 17, D=2, dtype=dtype)
    assert_as_accurate(layer.run("eager"), layer.run_reference(), layer.run_torch(), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("pattern", ["none", "sorted", "unsorted", "zeros", "all zero"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell: str, D: int, pattern: str, resets: bool, dtype: torch.dtype) -> None:
    T, B = 9, 20 if pattern == "unsorted" else 7
    layer = make_layer(
        cell,
        T,
        B,
        11,
        18,
        D=D,
        dtype=dtype,
        lengths=lengths_like(pattern, T, B),
        resets=torch.rand(T, B) < 0.3 if resets else None,
        every_c=True,
    )
    expected, peer = layer.run_reference(), layer.run("eager")
    for name in ISAS:
        with instruction_set(name):
            assert_as_accurate(layer.run("cpu"), expected, peer, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
def test_rounding_of_every_value(dtype: torch.dtype, isa: str) -> None:
    """One product per unit, exact in float32: what is left is widening and rounding, which must be torch's."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)  # every value that there is, NaNs too
    factors = torch.linspace(1, 2, 21).to(dtype)  # a whole vector of units and a tail
    if isa == "avx512bf16" and dtype == torch.bfloat16:  # its products take subnormal numbers for zero
        tiny = torch.finfo(dtype).tiny
        x = torch.where(x.float().abs() < tiny, 0, x)
    for sign in (1, -1):  # relu gives the positive half
        w_ih, w_hh = (sign * factors)[:, None], torch.zeros(21, 21, dtype=dtype)
        layer = make_layer("rnn_relu", 1, len(x), 1, 21, dtype=dtype)
        layer.x, layer.h0 = x[None, :, None], torch.zeros(1, len(x), 21, dtype=dtype)
        layer.weights = (w_ih, w_hh, *[None] * 6)
        expected = (x.float()[:, None] * w_ih.float()[:, 0]).relu().to(dtype)
        torch.testing.assert_close(layer.infer()["y"][0], expected, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_infinite_input_saturates(cell: str, dtype: torch.dtype, isa: str) -> None:
    """An odd H: nothing of what lies past it may meet the infinity."""
    layer = make_layer(cell, 4, 3, 5, 21, dtype=dtype)
    layer.x[1, 1, 4] = torch.inf
    actual, expected = layer.infer(), layer.infer("eager")
    for name, value in actual.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0.02)


@needs_kernels
def test_very_many_steps() -> None:
    """More than 16 bits count."""
    T, B, I, H = 70_000, 2, 3, 5
    module, peer = rnnkern.nn.GRU(I, H), torch.nn.GRU(I, H)
    peer.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    with torch.no_grad():
        y, h_n = module(x)
        expected, _ = peer(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(h_n[0], y[-1])
        cut, h_cut = module(x, lengths=torch.tensor([T - 1, 66_000]))
    assert torch.equal(cut[: T - 1, 0], y[: T - 1, 0])
    assert torch.equal(cut[:66_000, 1], y[:66_000, 1])
    assert not cut[66_000:, 1].any()
    assert torch.equal(h_cut[0], torch.stack([y[T - 2, 0], y[66_000 - 1, 1]]))


@needs_kernels
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_gradients_of_very_many_steps(kind: str) -> None:
    """The same as over two calls, each of fewer steps; what is kept for them grows with T alone."""
    T, cut, H = 70_000, 40_000, 4
    module = getattr(rnnkern.nn, kind)(3, H)
    x = torch.randn(T, 1, 3, requires_grad=True)
    weights = torch.randn(T, 1, H)
    y, _ = module(x)
    first, state = module(x[:cut])
    second, _ = module(x[cut:], state)
    assert torch.equal(y, torch.cat([first, second]))
    found, expected = (
        torch.autograd.grad((out * weights).sum(), [x, *module.parameters()]) for out in (y, torch.cat([first, second]))
    )
    assert torch.equal(found[0], expected[0])
    assert found[0][:cut].any(-1).all()
    for gradient, value in zip(found, expected):
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_resets_equal_running_the_episodes(cell: str, D: int, backend: str) -> None:
    T, H, cuts = 10, 6, [0, 3, 4, 10]
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[[3, 4]] = True
    whole = make_layer(cell, T, 1, 5, H, D=D, dtype=torch.float64, resets=resets)
    result = whole.infer(backend)
    for episode, (begin, end) in enumerate(pairwise(cuts)):
        part = make_layer(cell, T, 1, 5, H, D=D, dtype=torch.float64)
        part.x = part.x[begin:end]
        keeps = [episode == 0, episode == 2][:D]  # which directions meet their initial state here
        keep = torch.tensor(keeps, dtype=torch.float64)[:, None, None]
        part.h0 = part.h0 * keep
        part.c0 = None if part.c0 is None else part.c0 * keep
        expected = part.infer(backend)
        torch.testing.assert_close(result["y"][begin:end], expected["y"], rtol=0, atol=1e-14)
        if episode == 2:
            torch.testing.assert_close(result["h_n"][0], expected["h_n"][0], rtol=0, atol=1e-14)
        if episode == 0 and D == 2:
            torch.testing.assert_close(result["h_n"][1], expected["h_n"][1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_reset_at_the_first_step_replaces_the_initial_state_forward_only(cell: str, backend: str) -> None:
    resets = torch.tensor([[True], [False], [False]])
    layer = make_layer(cell, 3, 1, 2, 4, D=2, dtype=torch.float64, resets=resets, every_c=True)
    gradients = layer.run(backend)
    assert not gradients["dh0"][0].any()
    assert gradients["dh0"][1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_length_zero_keep_their_state(cell: str, backend: str) -> None:
    layer = make_layer(cell, 4, 3, 2, 5, D=2, lengths=torch.tensor([0, 4, 0]), every_c=True)
    result = layer.run(backend)
    assert torch.equal(result["h_n"][:, ::2], layer.h0[:, ::2])
    assert not result["y"][:, ::2].any()
    assert not result["dx"][:, ::2].any()
    assert torch.equal(result["dh0"][:, ::2], layer.cotangents[1][:, ::2])
    if layer.c0 is not None:
        assert torch.equal(result["c_n"][:, ::2], layer.c0[:, ::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_padding_may_hold_anything(cell: str, backend: str) -> None:
    layer = make_layer(cell, 6, 3, 4, 5, D=2, lengths=torch.tensor([2, 6, 0]))
    clean = layer.run(backend)
    for b, length in enumerate(layer.lengths.tolist()):
        layer.x[length:, b] = float("nan")
    for name, value in layer.run(backend).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_spreads_within_its_row_only(cell: str, backend: str) -> None:
    layer = make_layer(cell, 6, 3, 4, 5)
    clean = layer.infer(backend)["y"]
    layer.x[2, 1, 0] = float("nan")
    y = layer.infer(backend)["y"]
    assert y[2:, 1].isnan().all()
    assert torch.equal(y[:2], clean[:2])
    assert torch.equal(y[:, ::2], clean[:, ::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str, backend: str) -> None:
    layer = make_layer(cell, 4, 0, 3, 5, D=2)
    result = layer.run(backend)
    assert result["y"].shape == (4, 0, 10)
    assert result["dx"].shape == (4, 0, 3)
    assert not result["dw_ih"].any()
    assert not result["db_hh_reverse"].any()


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell: str) -> None:
    layer = make_layer(cell, 5, 4, 6, 7, D=2, every_c=True)
    expected = layer.run("cpu")
    layer.x = layer.x.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # features far apart
    layer.h0 = layer.h0.transpose(0, 2).contiguous().transpose(0, 2)
    layer.weights = tuple(w.t().contiguous().t() if w is not None and w.dim() == 2 else w for w in layer.weights)
    layer.cotangents = tuple(g.transpose(0, 1).contiguous().transpose(0, 1) for g in layer.cotangents)
    for name, value in layer.run("cpu").items():
        assert torch.equal(value, expected[name]), name


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_a_batch_first_view_is_read_in_place(cell: str) -> None:
    layer = make_layer(cell, 5, 4, 6, 7)
    expected = layer.run("cpu")
    layer.x = layer.x.transpose(0, 1).contiguous().transpose(0, 1)
    for name, value in layer.run("cpu").items():
        assert torch.equal(value, expected[name]), name


@needs_kernels
@pytest.mark.parametrize(("cell", "D"), [("gru", 1), ("lstm", 2)])
def test_opcheck(cell: str, D: int) -> None:
    # H fills its last block and no row ends early, so that `saved` holds no undefined value to compare.
    layer = make_layer(cell, 3, 2, 2, 16, D=D, resets=torch.tensor([[0, 0], [1, 0], [0, 1]]).bool())
    plain = (layer.x, layer.h0, layer.c0, *layer.weights, None, layer.resets)
    wanted = tuple(t if t is None or t.dtype == torch.bool else t.detach().requires_grad_() for t in plain)
    ops = torch.ops.rnnkern
    torch.library.opcheck(ops.layer.default, (cell, *wanted, True))
    torch.library.opcheck(
        ops.layer_inference.default, (cell, *(None if t is None else t.detach() for t in plain), True, None)
    )
    y, _, _, _, saved = ops.layer(cell, *(None if t is None else t.detach() for t in plain), True)
    torch.library.opcheck(
        ops.layer_backward.default, (cell, layer.cotangents[0], None, None, None, *wanted, y, saved, True, True, True)
    )


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_compiled_without_a_graph_break(cell: str) -> None:
    layer = make_layer(cell, 5, 3, 4, 6, D=2, lengths=torch.tensor([5, 0, 2]))
    inputs = {name: tensor.requires_grad_() for name, tensor in layer.inputs.items()}
    run = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    with threads(1):
        expected, actual = layer.forward(inputs), run(inputs)
        for a, b in zip(actual, expected):
            assert torch.equal(a, b)
        pairs = [torch.autograd.grad(out[0].sum(), list(inputs.values())) for out in (actual, expected)]
        for name, a, b in zip(inputs, *pairs):
            assert torch.equal(a, b), name
