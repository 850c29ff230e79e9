"""The CUDA engines, emulated: outputs and all gradients against float64, for every cell, dtype and engine."""

import dataclasses

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops._dispatch import ENGINES
from tests.helpers import DTYPES, assert_as_accurate, assert_same_bits, make_layer, needs_emulator
from tests.test_recurrence import lengths_like, names

pytestmark = [needs_emulator, pytest.mark.usefixtures("no_tf32")]
EMULATED = "cuda-emulated"


def engines_of(dtype: torch.dtype) -> tuple[str, ...]:
    return ("stepwise",) if dtype == torch.float64 else ENGINES


CASES = [(engine, dtype) for dtype in DTYPES for engine in engines_of(dtype)]
every_engine = pytest.mark.parametrize(("engine", "dtype"), CASES, ids=names)


@every_engine
@pytest.mark.parametrize(
    ("T", "B", "I", "H", "D"), [(1, 1, 1, 1, 1), (7, 3, 10, 17, 2), (3, 9, 20, 40, 1), (2, 17, 5, 100, 1)]
)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(
    cell: str, T: int, B: int, I: int, H: int, D: int, engine: str, dtype: torch.dtype
) -> None:
    layer = make_layer(cell, T, B, I, H, D=D, dtype=dtype, bias=H != 40 or compute_dtype(dtype) != dtype, seed=T * H)
    assert_as_accurate(layer.run(EMULATED, engine=engine), layer.run_reference(), layer.run_torch(), dtype)


