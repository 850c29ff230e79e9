"""Packed sequences, run as they lie: the checks of their parts, and what is done to the state of their rows."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern.nn._autocast import result_dtype
from rnnkern.nn._checks import check_call, check_pair, first_two, not_tensors


def run_packed(
    layers: Any,  # a module of rnnkern.nn
    packed: PackedSequence,
    hx: Any,
    return_states: bool,
) -> tuple[PackedSequence, Tensor, Tensor | None, Any]:
    """Output, h_n, c_n and, if asked for, the states after every step; rows run in their sorted order."""
    data, batch_sizes, order, back = packed
    B = int(batch_sizes[0])
    if not torch.compiler.is_compiling():
        _check_batch_sizes(batch_sizes, data.shape[0])
    if hx is None:
        hx = h, c = layers._first_state(data, B)
    else:
        if not layers._two_states:
            h, c = hx, None
        else:
            h, c = check_pair(hx) if order is None else first_two(hx)
        if not isinstance(h, Tensor) or (layers._two_states and not isinstance(c, Tensor)):
            if order is None and not layers._two_states:
                layers.check_input(data, batch_sizes)  # torch looks at it first
            absent = TypeError if order is None and layers._two_states else AttributeError
            raise absent(not_tensors(h, c, layers._two_states))
        if order is not None:
            h = h.index_select(1, order)
            c = None if c is None else c.index_select(1, order)
            hx = h, c
    if data.dim() != 2:
        layers.check_input(data, batch_sizes)
    first = layers._layer_weights(0)
    assert first[0][0] is not None
    dtype = layers._dtype(first[0][0])
    check_call(layers, data, B, hx, h, c, dtype, batch_sizes)
    result = dtype
    if data.dtype != dtype or h.dtype != dtype or (c is not None and c.dtype != dtype):  # by autocast
        result = result_dtype(layers.mode, h if c is None else c, dtype, fused=False)
        data, h = data.to(dtype), h.to(dtype)
    row_lengths = (batch_sizes[:, None] > torch.arange(B, device=batch_sizes.device)).sum(0)
    y, h_n, c_n, states = layers._layers(data, h, c, first, row_lengths, None, return_states)
    if result != dtype:
        y, h_n, c_n, states = layers._widened(result, y, h_n, c_n, states)
    if back is not None:
        h_n = h_n.index_select(1, back)
        c_n = None if c_n is None else c_n.index_select(1, back)
    output = PackedSequence(y, batch_sizes, order, back)
    every = None if states is None else tuple(PackedSequence(s, batch_sizes, order, back) for s in states)
    return output, h_n, c_n, layers._in_form(every)


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Raises RuntimeError unless these are the rows of each step, longest sequence first, of so many rows in all."""
    if bool((batch_sizes[1:] > batch_sizes[:-1]).any()):
        raise RuntimeError(f"batch_sizes of input must not increase, got {batch_sizes.tolist()}")
    if int(batch_sizes[-1]) < 0:
        raise RuntimeError(f"batch_sizes of input must not be negative, got {batch_sizes.tolist()}")
    if int(batch_sizes.sum()) != rows:
        raise RuntimeError(f"batch_sizes of input must add up to its rows, {rows}, got {int(batch_sizes.sum())}")
