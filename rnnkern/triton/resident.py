"""The resident engine: a program runs all steps of a tile of rows in one direction; W_hh stays in it.

  forward    step s: gh = h W_hh^T, a product for each gate; gates, new state, y; h stays in the program
  backward   step s from the last: dgh; dh = dgh W_hh + what the cell passes on

H is padded to a power of two of units UP inside. No program needs another: no barrier, any number of rows.

Napkin, H100, LSTM, bf16, H = 128, 16 rows: W_hh is 128 KB of 227 KB of shared memory. A step's 16 x 512 x 128 products
are 512 mma of 16x8x16, on 4 tensor cores 8 clocks each: 1024 clocks; W_hh passes from shared memory to registers, 128
bytes a clock: 1024 clocks, which more rows share; what is pointwise, and the way of h through shared memory, 300 more:
1.2 us. The loads of step s + 1 go out before step s, so that nobody waits for memory.
"""

import triton
import triton.language as tl

from rnnkern.triton.arithmetic import multiply
from rnnkern.triton.pointwise import keep_step, load_bias, load_step, step_backward, step_forward
from rnnkern.triton.sequence import load_parts, row_has, row_lengths, row_places, row_starts


@triton.jit(do_not_specialize=["T", "B"])
def forward(
    seq,
    f,
    T,
    B,
    CELL: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    R: tl.constexpr,
    UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: [tiles of R rows, D]."""
    b = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.program_id(1)
    u = tl.arange(0, UP)
    within = u < H
    inside = (b < B)[:, None] & within[None, :]
    length = row_lengths(seq, b, T, B)
    # w[k, u] = W_hh[g H + u, k] of each gate
    w = load_parts(f.w_hh + d * (G * H * H), u[:, None] + u[None, :] * H, within[:, None] & within[None, :], G, H * H)
    bias = load_bias(f, d, u, tl.float32, G, H)
    own = ((d.to(tl.int64) * B + b) * H)[:, None] + u[None, :]
    h = tl.load(f.h0 + own, mask=inside, other=0.0)
    c = tl.zeros_like(h).to(tl.float32)
    if f.c_n is not None:
        c = tl.load(f.c_n + own, mask=inside, other=0.0)

    row = row_places(seq, 0, length, d, b, B) * D + d
    alive = (length > 0)[:, None] & inside
    gx = load_parts(f.gx, row[:, None] * (G * H) + u[None, :], alive, G, H)
    for step in range(0, tl.max(length, 0)):
        coming_row = row_places(seq, step + 1, length, d, b, B) * D + d
        coming_alive = (step + 1 < length)[:, None] & inside
        coming_gx = load_parts(f.gx, coming_row[:, None] * (G * H) + u[None, :], coming_alive, G, H)
        if seq.resets is not None:
            fresh = row_starts(seq, step, length, d, b, B)[:, None]
            h, c = tl.where(fresh, 0.0, h), tl.where(fresh, 0.0, c)
        gh = ()
        for g in tl.static_range(G):
            gh = gh + (multiply(h, w[g], None, PRECISION),)
        h_next, c_next, saved = step_forward(CELL, f, gx, gh, bias, h, c, row, u, alive, H)
        keep_step(f, saved, c, c_next, row, u, alive, H, SAVED)
        h, c = tl.where(alive, h_next, h), tl.where(alive, c_next, c)
        row, alive, gx = coming_row, coming_alive, coming_gx
    tl.store(f.h_n + own, h, mask=inside)
    if f.c_n is not None:
        tl.store(f.c_n + own, c, mask=inside)


@triton.jit(do_not_specialize=["T", "B"])
def backward(
    seq,
    k,
    T,
    B,
    CELL: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    CLIP: tl.constexpr,
    R: tl.constexpr,
    UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: [tiles of R rows, D]."""
    b = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.program_id(1)
    u = tl.arange(0, UP)
    within = u < H
    inside = (b < B)[:, None] & within[None, :]
    length = row_lengths(seq, b, T, B)
    # w[k, u] = W_hh[g H + k, u] of each gate
    w = load_parts(k.w_hh + d * (G * H * H), u[:, None] * H + u[None, :], within[:, None] & within[None, :], G, H * H)
    own = ((d.to(tl.int64) * B + b) * H)[:, None] + u[None, :]
    dh = tl.load(k.dh0 + own, mask=inside, other=0.0)
    dc = tl.zeros_like(dh)
    if k.dc0 is not None:
        dc = tl.load(k.dc0 + own, mask=inside, other=0.0)

    longest = tl.max(length, 0)
    row = row_places(seq, longest - 1, length, d, b, B) * D + d
    alive = row_has(longest - 1, length)[:, None] & inside
    values = load_step(k, row, u, alive, H, SAVED)
    for done in range(0, longest):
        step = longest - 1 - done
        coming_row = row_places(seq, step - 1, length, d, b, B) * D + d
        coming_alive = row_has(step - 1, length)[:, None] & inside
        coming_values = load_step(k, coming_row, u, coming_alive, H, SAVED)
        gates, dh_before, dc_before = step_backward(CELL, k, values, dh, dc, row, u, alive, G, H, CLIP)
        for g in tl.static_range(G):
            dh_before = multiply(tl.where(alive, gates[g], 0.0), w[g], dh_before, PRECISION)
        if seq.resets is not None:
            fresh = row_starts(seq, step, length, d, b, B)[:, None]
            dh_before, dc_before = tl.where(fresh, 0.0, dh_before), tl.where(fresh, 0.0, dc_before)
        dh, dc = tl.where(alive, dh_before, dh), tl.where(alive, dc_before, dc)
        row, alive, values = coming_row, coming_alive, coming_values
    tl.store(k.dh0 + own, dh, mask=inside)
    if k.dc0 is not None:
        tl.store(k.dc0 + own, dc, mask=inside)
