"""A stack of recurrent layers of one direction as one operator of the CUDA backend: fake kernels and autograd.

`csrc/torch/cuda_stack.cpp` has the kernels: rnnkern::cuda_stack, rnnkern::cuda_stack_inference and
rnnkern::cuda_stack_backward run the layers one after another, or side by side on consecutive chunks of time (a
wavefront), whichever is estimated to take less; rnnkern::cuda_stack_plan says which. N is T B, or the packed rows.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells import CELLS, reference
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import _dispatch, explain, onnx
from rnnkern.ops.cuda import kept_elements
from rnnkern.ops.formulas import differentiate_twice
from rnnkern.ops.packs import Weights
from rnnkern.ops.recurrence import check_weights

CHUNKS = 0  # of time in a wavefront; 0: as estimated. Tests ask for some


def _fake_inference(cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    c_n = x.new_empty(0 if c0 is None else h0.shape, dtype=compute_dtype(x.dtype))
    return x.new_empty(*x.shape[:-1], h0.shape[2]), x.new_empty(h0.shape), c_n


def _fake_stack(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    L, _, H = h0.shape
    saved = x.new_empty(L, kept_elements(cell, x, H), dtype=compute_dtype(x.dtype))
    return *_fake_inference(cell, x, h0, c0), x.new_empty(L - 1, *x.shape[:-1], H), saved


def _fake_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    *rest: Any,  # lengths, resets, masks, scale, y, hidden, saved, need_dx, need_dh0, need_dw, grad_clip, ...
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    need_dx, need_dh0, need_dw = rest[7:10]
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        h0.new_empty(h0.shape if need_dh0 else (0,)),
        x.new_empty(0 if c0 is None or not need_dh0 else c0.shape, dtype=compute_dtype(x.dtype)),
        [x.new_empty(w.shape if need_dw else (0,)) for w in weights],
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.cell, x, h0, c0, weights, lengths, resets, masks, ctx.scale, *ctx.settings = inputs
    y, _, c_n, hidden, saved = output
    ctx.save_for_backward(x, h0, c0, lengths, resets, masks, y, hidden, saved, *weights)
    ctx.mark_non_differentiable(hidden, saved, *(() if c0 is not None else (c_n,)))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad  # cell, x, h0, c0, weights, ...
    x, h0, c0, lengths, resets, masks, y, hidden, saved, *weights = ctx.saved_tensors
    dc_n = dc_n if c0 is not None else None  # AOTAutograd gives zeros of shape [0] here
    needs = needed[1], any(needed[2:4]), any(needed[4])
    # As in `formulas.backward_of_layer`.
    with contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
        dx, dh0, dc0, dweights = torch.ops.rnnkern.cuda_stack_backward.default(
            *(ctx.cell, dy, dh_n, dc_n, x, h0, c0, weights, lengths, resets, masks, ctx.scale),
            *(y, hidden, saved, *needs, *ctx.settings),
        )
    states = (grad if need else None for grad, need in zip((dx, dh0, dc0), needed[1:4]))
    of_weights = [grad if need else None for grad, need in zip(dweights, needed[4])]
    return (None, *states, of_weights, *[None] * (len(needed) - 5))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.cell, dy, dh_n, dc_n, x, h0, c0, weights, lengths, resets, masks, ctx.scale = inputs[:12]
    ctx.save_for_backward(lengths, resets, masks, dy, dh_n, dc_n, x, h0, c0, *weights)  # the rest follows from them
    ctx.grad_clip = inputs[18]
    ctx.set_materialize_grads(False)


def _double_backward(
    ctx: Any, ddx: Tensor | None, ddh0: Tensor | None, ddc0: Tensor | None, ddweights: list[Tensor | None]
) -> tuple[Any, ...]:
    """Gradient of `cuda_stack_backward`: the reference runs again, its gradient is taken twice."""
    lengths, resets, masks, *tensors = ctx.saved_tensors  # dy, dh_n, dc_n, x, h0, c0, weights
    run = partial(_reference, ctx.cell, lengths, resets, masks, ctx.scale, ctx.grad_clip)
    second = differentiate_twice(run, tensors[:3], tensors[3:], (ddx, ddh0, ddc0, *ddweights))
    return (None, *second[:6], second[6:], *[None] * (len(ctx.needs_input_grad) - 8))


def _reference(
    cell: str,
    lengths: Tensor | None,
    resets: Tensor | None,
    masks: Tensor | None,
    scale: float,
    grad_clip: float,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h_n and c_n by the eager reference."""
    L = h0.shape[0]
    each = len(weights) // L
    h_n, c_n = [], []
    for layer in range(L):
        own = (*weights[layer * each : layer * each + each], *[None] * (8 - each))
        rows = slice(layer, layer + 1)
        x, h, c, _ = reference.layer(
            *(CELLS[cell], x, h0[rows], None if c0 is None else c0[rows], own),
            lengths=lengths,
            resets=resets,
            grad_clip=grad_clip,
        )
        if masks is not None and layer < L - 1:
            x = x * masks[layer] * scale
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), None if c0 is None else torch.cat(c_n)


