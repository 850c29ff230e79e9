"""The grid engine: the programs of a group share the units of a tile of rows, and show each other h after each step.

A program owns U units of R rows in one direction, and the weights that they need, for all steps:
  forward    gh = h W_hh^T for its gate rows: reads all of h, which is y of the step before, from L2
  backward   dh = dgh W_hh for its units: reads all of dgh of the step after, which is in memory anyway
The sum over K is cut into chunks of S slices of KS; a slice is a product of its own, so that warps work side by side on
a tile that is only U wide, and the slices are added at the end: one order, no float atomics.

All steps run in one cooperative launch, in which the programs of a group wait for each other by a counter; or each step
[first, last) in one launch of its own: the same code, for devices that cannot launch so or where nobody has proven that
it works (AMD's: see config.py), and for the interpreter, which runs programs one after another. Nothing but y, c_n,
dgh, dh0 and dc0 passes from step to step, and these are in memory.

Napkin, H100, LSTM, bf16, H = 1024, 16 rows: U = 16, 64 programs of 8 warps, 128 KB of weights each. A warp's share of a
step is 4 gates x 8 k x 2 n = 64 mma of 16x8x16, 32 clocks each on its tensor core: 2,100; h is 32 KB from L2, at 64
bytes a clock 500; adding up 8 slices of 4 KB in shared memory 300; counter and h through L2 1,300: 4,200 clocks,
2.4 us.
"""

import triton
import triton.language as tl

from rnnkern.triton.arithmetic import multiply
from rnnkern.triton.pointwise import keep_step, load_bias, load_step, step_backward, step_forward
from rnnkern.triton.sequence import load_parts, row_has, row_lengths, row_places, row_starts


@triton.jit
def arrive(counter):
    """When all that the other programs of the group are to see has been stored."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target):
    """Until the group has arrived `target` times in all."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def slices(chunk, S: tl.constexpr, KS: tl.constexpr):
    """The k of a chunk."""  # [S, KS]
    return chunk * (S * KS) + tl.arange(0, S)[:, None] * KS + tl.arange(0, KS)[None, :]


