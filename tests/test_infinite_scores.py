"""Scores of minus infinity: valid keys that have no other give NaN, as torch.softmax does; no valid key gives zeros."""

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import triton as kernels
from rnnkern.functional import attention
from tests.attention_problem import BACKENDS, PADDINGS
from tests.helpers import error

ALL_BACKENDS = BACKENDS if kernels.missing_on("cpu") else [*BACKENDS, "triton"]
B, TK = 4, 150  # more keys than a program takes of one query


def make_inputs(Tq: int) -> list[Tensor]:
    """The first query has scores of -inf: with all keys of row 0, and with 140 in row 1."""
    query, key = torch.randn(B, Tq, 1) * 1e-20, torch.randn(B, TK, 1) * 1e-20
    query[:, 0], key[0], key[1, :140] = 1e20, -1e20, -1e20
    return [query, key, torch.randn(B, TK, 3)]


def make_padding(kind: str) -> Tensor:
    """Row 2 has no valid key, where there is padding."""
    padding = torch.zeros(B, TK, dtype=torch.bool)
    if kind == "lengths":
        padding[0, 70:], padding[1, 145:], padding[2] = True, True, True
    if kind == "mask":
        padding[0, ::2], padding[1, 70:143], padding[2] = True, True, True
    return padding


def softmax(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Attention row by row, over the valid keys alone."""
    weights = []
    for q, k, valid in zip(query, key, ~padding):
        of_row = torch.zeros(q.shape[0], TK)
        if valid.any():
            of_row = of_row.index_add(1, valid.nonzero()[:, 0], (q @ k[valid].T).softmax(-1))
        weights.append(of_row)
    context = [w[:, valid] @ v[valid] for w, v, valid in zip(weights, value, ~padding)]
    return torch.stack(context), torch.stack(weights)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # by numpy, in Triton's interpreter
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_as_of_softmax(backend: str, Tq: int, kind: str) -> None:
    padding = make_padding(kind)
    given = {"lengths": {"lengths": (~padding).sum(1)}, "mask": {"key_padding_mask": padding}}.get(kind, {})
    inputs = [t.requires_grad_() for t in make_inputs(Tq)]
    gradients = torch.randn(B, Tq, 3), torch.randn(B, Tq, TK)
    expected = softmax(*inputs, padding)
    expected += torch.autograd.grad(expected, inputs, gradients)
    with rnnkern.backend(backend):
        found = attention(*inputs, score="dot", need_weights=True, **given)
        found += torch.autograd.grad(found, inputs, gradients)
    assert expected[0][0, 0].isnan().all()
    assert not expected[0][1:].isnan().any()
    for name, a, b in zip(("context", "weights", "dquery", "dkey", "dvalue"), found, expected, strict=True):
        if backend == "cuda-emulated" and Tq == 1 and name in ("context", "weights"):
            assert not a[b.isnan()].any(), name  # zeros, as the docstring of attention says
        else:
            assert torch.equal(a.isnan(), b.isnan()), name
        if name not in ("dquery", "dkey"):  # sums of 1e20 that cancel
            assert error(a.nan_to_num(), b.nan_to_num()) < 1e-5, name
