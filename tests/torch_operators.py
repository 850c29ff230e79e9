"""What the tests of `rnnkern.enable` share: torch's modules, and what comes out of them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

T, B, I, H = 6, 3, 4, 5
LAYERS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {})]
CELLS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})]
IDS = {"ids": lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))}
OPERATORS = [
    name
    for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru")
    for name in (f"aten::{cell}.input", f"aten::{cell}.data", f"aten::{cell}_cell")
]


def tables() -> list[str]:
    """The dispatcher's kernels of every operator that `enable` replaces."""
    return [torch._C._dispatch_dump(name) + torch._C._dispatch_dump_table(name) for name in OPERATORS]


def results(module: torch.nn.Module, x: Any, hx: Any = None) -> list[Tensor]:
    """Outputs and gradients of the input, hx and every parameter."""
    module.zero_grad()
    data = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    state = None if hx is None else tree_map(lambda t: t.detach().clone().requires_grad_(), hx)
    torch.manual_seed(1)  # for dropout
    out = module(x._replace(data=data) if isinstance(x, PackedSequence) else data, state)
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    sum((leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in outputs).backward()
    gradients = [
        data.grad,
        *(s.grad for s in ([] if state is None else tree_leaves(state))),
        *(p.grad for p in module.parameters()),
    ]
    return [*outputs, *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def state_of(module: Any, batch: int) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or H)
    return (h, torch.randn(rows, batch, H)) if module.mode == "LSTM" else h
