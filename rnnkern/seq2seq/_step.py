"""A decoding step without gradients on a GPU: one launch for each layer, the last with the attention after it.

The states of several layers are joined by a launch more, an LSTM's by two. An LSTM's c stays in the compute dtype from
step to step; one in the dtype of x, as the encoder gives it, is converted by a launch, once for a sequence.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnkern import nn as rnn
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import _overrides, cuda
from rnnkern.ops.step import attention_step, step

_RECURRENT = (rnn.RNN, rnn.LSTM, rnn.GRU)
_ATTENTIONS = (type(None), rnn.DotAttention, rnn.GeneralAttention, rnn.AdditiveAttention)


class Stepped(NamedTuple):
    """What a step gives."""

    hidden: Tensor  # of the last layer, [B, H]
    context: Tensor | None  # [B, M]; None without attention
    state: Any  # h [L, B, H], or (h, c) with c in the compute dtype


def fused_step(
    recurrent: Any,
    attention: Any,
    x: Tensor,  # [B, E]
    state: Any,  # [L, B, H] each; c in the dtype of x or the compute dtype
    values: Tensor,  # [B, Tk, M]
    projected: Tensor | None,  # [B, Tk, D]
    lengths: Tensor | None,  # int64 [B], on the device
    workspace: cuda.StepWorkspace | None,
) -> Stepped | None:
    """A step by fused launches; None where there are none for it, or the modules are to be called as they are."""
    if x.is_cpu and not _overrides.count:  # the common case there, at little cost
        return None
    if torch.is_grad_enabled() or not _is_plain(recurrent, attention):
        return None
    h, c = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    cell, two_states = recurrent.mode.lower(), recurrent._two_states
    if not cuda.fuses(cell, x, recurrent.hidden_size) or two_states != (c is not None):
        return None
    sizes = recurrent.num_layers, x.shape[0], recurrent.hidden_size
    compute = compute_dtype(x.dtype)
    if not _fits(h, x, sizes) or (two_states and not _fits(c, x, sizes, x.dtype, compute)):
        return None
    if attention is not None and (projected is None or not _fits(values, x, (x.shape[0], *values.shape[1:]))):
        return None
    if lengths is not None and lengths.device != x.device:
        return None

    c = None if c is None else c.to(compute)
    hidden, context = x, None
    every_h: list[Tensor] = []
    every_c: list[Tensor] = []
    for layer in range(recurrent.num_layers):
        weights, _ = recurrent._layer_weights(layer)
        inputs = cell, hidden, h[layer], None if c is None else c[layer], weights
        if attention is None or layer < recurrent.num_layers - 1:
            hidden, next_c = step(*inputs)
        else:
            assert projected is not None
            score = attention._score(h)
            hidden, next_c, context = attention_step(
                *inputs,
                projected,
                values,
                w_query=attention.query_projection.weight if score["score"] == "additive" else None,
                vector=score.get("vector"),
                scale=score.get("scale", 1.0),
                lengths=lengths,
                workspace=workspace,
            )
        every_h.append(hidden)
        if next_c is not None:
            every_c.append(next_c)
    h_n = _stacked(every_h)
    return Stepped(h_n[-1], context, (h_n, _stacked(every_c)) if two_states else h_n)


def _stacked(layers: list[Tensor]) -> Tensor:
    return torch.stack(layers) if len(layers) > 1 else layers[0].unsqueeze_(0)  # no view: these refuse `detach_`


def _fits(tensor: Any, x: Tensor, sizes: tuple[int, ...], *dtypes: torch.dtype) -> bool:
    """Whether it has these sizes, device of x and its dtype, or one of those; the modules refuse what does not fit."""
    return (
        isinstance(tensor, Tensor)
        and (tensor.shape, tensor.device) == (sizes, x.device)
        and tensor.dtype in (dtypes or (x.dtype,))
    )


def modules_state(state: Any) -> Any:
    """The state as the modules take it: c in the dtype of h, if it comes from `fused_step`."""
    if isinstance(state, tuple) and len(state) == 2 and all(isinstance(s, Tensor) for s in state):
        h, c = state
        if h.dtype in (torch.bfloat16, torch.float16) and c.dtype == compute_dtype(h.dtype):
            return h, c.to(h.dtype)
    return state


def hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of these modules would run more than its class: hooks, or a `forward` put on the module."""
    everywhere: Any = torch.nn.modules.module  # of hooks of every module; that is not typed
    return bool(everywhere._has_any_global_hook()) or any(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
        for module in modules
    )


def _is_plain(recurrent: Any, attention: Any) -> bool:
    """Whether calls of these modules do just what their classes say: no hook, no other weights, no autocast."""
    modules: list[tuple[nn.Module, tuple[type, ...]]] = [(recurrent, _RECURRENT)]
    if attention is not None:
        modules.append((attention, _ATTENTIONS))
    if isinstance(attention, rnn.AdditiveAttention):
        modules.append((attention.query_projection, (nn.Linear,)))
    drops = recurrent.training and recurrent.dropout
    if drops or torch._C._is_any_autocast_enabled() or hooked(*(module for module, _ in modules)):
        return False
    return all(type(module) in kinds for module, kinds in modules)
