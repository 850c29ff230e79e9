"""One step of a tile of rows and units, once its recurrent product is known: what all engines share.

The tensors of a layer have the layouts of csrc/cuda/layer.h. S is the storage type; what is float32 here is float64 for
a layer of float64. N is the rows of all steps: T*B, or those of packed rows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from rnnkern.triton.sequence import convert, load_parts, store_parts


class Forward(NamedTuple):
    """What forward takes and gives; pointers in kernels."""

    gx: Any  # S [N, D, G*H]: W_ih x + b_ih
    w_hh: Any  # S [D, G*H, H]
    b_hh: Any  # S [D, G*H] or None
    h0: Any  # S [D, B, H]
    y: Any  # S [N, D*H]; past a row's end it is left alone
    h_n: Any  # S [D, B, H]: h0 at first
    c_n: Any  # float32 [D, B, H] or None: c0 at first, c after each launch
    c_all: Any  # float32 [N, D*H] or None
    saved: Any  # S [N, D, saved, H] or None: no backward follows
    c_before: Any  # float32 [N, D, H] or None: c before each step, with `saved`


class Backward(NamedTuple):
    """What backward takes and gives; pointers in kernels."""

    w_hh: Any  # S [D, G*H, H]
    dy: Any  # S [N, D*H] or None: zero
    dc_all: Any  # float32 [N, D*H] or None: zero
    saved: Any  # S [N, D, saved, H], as forward left them; so the next
    c_before: Any  # float32 [N, D, H] or None
    h_before: Any  # S [N, D*H]
    dgx: Any  # S [N, D, G*H]; None: the same as dgh; past a row's end left alone
    dgh: Any  # S [N, D, G*H]
    dh0: Any  # float32 [D, B, H]: dh_n at first; after a launch, what the steps so far leave for h
    dc0: Any  # float32 [D, B, H] or None: the same for c


@triton.jit
def load_bias(f, d, u, dtype: tl.constexpr, G: tl.constexpr, H: tl.constexpr):
    """b_hh of units u [U], [1, U] for each gate; zeros if there is none."""
    bias = ()
    for g in tl.static_range(G):
        if f.b_hh is None:
            bias = bias + (0.0,)
        else:
            at = f.b_hh + d * (G * H) + g * H + u[None, :]
            bias = bias + (tl.load(at, mask=u[None, :] < H, other=0.0).to(dtype),)
    return bias


@triton.jit
def add(parts, others):
    """Sums, part by part."""
    sums = ()
    for i in tl.static_range(len(parts)):
        sums = sums + (parts[i] + others[i],)
    return sums


@triton.jit
def step_forward(
    CELL: tl.constexpr,
    f,
    gx,  # of each gate [R, U], in the storage type
    gh,  # of each gate [R, U], in the compute type
    bias,  # of each gate [1, U]
    h,  # [R, U]: the state before the step
    c,
    row,  # [R]: place * D + d
    u,  # [U]
    alive,  # [R, U]: rows that have this step, units that the layer has
    H: tl.constexpr,
):
    """Stores y; returns h as it is stored, c (that before, of a cell without), and what backward needs."""
    dtype: tl.constexpr = gh[0].dtype
    next, saved = CELL(convert(gx, dtype), add(gh, bias), (h.to(dtype), c))
    h_next = next[0].to(f.y.dtype.element_ty)
    tl.store(f.y + row[:, None] * H + u[None, :], h_next, mask=alive)
    c_next = c
    if f.c_n is not None:
        c_next = next[1]
    return h_next, c_next, saved


@triton.jit
def keep_step(f, saved, c, c_next, row, u, alive, H: tl.constexpr, SAVED: tl.constexpr):
    """Stores the rest of what a step gives; apart from y, which others may wait for."""
    at = row[:, None] * H + u[None, :]
    if f.saved is not None:
        store_parts(f.saved, saved, row[:, None] * (SAVED * H) + u[None, :], alive, H)
    if f.c_before is not None:
        tl.store(f.c_before + at, c, mask=alive)
    if f.c_all is not None:
        tl.store(f.c_all + at, c_next, mask=alive)


@triton.jit
def load_step(k, row, u, alive, H: tl.constexpr, SAVED: tl.constexpr):
    """What backward reads of a step, in the types that it is stored in; zeros where it is not."""
    at = row[:, None] * H + u[None, :]
    saved = load_parts(k.saved, row[:, None] * (SAVED * H) + u[None, :], alive, SAVED, H)
    h = tl.load(k.h_before + at, mask=alive, other=0.0)
    c = h
    if k.c_before is not None:
        c = tl.load(k.c_before + at, mask=alive, other=0.0)
    dy = tl.zeros_like(h)
    if k.dy is not None:
        dy = tl.load(k.dy + at, mask=alive, other=0.0)
    return saved, h, c, dy


@triton.jit
def step_backward(
    CELL: tl.constexpr,
    k,
    step,  # what load_step gave
    dh,  # [R, U]: of the state after the step, but for what y and c_all add
    dc,
    row,  # [R]: place * D + d
    u,  # [U]
    alive,  # [R, U]: rows that have this step, units that the layer has
    G: tl.constexpr,
    H: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Stores dgx and dgh; returns dgh of each gate as it is stored, and what reaches the state but through W_hh."""
    dtype: tl.constexpr = dh.dtype
    saved, h, c, dy = step
    dc_next = dc
    if k.dc_all is not None:
        dc_next = dc + tl.load(k.dc_all + row[:, None] * H + u[None, :], mask=alive, other=0.0)
    state = (h.to(dtype), c.to(dtype))
    dgx, dgh, dstate = CELL(convert(saved, dtype), state, (dh + dy.to(dtype), dc_next))
    if CLIP > 0:
        dgx, dgh = clip(dgx, CLIP), clip(dgh, CLIP)
    at = row[:, None] * (G * H) + u[None, :]
    if k.dgx is not None:
        store_parts(k.dgx, dgx, at, alive, H)
    dgh = convert(dgh, k.dgh.dtype.element_ty)
    store_parts(k.dgh, dgh, at, alive, H)
    dc_before = dc
    if k.c_before is not None:
        dc_before = dstate[1]
    return dgh, dstate[0], dc_before


@triton.jit
def clip(parts, CLIP: tl.constexpr):
    """Each part limited to [-CLIP, CLIP]; NaN stays NaN."""
    clipped = ()
    for i in tl.static_range(len(parts)):
        part = parts[i]
        clipped = clipped + (tl.where(part > CLIP, CLIP, tl.where(part < -CLIP, -CLIP, part)),)
    return clipped
