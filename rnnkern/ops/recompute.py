"""A layer in segments of steps: only the state before each is kept for backward, which runs the segment again."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rnnkern.cells.reference import compute_dtype
from rnnkern.ops.packs import PackCache, Weights
from rnnkern.ops.recurrence import Outputs, recurrence


def segmented(
    every: int,  # steps of a segment
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    projection: tuple[Tensor | None, ...] = (None, None),
    packs: PackCache | None = None,
    layer: int = 0,
    **options: Any,
) -> Outputs:
    r"""`recurrence`, which keeps the state before every k-th step for backward instead of every gate of every step.

    .. math:: s_{jk} \text{ is kept}, \qquad s_{jk+1}, \dots, s_{jk+k} \text{ are computed again from it in backward}

    With N values kept per step, T N becomes T / k states and k N, at the price of another forward. Outputs are the
    same to the last bit, and so are the gradients of x and of the initial state in float32 and float64; in 16 bits the
    gradient of the state is rounded between segments. Gradients of weights are added segment by segment, in the
    compute dtype: they differ from `recurrence`'s by the rounding of their sums. Each direction runs by itself.

    Arguments and results are those of `recurrence`. Source: Chen et al. 2016, https://arxiv.org/abs/1604.06174.
    """
    T = x.shape[0] if x.dim() == 3 else int(lengths[0]) if lengths is not None and len(lengths) else 0
    used = [x, h0, c0, *weights, *projection]
    if every >= T or not (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in used])):
        return recurrence(
            cell,
            x,
            h0,
            c0,
            weights,
            lengths=lengths,
            resets=resets,
            projection=projection,
            packs=packs,
            layer=layer,
            **options,
        )
    if packs is not None:
        packs.forget()
    if resets is not None and lengths is not None:  # beyond a row's end there is nothing to separate
        resets = resets & (torch.arange(T)[:, None] < lengths).to(resets.device)
    storage, packed = x.dtype, x.dim() == 2
    # Of 16-bit weights the sum over segments would be in 16 bits, too.
    weights = tuple(None if w is None else w.to(compute_dtype(storage)) for w in weights)

    def run(
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        back: Tensor | None,  # how the reverse direction reads the rows of x; None: forward
        projection: Tensor | None,
        *weights: Tensor | None,
    ) -> Outputs:
        y, h_n, c_n, c_all = recurrence(
            cell,
            x if back is None else _reordered(x, back),
            h,
            c,
            (*(None if w is None else w.to(storage) for w in weights), None, None, None, None),
            lengths=lengths,
            resets=resets if resets is None or back is None else _reordered(resets.unsqueeze(-1), back).squeeze(-1),
            projection=(projection, None),
            **options,
        )
        if back is not None:
            y, c_all = (_reordered(out, back) if out.dim() > 1 else out for out in (y, c_all))
        return y, h_n, c_n, c_all

    begins = range(0, T, every)
    steps = [min(every, T - begin) for begin in begins]
    rests = [None if lengths is None else (lengths - begin).clamp(0, n) for begin, n in zip(begins, steps)]
    pieces = torch.split(x, [int(rest.sum()) for rest in rests if rest is not None] if packed else steps)
    directions: list[Outputs] = []
    for d in range(h0.shape[0]):
        boundary = resets
        if resets is not None and d == 1:  # the reverse direction crosses the one ahead of a step
            boundary = torch.cat([resets[1:], resets.new_zeros(1, resets.shape[1])])
        boundaries = [None] * len(steps) if boundary is None else torch.split(boundary, steps)
        h, c = h0[d : d + 1], None if c0 is None else c0[d : d + 1]
        results: list[Outputs] = []
        for i in reversed(range(len(steps))) if d else range(len(steps)):
            back = _backwards(steps[i], h0.shape[1], rests[i], packed).to(x.device) if d else None
            result: Outputs = checkpoint(
                *(run, pieces[i], h, c, rests[i], boundaries[i], back, projection[d], *weights[4 * d : 4 * d + 4]),
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is random
            )
            h, c = result[1], None if c is None else result[2]
            results.append(result)
        if d:
            results.reverse()
        y, c_all = (torch.cat([result[i] for result in results]) for i in (0, 3))
        directions.append((y, h, results[0][2] if c is None else c, c_all))
    if len(directions) == 1:
        return directions[0]
    forward, reverse = directions
    y, h_n, c_n, c_all = (torch.cat([a, b], dim) for a, b, dim in zip(forward, reverse, (-1, 0, 0, -1)))
    return y, h_n, c_n, c_all


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
    return sequence.reshape(-1, sequence.shape[-1])[index].view_as(sequence)