if _library.available:
    torch.library.register_fake("rnnkern::cuda_stack", _fake_stack)
    torch.library.register_fake("rnnkern::cuda_stack_inference", _fake_inference)
    torch.library.register_fake("rnnkern::cuda_stack_backward", _fake_backward)
    torch.library.register_autograd("rnnkern::cuda_stack", _backward, setup_context=_setup)
    torch.library.register_autograd("rnnkern::cuda_stack_backward", _double_backward, setup_context=_setup_backward)


def stack(
    cell: str,
    x: Tensor,  # [T, B, I], or [N, I] of a PackedSequence
    h0: Tensor,  # [L, B, H]
    c0: Tensor | None,  # [L, B, H] in the compute dtype, for cells of two states
    weights: Sequence[Weights],  # of each layer
    *,
    lengths: Tensor | None = None,  # int64 [B] on the CPU
    resets: Tensor | None = None,  # bool [T, B]
    dropout: float = 0.0,  # of each output but the last layer's
    grad_clip: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Runs layers of one direction, where `rnnkern.ops.cuda.runs_here`: y [T, B, H], h_n [L, B, H] and c_n.

    .. math:: y^l_t, s^l_t = f(W^l, d(y^{l-1}_t), s^l_{t-1}), \qquad y^0 = x

    d drops each element with the probability `dropout` and divides what remains by 1 - dropout; d(y^0) = x. Results of
    the recurrence are those of `rnnkern.ops.recurrence.recurrence` layer by layer, to the last bit where the planner
    cuts a layer alike for the whole GPU and for a part; products between layers are torch's, of a chunk's rows.

    Raises:
        RuntimeError: a weight does not fit its input in device, dtype or shape.
        rnnkern.BackendUnavailable: the engine that the caller forced cannot run this.
    """
    L, _, H = h0.shape
    for layer, own in enumerate(weights):
        check_weights(x.new_empty(0, H) if layer else x, own, cell, h0, h0)
    flat = [w for own in weights for w in own if w is not None]
    tracing = torch._C._get_tracing_state() is not None
    if tracing:
        onnx.refuse_torchscript()
    training = tracing or (
        torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, h0, c0, *flat)])
    )
    how = _dispatch.forced_engine(), _dispatch.tf32_allowed()
    if not torch.compiler.is_compiling() and (how[0] or explain.explaining()):
        plan = partial(_dispatch.cuda_stack_plan, cell, x, h0, lengths, CHUNKS)
        for backward in (False, True) if training else (False,):
            plan(backward=backward)
        if explain.explaining():
            _tell(cell, x, h0, plan)
    masks = None
    if dropout:
        masks = x.new_empty(L - 1, *x.shape[:-1], H, dtype=torch.bool).bernoulli_(1 - dropout)
    scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    inputs = (cell, x, h0, c0, flat, lengths, resets, masks, scale)
    if training:
        y, h_n, c_n, _, _ = torch.ops.rnnkern.cuda_stack.default(*inputs, grad_clip, *how, CHUNKS)
    else:
        y, h_n, c_n = torch.ops.rnnkern.cuda_stack_inference.default(*inputs, *how, CHUNKS)
    return y, h_n, None if c0 is None else c_n


def _tell(cell: str, x: Tensor, h0: Tensor, plan: Callable[..., str]) -> None:
    """Notes for `explain`, one for each layer."""
    L, B, H = h0.shape
    T = _dispatch.steps_of(x, B)
    backend, why = _dispatch.forced(), "forced by rnnkern.backend"
    if backend is None:
        backend, why = _dispatch.choose_gpu(cell, x.device, x.dtype, T, B, H, 1)
    engine = explain.both_passes(plan, x.dtype, backend)
    for layer in range(L):
        I = H if layer else x.shape[-1]
        facts = (cell, str(x.device), str(x.dtype), T, B, I, H, 1, backend, why, engine)
        explain.note(explain.LayerNote, *facts)
