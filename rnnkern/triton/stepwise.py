"""The stepwise engine: torch multiplies by W_hh, one kernel per step does the rest. Any size, any dtype.

  forward    gh = h W_hh^T by torch, then forward_step: gates, new state, y, and the h that the next step reads
  backward   backward_step, from the last step; then dh = dgh W_hh by torch; once more after the first step

Napkin, H100, LSTM, bf16, H = 1024, B = 64: a step reads W_hh, 8 MB, from L2 at some 5 TB/s, 1.6 us; what the kernel
reads and writes is 2.5 MB, 0.6 us; but two launches, and Python between them, take 20 us or more. A CUDA graph of the
whole layer takes these away.
"""

import triton
import triton.language as tl

from rnnkern.triton.pointwise import keep_step, load_bias, load_step, step_backward, step_forward
from rnnkern.triton.sequence import load_parts, row_has, row_lengths, row_places, row_starts


@triton.jit
def tile_of(B, H: tl.constexpr, R: tl.constexpr, U: tl.constexpr):
    """Rows and units of this program, which row tiles follow each other in."""
    tiles: tl.constexpr = (H + U - 1) // U
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64) * R + tl.arange(0, R)
    u = program % tiles * U + tl.arange(0, U)
    return b, u, (b < B)[:, None] & (u < H)[None, :]


@triton.jit(do_not_specialize=["step", "T", "B"])
def forward_step(
    seq,
    f,
    gh,  # compute type [D, B, G*H]: h W_hh^T
    h,  # S [D, B, H]: what this step reads, zero where an episode starts; afterwards what the next one does
    step,
    T,
    B,
    CELL: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
):
    """Step `step` of every row that has it. Grid: [tiles of rows * tiles of units, D]."""
    b, u, inside = tile_of(B, H, R, U)
    d = tl.program_id(1)
    length = row_lengths(seq, b, T, B)
    alive = (step < length)[:, None] & inside
    row = row_places(seq, step, length, d, b, B) * D + d
    own = ((d.to(tl.int64) * B + b) * H)[:, None] + u[None, :]
    products = load_parts(gh, ((d.to(tl.int64) * B + b) * (G * H))[:, None] + u[None, :], alive, G, H)
    gx = load_parts(f.gx, row[:, None] * (G * H) + u[None, :], alive, G, H)
    bias = load_bias(f, d, u, gh.dtype.element_ty, G, H)
    state = tl.load(h + own, mask=alive, other=0.0)
    c = state
    if f.c_n is not None:
        c = tl.load(f.c_n + own, mask=alive, other=0.0)
        if seq.resets is not None:
            c = tl.where(row_starts(seq, step, length, d, b, B)[:, None], 0.0, c)
    h_next, c_next, saved = step_forward(CELL, f, gx, products, bias, state, c, row, u, alive, H)
    keep_step(f, saved, c, c_next, row, u, alive, H, SAVED)
    tl.store(f.h_n + own, h_next, mask=alive)
    if f.c_n is not None:
        tl.store(f.c_n + own, c_next, mask=alive)
    if seq.resets is not None:
        h_next = tl.where(row_starts(seq, step + 1, length, d, b, B)[:, None], 0.0, h_next)
    tl.store(h + own, h_next, mask=alive)


@triton.jit(do_not_specialize=["step", "T", "B"])
def backward_step(
    seq,
    k,
    dgh,  # S [D, B, G*H]: of this step, zero for rows without it
    product,  # compute type [D, B, H]: dgh W_hh of the step after this one
    step,
    T,
    B,
    CELL: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    CLIP: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
):
    """Step `step` of every row that has it; step -1 leaves dh0 and dc0. Grid: as forward's."""
    b, u, inside = tile_of(B, H, R, U)
    d = tl.program_id(1)
    length = row_lengths(seq, b, T, B)
    alive = row_has(step, length)[:, None] & inside
    row = row_places(seq, step, length, d, b, B) * D + d
    at = ((d.to(tl.int64) * B + b) * H)[:, None] + u[None, :]
    values = load_step(k, row, u, alive, H, SAVED)
    later = (step + 1 < length)[:, None] & inside
    dh = tl.load(k.dh0 + at, mask=inside, other=0.0) + tl.load(product + at, mask=later, other=0.0)
    dc = tl.zeros_like(dh)
    if k.dc0 is not None:
        dc = tl.load(k.dc0 + at, mask=inside, other=0.0)
    if seq.resets is not None:
        fresh = row_starts(seq, step + 1, length, d, b, B)[:, None]
        dh, dc = tl.where(fresh, 0.0, dh), tl.where(fresh, 0.0, dc)
    gates, direct, dc_before = step_backward(CELL, k, values, dh, dc, row, u, alive, G, H, CLIP)
    tl.store(k.dh0 + at, tl.where(alive, direct, dh), mask=inside)
    if k.dc0 is not None:
        tl.store(k.dc0 + at, tl.where(alive, dc_before, dc), mask=inside)
    to = ((d.to(tl.int64) * B + b) * (G * H))[:, None] + u[None, :]
    for g in tl.static_range(G):
        tl.store(dgh + to + g * H, tl.where(alive, gates[g], 0.0), mask=inside)
