"""Gradients that torch.nn has in part only: of any order and in eval mode, whatever the call; and without steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import BACKENDS

KINDS = ["RNN", "LSTM", "GRU"]
T, B, I, H = 4, 3, 2, 2
RESETS = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()

CALLS: dict[str, Callable[[torch.nn.Module, Tensor], Any]] = {
    "plain": lambda module, x: module(x),
    "unbatched": lambda module, x: module(x[:, 0]),
    "lengths": lambda module, x: module(x, lengths=torch.tensor([2, T, 0])),
    "resets": lambda module, x: module(x, resets=RESETS),
    "states": lambda module, x: module(x, return_sequence_states=True),
    "packed": lambda module, x: module(pack_padded_sequence(x, [T, 3, 1])),
    "one step": lambda module, x: module(x[:1]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RNN", {}),
        ("GRU", {}),
        ("LSTM", {}),
        ("LSTM", {"proj_size": 1}),
        ("GRU", {"learn_initial_state": True}),
        ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ],
)
def test_second_derivatives_in_eval_mode(kind: str, options: dict[str, Any], call: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H, dtype=torch.float64, **options).eval()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    inputs = (x, *module.parameters())  # gradgradcheck changes these in place

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf for leaf in tree_leaves(CALLS[call](module, x)) if isinstance(leaf, Tensor)]
        return tuple(leaf for leaf in leaves if leaf.is_floating_point())

    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_second_derivatives_of_cells_in_eval_mode(kind: str) -> None:
    cell = getattr(rnnkern.nn, kind)(I, H, dtype=torch.float64).eval()
    x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, H, dtype=torch.float64, requires_grad=True)

    def run(*_: Tensor) -> Any:
        return cell(x, (h, 2 * h) if kind == "LSTMCell" else h)

    assert torch.autograd.gradgradcheck(run, (x, h, *cell.parameters()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_no_steps(kind: str, options: dict[str, Any], backend: str) -> None:
    """An empty output, the initial state as it was, and gradients: torch raises."""
    module = getattr(rnnkern.nn, kind)(I, H, **options)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.randn(rows, B, H, requires_grad=True) for _ in range(2 if kind == "LSTM" else 1)]
    hx = tuple(states) if kind == "LSTM" else states[0]
    x = torch.randn(B, 0, I) if module.batch_first else torch.randn(0, B, I)
    x.requires_grad_()
    resets, width = torch.zeros(x.shape[:2], dtype=torch.bool), H * (2 if module.bidirectional else 1)
    with rnnkern.backend(backend):
        for given in ({}, {"lengths": torch.zeros(B, dtype=torch.long)}, {"resets": resets}):
            y, state, steps = module(x, hx, return_sequence_states=True, **given)
            assert y.shape == (*x.shape[:2], width)
            torch.testing.assert_close(state, hx, rtol=0, atol=0)
            assert all(leaf.shape == (0, rows, B, H) for leaf in tree_leaves(steps))
            loss = y.sum() + sum((leaf * leaf).sum() for leaf in tree_leaves(state))
            found = torch.autograd.grad(loss, [*states, x, *module.parameters()])
            torch.testing.assert_close(list(found[: len(states)]), [2 * s for s in states], rtol=0, atol=0)
            assert not any(gradient.any() for gradient in found[len(states) :])
        assert not module(x)[1][0].any()  # zeros are the initial state otherwise
        with torch.no_grad():
            for _ in range(3):  # short calls are others from the second on
                torch.testing.assert_close(module.eval()(x, hx)[1], hx, rtol=0, atol=0)
        unbatched = module(x[0] if module.batch_first else x[:, 0])
        assert unbatched[0].shape == (0, width)
