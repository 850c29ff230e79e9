"""Rows as a PackedSequence has them, [N, *]: the padded run's bits, gradients of any order, what is refused."""

import dataclasses

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.cells import CELLS
from tests.helpers import (
    DTYPES,
    ISAS,
    Layer,
    assert_as_accurate,
    assert_same_bits,
    instruction_set,
    make_layer,
    needs_kernels,
    threads,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("poison")]
PADDED = ("y", "c_all", "dx")  # what has a row for each step


def pack(tensor: Tensor, lengths: Tensor) -> Tensor:
    present = torch.arange(len(tensor))[:, None] < lengths
    return tensor[present]


def padded_and_packed(cell: str, lengths: list[int], **options: object) -> tuple[Layer, Layer]:
    steps = torch.tensor(lengths)
    padded = make_layer(cell, max(lengths), len(lengths), 11, 18, lengths=steps, every_c=True, **options)  # type: ignore[arg-type]
    dy, dh_n, dc_n, dc_all = padded.cotangents
    packed = dataclasses.replace(
        padded, x=pack(padded.x, steps), cotangents=(pack(dy, steps), dh_n, dc_n, pack(dc_all, steps))
    )
    return padded, packed


@pytest.mark.parametrize("lengths", [[9, 9, 5, 5, 1], [3], [6, 2, 0, 0], [300, *[40] * 40]], ids=str)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_as_padded(cell: str, D: int, lengths: list[int]) -> None:
    padded, packed = padded_and_packed(cell, lengths, D=D)
    for isa in ISAS:
        with instruction_set(isa):
            expected = padded.run("cpu")
            for name in PADDED:
                if name in expected:
                    expected[name] = pack(expected[name], torch.tensor(lengths))
            for count in (1, 2, 3):
                with threads(count):
                    assert_same_bits(packed.run("cpu"), expected)
                    assert_same_bits(packed.infer(), {name: expected[name] for name in packed.infer()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_reference(cell: str, dtype: torch.dtype) -> None:
    _, packed = padded_and_packed(cell, [7, 6, 6, 2], D=2, dtype=dtype)
    assert_as_accurate(packed.run("cpu"), packed.run_reference(), packed.run("eager"), dtype)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_derivatives_of_second_order(cell: str) -> None:
    _, packed = padded_and_packed(cell, [3, 3, 1], dtype=torch.float64)
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in packed.inputs.items()}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = packed.forward(dict(zip(inputs, tensors)))
        return outputs if len(CELLS[cell].states) == 2 else outputs[:2]

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()), fast_mode=True)


def test_operators_follow_their_fake_kernels() -> None:
    _, layer = padded_and_packed("lstm", [3, 2])
    plain = (layer.x, layer.h0, layer.c0, *layer.weights, layer.lengths, None)
    # `saved` holds undefined values past the last unit: not for comparison.
    torch.library.opcheck(torch.ops.rnnkern.layer_inference.default, ("lstm", *plain, True, None))
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        converted = [None if t is None else fake.from_tensor(t) for t in plain]
        shapes = [out.shape for out in torch.ops.rnnkern.layer("lstm", *converted, True)]
    assert shapes == [out.shape for out in torch.ops.rnnkern.layer("lstm", *plain, True)]


@pytest.mark.parametrize(
    ("lengths", "resets", "message"),
    [
        ([3, 1, 2], None, "longest first"),
        ([3, 1, 1], None, "add up"),
        (None, None, "add up"),
        ([3, 2, 1], torch.zeros(3, 3, dtype=torch.bool), "take no resets"),
    ],
)
def test_operator_refuses(lengths: list[int] | None, resets: Tensor | None, message: str) -> None:
    _, layer = padded_and_packed("gru", [3, 2, 1])
    steps = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(RuntimeError, match=message), rnnkern.backend("cpu"):
        dataclasses.replace(layer, lengths=steps, resets=resets).infer()