@every_engine
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("pattern", ["none", "unsorted", "zeros", "all zero"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell: str, pattern: str, resets: bool, engine: str, dtype: torch.dtype) -> None:
    T, B = 5, 7
    layer = make_layer(
        cell,
        T,
        B,
        11,
        18,
        D=2,
        dtype=dtype,
        lengths=lengths_like(pattern, T, B),
        resets=torch.rand(T, B) < 0.3 if resets else None,
        every_c=True,
        grad_clip=0.1 if resets else 0.0,
    )
    layer.x = layer.x.masked_fill(past_the_end(layer.lengths, T, B)[:, :, None], torch.nan)
    assert_as_accurate(layer.run(EMULATED, engine=engine), layer.run_reference(), layer.run("eager"), dtype)


def past_the_end(lengths: Tensor | None, T: int, B: int) -> Tensor:
    return torch.zeros(T, B, dtype=torch.bool) if lengths is None else torch.arange(T)[:, None] >= lengths


@every_engine
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_packed_rows_give_the_padded_bits(cell: str, engine: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([5, 3, 3, 1, 0])
    padded = make_layer(cell, 5, 5, 6, 18, D=2, dtype=dtype, lengths=lengths, every_c=True)
    present = ~past_the_end(lengths, 5, 5)
    dy, dh_n, dc_n, dc_all = padded.cotangents
    packed = dataclasses.replace(padded, x=padded.x[present], cotangents=(dy[present], dh_n, dc_n, dc_all[present]))
    expected = padded.infer(EMULATED, engine=engine)
    for name in {"y", "c_all"} & set(expected):
        expected[name] = expected[name][present]
    assert_same_bits(packed.infer(EMULATED, engine=engine), expected)
    assert_as_accurate(packed.run(EMULATED, engine=engine), packed.run_reference(), packed.run("eager"), dtype)


@every_engine
@pytest.mark.parametrize("cell", CELLS)
def test_runs_repeat_bit_by_bit(cell: str, engine: str, dtype: torch.dtype) -> None:
    """Whatever the order in which warps advance: the emulator draws another for each launch."""
    layer = make_layer(cell, 3, 9, 4, 40, D=2, dtype=dtype)
    first = layer.run(EMULATED, engine=engine)
    assert_same_bits(layer.run(EMULATED, engine=engine), first)
    outputs = layer.infer(EMULATED, engine=engine)
    assert_same_bits(outputs, {name: first[name] for name in outputs})


def test_gradients_of_any_order() -> None:
    gru, x = rnnkern.nn.GRU(2, 3).double(), torch.randn(3, 2, 2, dtype=torch.double, requires_grad=True)
    with rnnkern.backend(EMULATED):
        assert torch.autograd.gradcheck(lambda x: gru(x)[0], x)
        assert torch.autograd.gradgradcheck(lambda x: gru(x)[0].sin(), x)


@pytest.mark.parametrize(("T", "B", "I"), [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do(cell: str, T: int, B: int, I: int) -> None:
    layer = make_layer(cell, T, B, I, 6, D=2)
    assert_as_accurate(layer.run(EMULATED), layer.run_reference(), layer.run("eager"), torch.float32)


@pytest.mark.parametrize("name", ["cuda_layer", "cuda_layer_inference", "cuda_layer_backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell: str, name: str) -> None:
    layer = make_layer(cell, 3, 2, 4, 5, D=2)
    inputs = (cell, layer.x, layer.h0, layer.c0, *layer.weights)
    how = "", False
    if name == "cuda_layer_inference":
        arguments: tuple[object, ...] = (*inputs, None, None, True, *how)
    elif name == "cuda_layer":
        leaves = (t.requires_grad_() if isinstance(t, Tensor) else t for t in inputs)
        arguments = (*leaves, None, None, True, 0.0, *how)
    else:
        y, *_, saved = torch.ops.rnnkern.cuda_layer(*inputs, None, None, True, 0.0, *how)
        dy, dh_n, dc_n, dc_all = layer.cotangents
        states = (dc_n, dc_all) if cell == "lstm" else (None, None)
        arguments = (cell, dy, dh_n, *states, *inputs[1:], None, None, y, saved, True, True, True, 0.0, *how)
    torch.library.opcheck(getattr(torch.ops.rnnkern, name).default, arguments)


def test_modules_run_on_it() -> None:
    lstm = rnnkern.nn.LSTM(3, 5, num_layers=2, bidirectional=True)
    sequences = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (2, 4, 1)], enforce_sorted=False)
    with rnnkern.backend("eager"):
        expected, _ = lstm(sequences)
    with rnnkern.backend(EMULATED):
        actual, _ = lstm(sequences)
        told = rnnkern.explain(lstm, sequences)
    torch.testing.assert_close(actual.data, expected.data)
    assert {note.backend for note in told.layers} == {EMULATED}


def test_the_longest_row_decides_the_engine() -> None:
    gru, x = rnnkern.nn.GRU(5, 32, dtype=torch.bfloat16), torch.zeros(50, 2, 5, dtype=torch.bfloat16)
    for lengths, persistent in (([50, 1], True), ([1, 1], False)):
        with rnnkern.backend(EMULATED), torch.no_grad():
            (note,) = rnnkern.explain(gru, x, lengths=torch.tensor(lengths)).layers
        assert (note.engine == "stepwise") != persistent
    lengths, rows = torch.tensor([40] + [0] * 39), torch.zeros(40, 5, dtype=torch.bfloat16)  # packed: one a row in mean
    h0 = torch.zeros(1, 40, 32, dtype=torch.bfloat16)
    assert torch.ops.rnnkern.cuda_plan("gru", rows, h0, lengths, "", False, False) != "stepwise"


def test_explain_tells_the_engine() -> None:
    gru, x = rnnkern.nn.GRU(3, 40, dtype=torch.bfloat16), torch.zeros(2, 3, 3, dtype=torch.bfloat16)
    for engine in ENGINES:
        with rnnkern.backend(EMULATED, engine=engine):
            (note,) = rnnkern.explain(gru, x).layers
        assert note.engine.startswith(engine)
        assert str(note).endswith(note.engine)
        assert (engine == "stepwise") == ("bytes of shared memory" not in note.engine)
        assert f"; backward: {engine}" in note.engine
    cell = rnnkern.nn.GRUCell(3, 40)
    with rnnkern.backend(EMULATED), torch.no_grad():
        assert rnnkern.explain(cell, torch.zeros(2, 3)).layers[0].engine == "one launch"


def test_lengths_come_with_the_launch() -> None:
    """More rows than one launch carries."""
    layer = make_layer("rnn_tanh", 3, 1000, 2, 3, lengths=torch.randint(0, 4, (1000,)))
    expected, actual = layer.infer("eager"), layer.infer(EMULATED, engine="stepwise")
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(
    ("H", "dtype", "why"),
    [
        (40, torch.float64, "float64 is for the stepwise engine"),
        (3000, torch.bfloat16, "no room for 4 gates of H = 3000"),
    ],
    ids=["float64", "large"],
)
@pytest.mark.parametrize("engine", ["cluster", "grid"])
def test_an_engine_that_cannot_run_says_why(engine: str, H: int, dtype: torch.dtype, why: str) -> None:
    lstm, x = rnnkern.nn.LSTM(3, H, dtype=dtype), torch.zeros(2, 1, 3, dtype=dtype)
    with (
        torch.no_grad(),
        rnnkern.backend(EMULATED, engine=engine),
        pytest.raises(rnnkern.BackendUnavailable, match=why),
    ):
        lstm(x)


@pytest.mark.parametrize("engine", ["cluster", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_infinities_are_those_of_float32(cell: str, engine: str) -> None:
    """Three TF32 products of an infinite value have an inf - inf that the product of float32 has not."""
    layer = make_layer(cell, 3, 9, 5, 20, seed=1)
    clean = layer.infer(EMULATED, engine=engine)
    x, h0 = layer.x.clone(), layer.h0.clone()
    h0[0, 1, 3] = torch.inf
    h0[0, 2, [4, 7]] = torch.tensor([torch.inf, -torch.inf])
    h0[0, 3, 5] = torch.nan
    h0[0, 4, 6] = torch.finfo(torch.float32).max  # which TF32 rounds to infinity
    x[1, 5, 2] = -torch.inf
    x[0, 6, 0] = 3e38  # of which sums overflow
    layer = dataclasses.replace(layer, x=x, h0=h0)
    found, expected = layer.infer(EMULATED, engine=engine), layer.infer("eager")
    for name, values in clean.items():
        ours, theirs = found[name], expected[name]
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert torch.equal(ours.isinf(), theirs.isinf()), name
        infinite = theirs.isinf()
        assert torch.equal(ours[infinite].sign(), theirs[infinite].sign()), name
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=2e-3, atol=1e-5)
        untouched = [0, 7, 8]
        assert_same_bits({name: ours[..., untouched, :]}, {name: values[..., untouched, :]})


def test_sizes_that_kernels_cannot_count() -> None:
    weights = torch.ones(4, 1), torch.ones(4, 1), *[None] * 6
    with pytest.raises(RuntimeError, match="more steps, rows or hidden units than"), rnnkern.backend(EMULATED):
        torch.ops.rnnkern.cuda_layer_inference(
            "lstm",
            torch.ones(2**31, 0, 1),
            torch.ones(1, 0, 1),
            torch.ones(1, 0, 1),
            *weights,
            None,
            None,
            False,
            "",
            False,
        )
