"""One step of a cell: in training a single node of the graph, elsewhere the recurrent layer's operator.

On a GPU a step without gradients is one launch, and so is one with the attention that follows it in a decoder.
"""

from typing import Any

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells import CELLS
from rnnkern.ops import _dispatch, cuda, explain
from rnnkern.ops.attention import attend
from rnnkern.ops.packs import PackCache, Weights
from rnnkern.ops.recurrence import check_weights, recurrence
from rnnkern.ops.short import watched


class _CellStep(torch.autograd.Function):
    """One step of a cell as one node of the graph, past the dispatcher where it is plain: x [B, I], h and c [B, H]."""

    @staticmethod
    def forward(ctx: Any, cell: str, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> Any:
        assert _library.extension is not None
        kept = _library.extension.train_step(cell, x, h, c, *weights)
        if kept is None:
            check_weights(x, weights, cell, h, h)
            with torch._C._AutoDispatchBelowAutograd():
                _, h_n, c_n, _, saved = torch.ops.rnnkern.layer.default(
                    cell, *_with_time(x, h, c), *weights, None, None, None, None, None, None, False, 0.0
                )
            kept = h_n[0], None if c is None else c_n[0], saved
        ctx.cell = cell
        ctx.save_for_backward(x, h, c, *weights, kept[2])  # not h': the caller may write over it
        ctx.set_materialize_grads(False)
        return kept[0] if c is None else kept[:2]

    @staticmethod
    def backward(ctx: Any, dh_n: Tensor | None, dc_n: Tensor | None = None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad  # cell, x, h, c, 4 weights
        wanted = needed[1], any(needed[2:4]), any(needed[4:])
        x, h, c, *weights, kept = ctx.saved_tensors
        y = h  # the kernels read no y of a single step: anything of its shape serves
        grads = None
        if not torch.is_grad_enabled():
            assert _library.extension is not None
            dh, dc = (None if d is None else d.contiguous() for d in (dh_n, dc_n))
            grads = _library.extension.train_step_backward(ctx.cell, dh, dc, x, h, c, *weights, y, kept, *wanted)
        if grads is None:
            dh, dc = (None if d is None else d.unsqueeze(0) for d in (dh_n, dc_n))
            inputs = *_with_time(x, h, c), *weights, None, None, None, None, None, None
            grads = torch.ops.rnnkern.layer_backward.default(
                ctx.cell, None, dh, dc, None, *inputs, y.unsqueeze(0), kept, *wanted
            )
            grads = *(d[0] if need else None for d, need in zip(grads[:3], needed[1:4])), *grads[3:7]
        return (None, *(grad if need else None for grad, need in zip(grads, needed[1:])))


_apply_cell_step: Any = _CellStep.apply


def _with_time(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.unsqueeze(0) for t in tensors)


def step(
    cell: str,
    x: Tensor,  # [B, I]
    h: Tensor,  # [B, H]
    c: Tensor | None,  # [B, H] in the compute dtype, for cells of two states
    weights: Weights,  # of one direction
    packs: PackCache | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One step: `recurrence` without a time dimension. Returns the next h, and c if the cell has one.

    A step in training is a single node of the graph, on a GPU one without gradients a single launch; whatever else is
    wanted takes `recurrence`.
    """
    used = weights[:4]
    gradients = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, h, c, *used)])
    if gradients and not torch.compiler.is_compiling() and h.shape[1] > 0 and plain_training(cell, x):
        if packs is not None:
            packs.forget()
        result = _apply_cell_step(cell, x, h, c, *used)
        return (result, None) if c is None else result
    if not gradients and torch._C._get_tracing_state() is None and cuda.fuses(cell, x, h.shape[1]):
        _dispatch.select(cell, x.unsqueeze(0), h.unsqueeze(0), False, fused=True)  # for `explain`
        check_weights(x, weights, cell, h, h)
        next_h, next_c = torch.ops.rnnkern.cuda_cell_step.default(cell, x, h, c, *used)
        return next_h, None if c is None else next_c
    c0 = None if c is None else c.unsqueeze(0)
    _, h_n, c_n, _ = recurrence(cell, x.unsqueeze(0), h.unsqueeze(0), c0, weights, packs=packs)
    return h_n.squeeze_(0), None if c is None else c_n.squeeze_(0)  # not views: these refuse `detach_`


def attention_step(
    cell: str,
    x: Tensor,  # [B, I]
    h: Tensor,  # [B, H]
    c: Tensor | None,  # [B, H] in the compute dtype, for cells of two states
    weights: Weights,  # of one direction
    key: Tensor,  # [B, Tk, D]: projected
    value: Tensor,  # [B, Tk, Dv]
    *,
    w_query: Tensor | None = None,  # [D, H]; None: the query is h', and D = H
    vector: Tensor | None = None,  # [D]: the additive score; None: the dot score
    scale: float = 1.0,  # of the dot score
    lengths: Tensor | None = None,  # int64 [B], of `place_lengths`
    workspace: cuda.StepWorkspace | None = None,  # None, or another's: made anew, by another launch
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A step, and the attention of its new h: `step`, then `attend`. Returns the next h and c, and context [B, Dv].

    On a GPU, without gradients, it is one launch, which allocates its results alone and may be captured in a CUDA
    graph. The query w_query h' is then not rounded to the dtype of h.
    """
    used = weights[:4]
    inputs = x, h, c, *used, w_query, key, value, vector
    gradients = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    if not gradients and torch._C._get_tracing_state() is None and cuda.fuses(cell, x, h.shape[1]):
        chosen = _dispatch.select(cell, x.unsqueeze(0), h.unsqueeze(0), False, fused=True)  # for `explain`
        sizes = (x.shape[0], 1, *key.shape[1:], value.shape[2])
        score = "dot" if vector is None else "additive"
        explain.note(explain.AttentionNote, score, str(x.device), str(x.dtype), *sizes, chosen, "")
        check_weights(x, weights, cell, h, h)
        if workspace is None or not workspace.fits(key, value):
            workspace = cuda.step_workspace(key, value)
        next_h, next_c, context = torch.ops.rnnkern.cuda_attention_step.default(
            *(cell, x, h, c, *used, w_query, key, value, vector, lengths, scale, *workspace)
        )
        return next_h, None if c is None else next_c, context
    next_h, next_c = step(cell, x, h, c, weights)
    query = next_h if w_query is None else torch.nn.functional.linear(next_h, w_query)
    context, _ = attend(
        query.unsqueeze(1),
        key,
        value,
        score="dot" if vector is None else "additive",
        vector=vector,
        scale=scale,
        lengths=lengths,
    )
    return next_h, next_c, context.squeeze(1)


def plain_training(cell: str, x: Tensor) -> bool:
    """Whether the compiled kernels run a step with gradients, and nobody asks which: see `_dispatch.select`."""
    return (
        _library.available
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and x.shape[0] > 0
        and cell in CELLS
        and not watched()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )
