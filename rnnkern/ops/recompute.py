"""A layer in segments of steps: only the state before each is kept for backward, which runs the segment again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import _overrides
from rnnkern.ops._dispatch import transformed
from rnnkern.ops.formulas import Outputs, grad_of
from rnnkern.ops.packs import PackCache, Weights
from rnnkern.ops.recurrence import recurrence


def segmented(
    every: int,  # steps of a segment
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    *,
    projection: tuple[Tensor | None, ...] = (None, None),
    packs: PackCache | None = None,
    layer: int = 0,
    lengths: Tensor | None = None,
    **options: Any,  # resets, return_states, grad_clip
) -> Outputs:
    r"""`recurrence`, which keeps the state before every k-th step for backward instead of every gate of every step.

    .. math:: s_{jk} \text{ is kept}, \qquad s_{jk+1}, \dots, s_{jk+k} \text{ are computed again from it in backward}

    With N values kept per step, T N becomes T / k states and k N, at the price of another forward. Outputs are the
    same to the last bit, and so are the gradients of x and of the initial state in float32 and float64; in 16 bits the
    gradient of the state is rounded between segments. Gradients of weights are added segment by segment, in the
    compute dtype: they differ from `recurrence`'s by the rounding of their sums. Each direction runs by itself. On the
    eager reference, whose products depend on the number of rows, anything may differ by a unit in the last place.

    A backward that is to be differentiated again keeps everything; so do tracers, compilers and torch.func, whose own
    means decide what is kept (`torch.utils.checkpoint`).

    Arguments and results are those of `recurrence`. Source: Chen et al. 2016, https://arxiv.org/abs/1604.06174.
    """
    tensors = (x, h0, c0, *weights, *projection)
    T = 0
    if not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or transformed()
        or not (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]))
    ):  # no traced program may depend on T
        T = x.shape[0] if x.dim() == 3 else int(lengths[0]) if lengths is not None and len(lengths) else 0
    if every >= T:
        return recurrence(
            *(cell, x, h0, c0, weights),
            projection=projection,
            packs=packs,
            layer=layer,
            lengths=lengths,
            **options,
        )
    if packs is not None:
        packs.forget()  # as `recurrence` does where gradients are wanted
    # Copies: backward reads them again, whatever the caller has written there since.
    lengths, resets = (None if t is None else t.clone() for t in (lengths, options.get("resets")))
    result: Outputs = _apply(_Plan(every, T, len(h0), cell, lengths, {**options, "resets": resets}), *tensors)
    return result


class _Segment(NamedTuple):
    """A piece of one direction."""

    rows: slice  # of x along its first dimension
    lengths: Tensor | None  # steps that each row has here
    resets: Tensor | None
    back: Tensor | None  # how the reverse direction reads the rows; None: forward


@dataclass(frozen=True)
class _Plan:
    every: int
    T: int
    D: int
    cell: str
    lengths: Tensor | None
    options: dict[str, Any]

    def segments(self, x: Tensor, B: int, d: int) -> Iterator[_Segment]:
        """Those of direction d in the order in which it runs them."""
        T, lengths, resets = self.T, self.lengths, self.options.get("resets")
        if resets is not None and lengths is not None:  # beyond a row's end there is nothing to separate
            resets = resets & (torch.arange(T)[:, None] < lengths).to(resets.device)
        if resets is not None and d == 1:  # the reverse direction crosses the boundary ahead of a step
            resets = torch.cat([resets[1:], resets.new_zeros(1, B)])
        begins = range(0, T, self.every)
        for begin in reversed(begins) if d else begins:
            end = min(begin + self.every, T)
            rest = None if lengths is None else (lengths - begin).clamp(0, end - begin)
            rows = slice(begin, end)
            if x.dim() == 2:  # packed
                assert lengths is not None
                rows = slice(*(int(lengths.clamp(max=t).sum()) for t in (begin, end)))
            boundary = None if resets is None else resets[begin:end]
            back = _backwards(end - begin, B, rest, x.dim() == 2).to(x.device) if d else None
            if boundary is not None and back is not None:
                boundary = _reordered(boundary.unsqueeze(-1), back).squeeze(-1)
            yield _Segment(rows, rest, boundary, back)

    def run(self, segment: _Segment, d: int, x: Tensor, h: Tensor, c: Tensor | None, tensors: Any) -> Outputs:
        """A segment of direction d: y and c_all of its rows, and the state [1, B, H] after it."""
        with _overrides.Override("whole", (self.T, self.D)):  # who runs it follows from the layer
            y, h_n, c_n, c_all = recurrence(
                self.cell,
                x if segment.back is None else _reordered(x, segment.back),
                h,
                c,
                (*tensors[4 * d : 4 * d + 4], None, None, None, None),
                projection=(tensors[8 + d], None),
                **{**self.options, "lengths": segment.lengths, "resets": segment.resets},
            )
        if segment.back is not None:
            y, c_all = (_reordered(out, segment.back) if out.dim() > 1 else out for out in (y, c_all))
        return y, h_n, c_n, c_all


class _Segmented(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, h0: Tensor, c0: Tensor | None, *tensors: Tensor | None) -> Outputs:
        D, B, width = h0.shape
        y = x.new_empty(*x.shape[:-1], D * width)
        c_all = y.new_empty(0)
        if every_c := c0 is not None and plan.options.get("return_states", False):
            c_all = c0.new_empty(*x.shape[:-1], D * c0.shape[2])
        last_h, last_c, kept = [], [], []
        for d in range(D):
            h, c = h0[d : d + 1], None if c0 is None else c0[d : d + 1]
            for segment in plan.segments(x, B, d):
                kept += [h, c]
                piece, h, c_n, cells = plan.run(segment, d, x[segment.rows], h, c, tensors)
                c = None if c is None else c_n
                y[segment.rows].chunk(D, -1)[d].copy_(piece)
                if every_c:
                    c_all[segment.rows].chunk(D, -1)[d].copy_(cells)
            last_h.append(h)
            last_c.append(c_n)
        ctx.plan = plan
        ctx.save_for_backward(x, h0, c0, *tensors, *kept)
        ctx.set_materialize_grads(False)
        c_n = torch.cat(last_c)
        if c0 is None:
            ctx.mark_non_differentiable(c_n)
        if not every_c:
            ctx.mark_non_differentiable(c_all)
        return y, torch.cat(last_h), c_n, c_all

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        plan, needed = ctx.plan, ctx.needs_input_grad[1:]
        x, h0, c0, *rest = ctx.saved_tensors
        tensors, kept = rest[:10], rest[10:]
        if torch.is_grad_enabled():  # to be differentiated again
            aliases = [None if t is None else t.view_as(t) for t in (x, h0, c0, *tensors)]  # each path counts once
            weights, projection = tuple(aliases[3:11]), tuple(aliases[11:])
            outputs = recurrence(
                *(plan.cell, *aliases[:3], weights), projection=projection, lengths=plan.lengths, **plan.options
            )
            wanted = [alias if need else None for alias, need in zip(aliases, needed)]
            return (None, *grad_of(outputs, cotangents, wanted, create_graph=True))
        dy, dh_n, dc_n, dc_all = cotangents
        D, B, _ = h0.shape
        dx = None
        starts: list[list[Tensor]] = [[], []]  # gradients of h0 and c0, of each direction
        # Of 16-bit weights the sum over segments would be in 16 bits, too.
        compute = compute_dtype(x.dtype)
        sums = [torch.zeros_like(t, dtype=compute) if need else None for t, need in zip(tensors, needed[3:])]
        for d in range(D):
            dh, dc = (None if state is None else state[d : d + 1] for state in (dh_n, dc_n))
            for i, segment in reversed(list(enumerate(plan.segments(x, B, d)))):
                h, c = kept[2 * i + d * len(kept) // D : 2 * i + d * len(kept) // D + 2]
                leaves = [None if t is None else t.detach() for t in (x[segment.rows], h, c, *tensors)]
                wanted = [
                    leaf.requires_grad_() if leaf is not None and (need or at in (1, 2)) else None
                    for at, (leaf, need) in enumerate(zip(leaves, needed))
                ]
                with torch.enable_grad():
                    outputs = plan.run(segment, d, *leaves[:3], leaves[3:])
                dy_rows, dc_rows = (None if g is None else g[segment.rows].chunk(D, -1)[d] for g in (dy, dc_all))
                found = grad_of(outputs, (dy_rows, dh, dc, dc_rows), wanted, create_graph=False)
                if found[0] is not None:
                    dx = found[0].new_zeros(x.shape) if dx is None else dx  # where cotangents are a batch, it is one
                    dx[segment.rows] += found[0]
                dh, dc = found[1:3]
                # Not in place: only the parts may be a batch.
                sums = [s if s is None or part is None else s + part for s, part in zip(sums, found[3:])]
            for start, state, given in zip(starts, (h0, c0), (dh, dc)):
                if state is not None:
                    start.append(torch.zeros_like(state[d : d + 1]) if given is None else given)
        dh0, dc0 = (torch.cat(start) if start else None for start in starts)
        return (None, dx, dh0, dc0, *(None if s is None else s.to(x.dtype) for s in sums))


_apply: Any = _Segmented.apply


def _backwards(T: int, B: int, lengths: Tensor | None, packed: bool) -> Tensor:
    """Where each step lies when every row comes last step first: an index of T * B rows, or of packed ones."""
    t, row = torch.arange(T)[:, None], torch.arange(B)
    if lengths is None:
        return ((T - 1 - t) * B + row).flatten()
    alive = t < lengths  # [T, B]
    mirrored = torch.where(alive, lengths - 1 - t, t)
    if not packed:
        return (mirrored * B + row).flatten()
    count = alive.sum(1)
    return ((count.cumsum(0) - count)[mirrored] + row)[alive]


def _reordered(sequence: Tensor, index: Tensor) -> Tensor:
    """The rows of [T, B, N] or [rows, N] in another order."""
    return sequence.reshape(-1, sequence.shape[-1])[index].view(sequence.shape)
