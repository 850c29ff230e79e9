"""Triton's engines, interpreted: outputs and all gradients against float64, for every cell, dtype and engine."""

import dataclasses

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import triton as kernels
from rnnkern.cells import CELLS
from rnnkern.ops._dispatch import TRITON_ENGINES
from rnnkern.triton import config
from rnnkern.triton.config import Facts
from tests.helpers import Layer, assert_as_accurate, make_layer
from tests.test_recurrence import lengths_like, names

_why = kernels.missing_on("cpu")
pytestmark = [pytest.mark.skipif(bool(_why), reason=_why), pytest.mark.usefixtures("torch_poison", "no_tf32")]

CASES = [(engine, dtype) for engine in TRITON_ENGINES for dtype in (torch.float32, torch.float16, torch.bfloat16)]
CASES += [("stepwise", torch.float64)]
every_engine = pytest.mark.parametrize(("engine", "dtype"), CASES, ids=names)


@every_engine
@pytest.mark.parametrize(("T", "B", "I", "H", "D"), [(1, 1, 1, 1, 1), (3, 3, 10, 17, 2), (2, 17, 5, 40, 1)])
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(
    cell: str, T: int, B: int, I: int, H: int, D: int, engine: str, dtype: torch.dtype
) -> None:
    layer = make_layer(cell, T, B, I, H, D=D, dtype=dtype, bias=H != 40, seed=T * H)
    assert_as_accurate(layer.run("triton", engine=engine), layer.run_reference(), layer.run_torch(), dtype)


def odd_layer(cell: str, dtype: torch.dtype) -> Layer:
    """Rows that end, begin again, or have no step; padding of NaN; every c; gradients limited."""
    T, B = 4, 7
    lengths = lengths_like("zeros", T, B)
    layer = make_layer(
        cell,
        T,
        B,
        5,
        18,
        D=2,
        dtype=dtype,
        lengths=lengths,
        resets=torch.rand(T, B) < 0.3,
        every_c=True,
        grad_clip=0.1,
    )
    layer.x = layer.x.masked_fill((torch.arange(T)[:, None] >= lengths)[:, :, None], torch.nan)
    return layer


@every_engine
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell: str, engine: str, dtype: torch.dtype) -> None:
    layer = odd_layer(cell, dtype)
    assert_as_accurate(layer.run("triton", engine=engine), layer.run_reference(), layer.run("eager"), dtype)


@pytest.mark.parametrize("engine", ["stepwise", "grid"])
def test_units_of_several_tiles_and_chunks(engine: str) -> None:
    layer = make_layer("rnn_tanh", 3, 2, 4, 270)  # in the grid three chunks of 8 slices of 16, both passes
    actual = layer.run("triton", engine=engine)
    assert_as_accurate(actual, layer.run_reference(), layer.run_torch(), torch.float32)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_programs_of_32_rows(cell: str) -> None:
    layer = make_layer(cell, 2, 35, 4, 40, lengths=torch.arange(35) % 3, dtype=torch.float16)
    with config.pretending(Facts("interpreter", 1, 232448)):
        facts = config.facts_of(layer.x.device)
        assert config.plan(cell, torch.float16, 40, 35, 1, "resident", False, facts).rows == 32
        actual = layer.run("triton", engine="resident")
    assert_as_accurate(actual, layer.run_reference(), layer.run("eager"), torch.float16)


@pytest.mark.parametrize("ends", [False, True], ids=["", "lengths and resets"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_launch_of_all_steps(cell: str, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid's cooperative launch: a program that holds all units waits for itself alone, as the interpreter can."""
    monkeypatch.setattr(Facts, "cooperative", True)
    T, B, H = 5, 20, 13
    given = {"lengths": torch.arange(B) % (T + 1), "resets": torch.rand(T, B) < 0.4} if ends else {}
    layer = make_layer(cell, T, B, 3, H, D=2, every_c=True, **given)
    facts = config.facts_of(layer.x.device)
    assert config.plan(cell, torch.float32, H, B, 2, "grid", False, facts).cooperative
    actual = layer.run("triton", engine="grid")
    assert_as_accurate(actual, layer.run_reference(), layer.run("eager"), torch.float32)


@pytest.mark.parametrize("engine", TRITON_ENGINES)
def test_packed_rows(engine: str) -> None:
    lengths = torch.tensor([4, 3, 3, 1, 0])
    padded = make_layer("lstm", 4, 5, 6, 18, D=2, lengths=lengths, every_c=True)
    present = torch.arange(4)[:, None] < lengths
    dy, dh_n, dc_n, dc_all = padded.cotangents
    packed = dataclasses.replace(padded, x=padded.x[present], cotangents=(dy[present], dh_n, dc_n, dc_all[present]))
    actual = packed.run("triton", engine=engine)
    assert_as_accurate(actual, packed.run_reference(), packed.run("eager"), torch.float32)


def test_gradients_of_any_order() -> None:
    gru, x = rnnkern.nn.GRU(2, 3).double(), torch.randn(2, 1, 2, dtype=torch.double, requires_grad=True)
    found = []
    for backend in ("eager", "triton"):
        with rnnkern.backend(backend):
            (first,) = torch.autograd.grad(gru(x)[0].sin().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
            found.append((first, second, *torch.autograd.grad(second.square().sum(), x)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("T", "B", "I"), [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("engine", TRITON_ENGINES)
def test_nothing_to_do(engine: str, cell: str, T: int, B: int, I: int) -> None:
    layer = make_layer(cell, T, B, I, 6, D=2)
    assert_as_accurate(layer.run("triton", engine=engine), layer.run_reference(), layer.run("eager"), torch.float32)


@pytest.mark.parametrize("name", ["triton_layer", "triton_layer_inference", "triton_layer_backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell: str, name: str) -> None:
    layer = make_layer(cell, 2, 2, 4, 5, D=2)
    inputs = (cell, layer.x, layer.h0, layer.c0, *layer.weights)
    how = "resident", False
    if name == "triton_layer_inference":
        arguments: tuple[object, ...] = (*inputs, None, None, True, *how)
    elif name == "triton_layer":
        leaves = (t.requires_grad_() if isinstance(t, Tensor) else t for t in inputs)
        arguments = (*leaves, None, None, True, 0.0, *how)
    else:
        y, *_, saved = torch.ops.rnnkern.triton_layer(*inputs, None, None, True, 0.0, *how)
        dy, dh_n, dc_n, dc_all = layer.cotangents
        states = (dc_n, dc_all) if cell == "lstm" else (None, None)
        arguments = (cell, dy, dh_n, *states, *inputs[1:], None, None, y, saved, True, True, True, 0.0, *how)
    torch.library.opcheck(getattr(torch.ops.rnnkern, name).default, arguments)
