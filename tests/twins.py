"""Modules of ours and of torch's with the same weights, and comparisons of what they give."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rnnkern

T, B, I, H = 4, 3, 5, 6
LAYERS = ["RNN", "LSTM", "GRU"]
KINDS = [*LAYERS, "RNNCell", "LSTMCell", "GRUCell"]
kinds = pytest.mark.parametrize("kind", KINDS)
layers = pytest.mark.parametrize("kind", LAYERS)


def pair(kind: str, *args: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, built from the same seed."""
    modules = []
    for library in (rnnkern.nn, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(library, kind)(*(args or (I, H)), **options))
    return modules[0], modules[1]


def input_of(kind: str, **options: Any) -> Tensor:
    return torch.randn(B, I, **options) if kind.endswith("Cell") else torch.randn(T, B, I, **options)


def weight_name(kind: str, part: str = "hh") -> str:
    return f"weight_{part}" if kind.endswith("Cell") else f"weight_{part}_l0"


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def assert_same_training(ours: torch.nn.Module, peer: torch.nn.Module, x: Tensor) -> None:
    """The same outputs, and gradients of every parameter."""
    gradients = []
    for module in (ours, peer):
        module.zero_grad()
        outputs = tree_leaves(module(x))
        sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert_same(ours(x), peer(x))
    ours.eval()
    peer.eval()
    with torch.no_grad():
        for _ in range(3):
            assert_same(ours(x), peer(x))
