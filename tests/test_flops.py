"""Floating-point operations as torch.utils.flop_counter counts them: ours, and those of torch's own modules."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import rnnkern
from tests.helpers import needs_kernels

pytestmark = needs_kernels
T, B, I, H = 5, 2, 3, 4


def count(run: Any) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


def forward_and_backward(module: Any, *inputs: Any) -> tuple[int, int]:
    outputs, forward = count(lambda: module(*inputs))
    loss = sum(output.sum() for output in tree_leaves(outputs))
    _, backward = count(loss.backward)
    return forward, backward


@pytest.mark.parametrize("needed", [(False, False), (True, False), (False, True)], ids=["", "dx", "dhx"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one layer", "four"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_layers_as_torch_counts(kind: str, options: dict[str, Any], needed: tuple[bool, bool]) -> None:
    h = torch.randn(4 if options else 1, B, H, requires_grad=needed[1])
    x = torch.randn(T, B, I, requires_grad=needed[0])
    hx = (h, h.detach().clone().requires_grad_(needed[1])) if kind == "LSTM" else h
    ours = forward_and_backward(getattr(rnnkern.nn, kind)(I, H, **options), x, hx)
    with torch.backends.mkldnn.flags(enabled=False):  # of oneDNN's LSTM torch counts nothing
        theirs = forward_and_backward(getattr(torch.nn, kind)(I, H, **options), x, hx)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_as_torch_counts(kind: str) -> None:
    x = torch.randn(B, I)
    ours, theirs = (forward_and_backward(getattr(lib, kind)(I, H), x) for lib in (rnnkern.nn, torch.nn))
    assert ours[0] == theirs[0] == 2 * B * {"RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}[kind] * H * (I + H)
    assert ours[1] > 0


@torch.no_grad()
def test_calls_past_the_dispatcher_are_seen() -> None:
    gru, cell = rnnkern.nn.GRU(I, H).eval(), rnnkern.nn.GRUCell(I, H).eval()
    x = torch.randn(1, B, I)
    for _ in range(4):
        assert count(lambda: gru(x))[1] == count(lambda: cell(x[0]))[1] == 2 * B * 3 * H * (I + H)
        gru(x)
        cell(x[0])


def test_int8_weights_and_packed_rows() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(5, I), torch.randn(2, I)])
    assert count(lambda: rnnkern.nn.GRU(I, H)(packed))[1] == 2 * 7 * 3 * H * (I + H)
    with torch.no_grad():
        assert count(lambda: rnnkern.nn.QuantizedGRU(I, H)(packed))[1] == 2 * 7 * 3 * H * (I + H)


def test_attention() -> None:
    query, key, value = (torch.randn(2, t, d, requires_grad=True) for t, d in ((5, 8), (7, 8), (7, 6)))

    def run() -> Any:
        return rnnkern.functional.attention(query, key, value, score="dot")[0]

    context, forward = count(run)
    with rnnkern.backend("eager"):
        same, products = count(run)
    _, backward = count(context.sum().backward)
    _, transposed = count(same.sum().backward)
    assert forward == products == 2 * 2 * 5 * 7 * (8 + 6)
    assert backward == transposed + 2 * 2 * 5 * 7 * 8  # the scores once more
    score = rnnkern.functional.Additive(torch.randn(8))
    assert count(lambda: rnnkern.functional.attention(query, key, value, score=score)[0])[1] == forward


@pytest.mark.parametrize("first", ["rnnkern", "torch.utils.flop_counter"])
def test_the_counter_is_not_imported_before_it_is_asked_for(first: str) -> None:
    program = f"""
import sys, torch, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "rnnkern")
import rnnkern
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    rnnkern.nn.GRU(3, 4)(torch.zeros(5, 2, 3))
assert counter.get_total_flops() == 1680
"""
    subprocess.run([sys.executable, "-c", program], check=True)
