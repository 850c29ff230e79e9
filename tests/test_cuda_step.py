"""Decoding steps in one launch, emulated: against float64, and where they run and where not."""

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.cells import CELLS
from rnnkern.ops import cuda
from rnnkern.ops.attention import attend
from rnnkern.ops.cuda import FUSED_DTYPES
from rnnkern.ops.step import attention_step, step
from tests.helpers import Layer, assert_as_accurate, assert_same_bits, make_layer, needs_emulator

pytestmark = needs_emulator
EMULATED = "cuda-emulated"


def one_step(layer: Layer, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The new states by `step`; in another dtype, of the same values converted."""
    inputs = {name: t if dtype is None else t.to(dtype) for name, t in layer.inputs.items()}
    weights = tuple(
        None if w is None else inputs[name]
        for name, w in zip(("w_ih", "w_hh", "b_ih", "b_hh"), layer.weights[:4], strict=True)
    )
    c = inputs["c0"][0] if "c0" in inputs else None
    with torch.no_grad(), rnnkern.backend(backend):
        h, c = step(layer.cell, inputs["x"][0], inputs["h0"][0], c, (*weights, None, None, None, None))
    return {"h": h} if c is None else {"h": h, "c": c}


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (3, 10, 17), (9, 32, 40), (32, 5, 8), (2, 0, 3), (0, 4, 5)])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell(cell: str, B: int, I: int, H: int, dtype: torch.dtype) -> None:
    layer = make_layer(cell, 1, B, I, H, dtype=dtype, bias=H != 40 or dtype != torch.float32)
    assert told(lambda: one_step(layer, EMULATED)) == ["rnnkern::cuda_cell_step"]
    expected = one_step(layer, "eager", torch.float64)
    assert_as_accurate(one_step(layer, EMULATED), expected, one_step(layer, "eager"), dtype)
    assert_same_bits(one_step(layer, EMULATED), one_step(layer, EMULATED))


class _Names(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "rnnkern":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def told(run) -> list[str]:  # type: ignore[no-untyped-def]
    """The operators of ours that `run` calls."""
    with _Names() as mode:
        run()
    return mode.names


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_step_by_it_and_learn_by_the_layer(kind: str) -> None:
    cell = getattr(rnnkern.nn, kind)(6, 9)
    x = torch.randn(2, 6)
    state = tuple(torch.randn(2, 9) for _ in range(2))
    hx = state if kind == "LSTMCell" else state[0]
    with rnnkern.backend("eager"):
        expected = cell(x, hx)
    with rnnkern.backend(EMULATED), torch.no_grad():
        kept = state[0].clone()
        assert told(lambda: cell(x, hx)) == ["rnnkern::cuda_cell_step"]
        torch.testing.assert_close(cell.step(x, hx), expected)
        assert torch.equal(state[0], kept)
        written = cell.step(x, tuple(s.clone() for s in state) if kind == "LSTMCell" else kept, inplace=True)
        torch.testing.assert_close(written, expected)
        rows = torch.randn(cuda.FUSED_ROWS + 1, 6)
        assert told(lambda: cell(rows)) == ["rnnkern::cuda_layer_inference"]
        assert told(lambda: cell.double()(x.double())) == ["rnnkern::cuda_layer_inference"]
        cell.float()
        assert rnnkern.explain(cell, x).layers[0].backend == EMULATED
    with rnnkern.backend(EMULATED):
        assert told(lambda: cell(x, hx)) == ["rnnkern::cuda_layer"]
    with rnnkern.backend(EMULATED, engine="stepwise"), torch.no_grad():
        assert told(lambda: cell(x, hx))[-1] == "rnnkern::cuda_layer_inference"


SCORES = ["dot", "projected dot", "additive", "projected additive"]


def attended(
    layer: Layer, score: str, Tk: int, Dv: int, lengths: Tensor | None, backend: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The new states and the context; in another dtype, of the same values converted."""
    torch.manual_seed(3)
    _, B, H = layer.h0.shape
    D = 11 if "projected" in score else H
    extra = {"key": torch.randn(Tk, B, D), "value": torch.randn(Tk, B, Dv), "w_query": torch.randn(D, H) / H**0.5}
    extra["vector"] = torch.randn(D)
    if lengths is not None:
        past = torch.arange(Tk)[:, None] >= lengths
        extra["key"][past] = extra["value"][past] = torch.nan
    device = layer.x.device
    values = {n: t.to(device, layer.x.dtype).to(dtype or layer.x.dtype) for n, t in (layer.inputs | extra).items()}
    with torch.no_grad(), rnnkern.backend(backend):
        h, c, context = attention_step(
            layer.cell,
            values["x"][0],
            values["h0"][0],
            layer.c0[0].to(dtype or layer.c0.dtype) if layer.c0 is not None else None,
            tuple(values.get(n) for n in ("w_ih", "w_hh", "b_ih", "b_hh")) + (None,) * 4,
            values["key"].transpose(0, 1),
            values["value"].transpose(0, 1),
            w_query=values["w_query"] if "projected" in score else None,
            vector=values["vector"] if "additive" in score else None,
            scale=0.5,
            lengths=None if lengths is None else lengths.to(device),
        )
    return {"h": h, "context": context} | ({} if c is None else {"c": c})


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("B", "Tk", "lengths"), [(1, 40, None), (4, 70, [70, 0, 33, 1]), (2, 0, None)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_cell_and_attention(
    cell: str, B: int, Tk: int, lengths: list[int] | None, score: str, dtype: torch.dtype
) -> None:
    layer = make_layer(cell, 1, B, 6, 16, dtype=dtype)
    valid = None if lengths is None else torch.tensor(lengths)
    sizes = layer, score, Tk, 24, valid
    assert told(lambda: attended(*sizes, EMULATED)) == ["rnnkern::cuda_attention_step"]
    actual = attended(*sizes, EMULATED)
    expected = attended(*sizes, "eager", torch.float64)
    assert_as_accurate(actual, expected, attended(*sizes, "eager"), dtype)
    assert_same_bits(actual, attended(*sizes, EMULATED))


def test_the_workspace_may_be_kept_and_is_left_clean() -> None:
    layer = make_layer("gru", 1, 3, 4, 5)
    key = torch.randn(3, 50, 5)
    workspace = cuda.step_workspace(key, key)
    workspace.scratch.fill_(torch.nan)
    inputs = "gru", layer.x[0], layer.h0[0], None, layer.weights[:4] + (None,) * 4, key, key
    with torch.no_grad(), rnnkern.backend(EMULATED):
        first = attention_step(*inputs, workspace=workspace)
        assert not workspace.counters.any()
        again = attention_step(*inputs, workspace=workspace)
        notes = rnnkern.explain(attention_step, *inputs).layers
    assert torch.equal(first[2], again[2])
    assert [note.backend for note in notes] == [EMULATED, EMULATED]
    assert str(notes[1]).startswith("dot attention B=3 Tq=1 Tk=50 D=5 Dv=5")


def test_gradients_take_the_layer_and_attention() -> None:
    layer = make_layer("gru", 1, 2, 4, 5)
    key = torch.randn(2, 7, 5, requires_grad=True)
    with rnnkern.backend(EMULATED):
        h, _, context = attention_step(
            "gru", layer.x[0], layer.h0[0], None, layer.weights[:4] + (None,) * 4, key, key.detach()
        )
    context.sum().backward()
    assert key.grad is not None
    expected, _ = attend(h[:, None], key, key.detach(), score="dot")
    torch.testing.assert_close(context, expected[:, 0])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell: str) -> None:
    layer = make_layer(cell, 1, 2, 4, 5)
    c = None if layer.c0 is None else layer.c0[0]
    inputs = cell, layer.x[0], layer.h0[0], c, *layer.weights[:4]
    torch.library.opcheck(torch.ops.rnnkern.cuda_cell_step.default, inputs)
    key, value = torch.randn(2, 9, 5), torch.randn(2, 9, 3)
    attention = None, key, value, torch.randn(5), torch.tensor([9, 4]), 1.0, *cuda.step_workspace(key, value)
    torch.library.opcheck(torch.ops.rnnkern.cuda_attention_step.default, (*inputs, *attention))


def test_what_does_not_fit_is_refused() -> None:
    layer = make_layer("gru", 1, 2, 4, 5)
    x, h, weights = layer.x[0], layer.h0[0], layer.weights[:4]
    run, key = torch.ops.rnnkern.cuda_cell_step, torch.randn(2, 9, 5)
    with pytest.raises(RuntimeError, match="h does not fit"):
        run("gru", x, h[:1], None, *weights)
    with pytest.raises(RuntimeError, match="w_hh does not fit"):
        run("gru", x, h, None, weights[0], weights[1][1:], *weights[2:])
    with pytest.raises(RuntimeError, match="c is given for cells of two states"):
        run("gru", x, h, h, *weights)
    with pytest.raises(RuntimeError, match="float64 has no fused step"):
        run("gru", x.double(), h.double(), None, *(w.double() for w in weights))
    run, workspace = torch.ops.rnnkern.cuda_attention_step, cuda.step_workspace(key, key)
    counters, scratch = workspace
    with pytest.raises(RuntimeError, match="without w_query keys must be as large as h"):
        run("gru", x, h, None, *weights, None, key[..., 1:], key, None, None, 1.0, *workspace)
    with pytest.raises(RuntimeError, match=r"counters must be int32 \[5\]"):
        run("gru", x, h, None, *weights, None, key, key, None, None, 1.0, counters[1:], scratch)
    with pytest.raises(RuntimeError, match=r"scratch must be float32 \[24\] or more"):
        run("gru", x, h, None, *weights, None, key, key, None, None, 1.0, counters, scratch[1:])
    with pytest.raises(RuntimeError, match="lengths does not fit"):
        run("gru", x, h, None, *weights, None, key, key, None, torch.tensor([1]), 1.0, *workspace)


def test_compiled() -> None:
    cell, x = rnnkern.nn.GRUCell(4, 5), torch.randn(2, 4)
    with rnnkern.backend(EMULATED), torch.no_grad():
        expected = cell(x)
        compiled = torch.compile(lambda x: cell(x), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)


def test_sizes_that_the_kernels_cannot_count() -> None:
    weights = torch.ones(1, 1), torch.ones(1, 1), None, None
    with pytest.raises(RuntimeError, match="one of B, I, G"):
        torch.ops.rnnkern.cuda_cell_step("rnn_tanh", torch.ones(2**29, 0), torch.ones(1, 1), None, *weights)
    B, D = 4, 2**27
    key, value = torch.ones(B, 0, D), torch.ones(B, 0, 1)
    counters, scratch = torch.zeros(3 + B, dtype=torch.int32), torch.empty(0)
    attention = torch.ones(1, 1), key, value, None, None, 1.0, counters, scratch
    with pytest.raises(RuntimeError, match="one of D, Dv and B"):
        torch.ops.rnnkern.cuda_attention_step(
            "rnn_tanh", torch.ones(B, 1), torch.ones(B, 1), None, *weights, *attention
        )