@triton.jit(do_not_specialize=["first", "last", "T", "B"])
def forward(
    seq,
    f,
    counters,  # int32 [tiles of rows, D], zero; or None: one launch for each step
    first,
    last,
    T,
    B,
    CELL: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    S: tl.constexpr,
    KS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Steps first .. last - 1. Grid: [tiles of U units, tiles of R rows, D]."""
    chunks: tl.constexpr = (H + S * KS - 1) // (S * KS)
    u = tl.program_id(0) * U + tl.arange(0, U)
    b = tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    d = tl.program_id(2)
    inside = (b < B)[:, None] & (u < H)[None, :]
    length = row_lengths(seq, b, T, B)
    w = ()  # of each chunk and gate, w[s, k, u] = W_hh[g H + u, k]
    for chunk in tl.static_range(chunks):
        of = slices(chunk, S, KS)[:, :, None]
        within = (of < H) & (u < H)[None, None, :]
        w = w + (load_parts(f.w_hh + d * (G * H * H), u[None, None, :] * H + of, within, G, H * H),)
    bias = load_bias(f, d, u, tl.float32, G, H)
    states = (d.to(tl.int64) * B + b) * H
    own = states[:, None] + u[None, :]
    c = tl.zeros((R, U), tl.float32)
    if f.c_n is not None:
        c = tl.load(f.c_n + own, mask=inside, other=0.0)

    for step in range(first, tl.minimum(last, tl.max(length, 0))):
        row = row_places(seq, step, length, d, b, B) * D + d
        here = step < length
        alive = here[:, None] & inside
        gx = load_parts(f.gx, row[:, None] * (G * H) + u[None, :], alive, G, H)
        before = row_places(seq, step - 1, length, d, b, B) * D + d
        state = tl.where(step == 0, f.h0 + states, f.y + before * H)  # [R]: where h of the step before begins
        if seq.resets is not None:
            fresh = row_starts(seq, step, length, d, b, B)
            here = here & ~fresh
            c = tl.where(fresh[:, None], 0.0, c)
        if counters is not None:
            wait(counters + tl.program_id(1) * D + d, (step - first) * tl.num_programs(0))
        sums = ()
        for _ in tl.static_range(G):
            sums = sums + (tl.zeros((S, R, U), tl.float32),)
        for chunk in tl.static_range(chunks):
            k = slices(chunk, S, KS)[:, None, :]
            mask = here[None, :, None] & (k < H)
            operand = tl.load(state[None, :, None] + k, mask=mask, other=0.0, cache_modifier=".cg")
            added = ()
            for g in tl.static_range(G):
                added = added + (multiply(operand, w[chunk][g], sums[g], PRECISION),)
            sums = added
        gh = ()
        for g in tl.static_range(G):
            gh = gh + (tl.sum(sums[g], 0),)
        h = tl.load(state[:, None] + u[None, :], mask=here[:, None] & (u < H)[None, :], other=0.0, cache_modifier=".cg")
        h_next, c_next, saved = step_forward(CELL, f, gx, gh, bias, h, c, row, u, alive, H)
        if counters is not None:
            arrive(counters + tl.program_id(1) * D + d)
        keep_step(f, saved, c, c_next, row, u, alive, H, SAVED)
        c = tl.where(alive, c_next, c)
        tl.store(f.h_n + own, h_next, mask=alive & (step + 1 == length)[:, None])
    if f.c_n is not None:
        tl.store(f.c_n + own, c, mask=inside)


@triton.jit(do_not_specialize=["first", "last", "T", "B"])
def backward(
    seq,
    k,
    counters,  # int32 [tiles of rows, D], zero; or None: one launch for each step
    first,
    last,
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
    S: tl.constexpr,
    KS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Steps last - 1 .. first; step -1 leaves dh0 and dc0. Grid: [tiles of U units, tiles of R rows, D]."""
    chunks: tl.constexpr = (H + S * KS - 1) // (S * KS)
    u = tl.program_id(0) * U + tl.arange(0, U)
    b = tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    d = tl.program_id(2)
    inside = (b < B)[:, None] & (u < H)[None, :]
    length = row_lengths(seq, b, T, B)
    w = ()  # of each chunk and gate, w[s, k, u] = W_hh[g H + k, u]
    for chunk in tl.static_range(chunks):
        of = slices(chunk, S, KS)[:, :, None]
        within = (of < H) & (u < H)[None, None, :]
        w = w + (load_parts(k.w_hh + d * (G * H * H), of * H + u[None, None, :], within, G, H * H),)
    own = ((d.to(tl.int64) * B + b) * H)[:, None] + u[None, :]
    dh = tl.load(k.dh0 + own, mask=inside, other=0.0)
    dc = tl.zeros_like(dh)
    if k.dc0 is not None:
        dc = tl.load(k.dc0 + own, mask=inside, other=0.0)

    end = tl.minimum(last, tl.max(length, 0))
    for done in range(0, end - first):
        step = end - 1 - done
        row = row_places(seq, step, length, d, b, B) * D + d
        alive = row_has(step, length)[:, None] & inside
        values = load_step(k, row, u, alive, H, SAVED)
        after = (row_places(seq, step + 1, length, d, b, B) * D + d) * (G * H)
        here = step + 1 < length
        if seq.resets is not None:
            fresh = row_starts(seq, step + 1, length, d, b, B)
            here = here & ~fresh
            dh, dc = tl.where(fresh[:, None], 0.0, dh), tl.where(fresh[:, None], 0.0, dc)
        if counters is not None:
            wait(counters + tl.program_id(1) * D + d, done * tl.num_programs(0))
        sums = tl.zeros((S, R, U), tl.float32)
        for chunk in tl.static_range(chunks):
            gate = slices(chunk, S, KS)[:, None, :]
            for g in tl.static_range(G):
                dgh = tl.load(
                    k.dgh + after[None, :, None] + g * H + gate,
                    mask=here[None, :, None] & (gate < H),
                    other=0.0,
                    cache_modifier=".cg",
                )
                sums = multiply(dgh, w[chunk][g], sums, PRECISION)
        dh += tl.sum(sums, 0)
        _, direct, dc_before = step_backward(CELL, k, values, dh, dc, row, u, alive, G, H, CLIP)
        if counters is not None:
            arrive(counters + tl.program_id(1) * D + d)
        dh, dc = tl.where(alive, direct, dh), tl.where(alive, dc_before, dc)
    tl.store(k.dh0 + own, dh, mask=inside)
    if k.dc0 is not None:
        tl.store(k.dc0 + own, dc, mask=inside)
