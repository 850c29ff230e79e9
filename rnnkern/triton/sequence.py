"""Which step of a row comes when, and where it lies; tiles of what lies there.

A row of a batch has `length` steps, which direction 0 takes from the first and direction 1 from the last. Step s of
row b lies at `place` among all rows of all steps: t B + b of padded batches, offsets[t] + b of packed rows. Places are
64-bit, so that neither long sequences nor large tensors overflow.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequence(NamedTuple):
    """Tensors, and pointers in kernels."""

    lengths: Any  # int64 [B], or None: every row has T steps
    offsets: Any  # int64 [T + 1]: first row of each step, of packed rows; else None
    resets: Any  # bool [T, B], or None: no state passes between steps t - 1 and t


@triton.jit
def row_lengths(seq, b, T, B):
    """Of rows b [R]; 0 for those past the batch."""
    if seq.lengths is None:
        length = tl.where(b < B, T, 0).to(tl.int64)
    else:
        length = tl.load(seq.lengths + b, mask=b < B, other=0)
    return length


@triton.jit
def row_has(step, length):
    """Whether rows of these lengths [R] have the step, which may also be -1."""
    left = length - 1 - step
    return (left >= 0) & (left < length)


@triton.jit
def row_places(seq, step, length, d, b, B):
    """Of a step of rows b [R] in direction d; of no meaning for rows without that step."""
    t = tl.where(d == 0, step, length - 1 - step)
    if seq.offsets is None:
        first = t * B
    else:
        first = tl.load(seq.offsets + t, mask=row_has(step, length), other=0)
    return first + b


@triton.jit
def row_starts(seq, step, length, d, b, B):
    """Whether an episode starts with this step of rows b [R], so that the state before it is zero."""
    if seq.resets is None:
        starts = length < 0
    else:
        edge = tl.where(d == 0, step, length - step)
        within = row_has(step, length) & (edge < length)
        starts = tl.load(seq.resets + edge * B + b, mask=within, other=0) != 0
    return starts


@triton.jit
def load_parts(pointer, at, mask, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """COUNT tiles, STRIDE elements apart, the first at `at`; zeros where the mask is not."""
    parts = ()
    for i in tl.static_range(COUNT):
        parts = parts + (tl.load(pointer + at + i * STRIDE, mask=mask, other=0.0),)
    return parts


@triton.jit
def store_parts(pointer, parts, at, mask, STRIDE: tl.constexpr):
    """Each tile of `parts`, STRIDE elements apart, rounded to what the pointer points to."""
    for i in tl.static_range(len(parts)):
        tl.store(pointer + at + i * STRIDE, parts[i].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def convert(parts, dtype: tl.constexpr):
    """Each of `parts` in another dtype."""
    converted = ()
    for i in tl.static_range(len(parts)):
        converted = converted + (parts[i].to(dtype),)
    return converted


@triton.jit(do_not_specialize=["T", "B"])
def previous_h(
    seq,
    h0,  # [D, B, H]
    y,  # [N, D*H]
    h_before,  # [N, D*H]: h before each step; zero past a row's end
    T,
    B,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
):
    """y of the step before each, h0 at the first, zero where an episode starts. Grid: [tiles of T*B rows, D]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.program_id(1)
    step, b = row // B, row % B
    exists = row < T.to(tl.int64) * B
    length = row_lengths(seq, tl.where(exists, b, B), T, B)
    alive = step < length
    place = row_places(seq, step, length, d, b, B)
    if seq.offsets is None:  # padding has a place too
        place = tl.where(alive, place, row)
        written = exists
    else:
        written = alive
    carried = alive & ~row_starts(seq, step, length, d, b, B)
    before = row_places(seq, step - 1, length, d, b, B)
    for first in range(0, H, U):
        u = first + tl.arange(0, U)
        within = u[None, :] < H
        at_first = tl.load(
            h0 + (d.to(tl.int64) * B + b)[:, None] * H + u[None, :],
            mask=(carried & (step == 0))[:, None] & within,
            other=0.0,
        )
        later = tl.load(
            y + (before * D + d)[:, None] * H + u[None, :], mask=(carried & (step > 0))[:, None] & within, other=0.0
        )
        value = tl.where((step == 0)[:, None], at_first, later)
        tl.store(h_before + (place * D + d)[:, None] * H + u[None, :], value, mask=written[:, None] & within)
