"""One recurrent layer in plain PyTorch: differentiable, any dtype and device, the ground truth of every backend.

Per direction, for t in its order:  gx_t = W_ih x_t + b_ih,  gh_t = W_hh h + b_hh (`CellSpec.recurrent`: what it says),
(h, ...) = step(gx_t, gh_t, h, ...).

Low precision (bfloat16, float16): products, gates and the cell state are float32; h is rounded to the storage dtype
after each step, so that y is exactly what the next step reads.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from rnnkern.cells.spec import CellSpec


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products and cell states for values stored as `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is limited to [-limit, limit] element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(-ctx.limit, ctx.limit), None


_apply_clip: Any = _ClipGradient.apply


def refuse_forward_mode(option: str, tensors: Iterable[Tensor]) -> None:
    """Raises NotImplementedError if one of the tensors has a tangent: an option that limits gradients has no say there.

    Not by a `jvp` of the functions that limit: torch.compile refuses functions that have one.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    duals = [forward_ad.unpack_dual(tensor) for tensor in tensors]  # type: ignore[no-untyped-call]
    if any([dual.tangent is not None for dual in duals]):
        raise NotImplementedError(
            f"{option} limits gradients on their way back, which forward-mode differentiation (jvp) has none of: "
            f"leave {option} out there"
        )


def _clip_gradient(x: Tensor, limit: float) -> Tensor:
    refuse_forward_mode("grad_clip", [x])
    result: Tensor = _apply_clip(x, limit)
    return result


def layer(
    spec: CellSpec,
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [D, B, H], or [D, B, P] with a projection
    c0: Tensor | None,  # [D, B, H] in the compute dtype, for cells of two states
    weights: tuple[Tensor | None, ...],  # w_ih, w_hh, b_ih, b_hh; then the same of the reverse direction, or None
    *,
    projection: tuple[Tensor | None, ...] = (None, None),  # w_hr of each direction, [P, H]: h' = W_hr h
    lengths: Tensor | None = None,  # [B]: steps of each row
    resets: Tensor | None = None,  # [T, B]: an episode starts here, so no state passes between t-1 and t
    return_states: bool = False,
    grad_clip: float = 0.0,  # bound of every element of dL/dgx_t and dL/dgh_t; 0: none
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs a layer in one or both directions.

    Of a PackedSequence's data x is [N, I], `lengths` has the rows' steps, longest first, and y and c_all are [N, D*H].
    Past a row's length y is zero and the state stays; the reverse direction starts at each row's own last step. `h0`
    and `c0` enter the first episode that a direction meets; a reset at t = 0 replaces them in the forward direction.

    Returns:
        y [T, B, D*H], h_n [D, B, H], c_n [D, B, H] (or [0]), c_all [T, B, D*H] (if `return_states`, else [0]);
        the cell states are in the compute dtype.
    """
    if x.dim() == 2:
        assert lengths is not None
        T, B = (int(lengths[0]) if len(lengths) else 0), h0.shape[1]
        present = torch.arange(T, device=x.device)[:, None] < lengths.to(x.device)  # [T, B]
        padded = x.new_zeros(T, B, x.shape[1]).masked_scatter(present[:, :, None], x)
        y, h_n, c_n, c_all = layer(
            spec,
            padded,
            h0,
            c0,
            weights,
            projection=projection,
            lengths=lengths,
            return_states=return_states,
            grad_clip=grad_clip,
        )
        rows = (torch.arange(T)[:, None] < lengths.cpu()).flatten().nonzero()[:, 0].to(x.device)  # also on meta
        y, c_all = (s.flatten(0, 1).index_select(0, rows) if s.dim() == 3 else s for s in (y, c_all))
        return y, h_n, c_n, c_all
    if x.shape[0] == 0:  # one step that no row has, so that every gradient exists
        B = h0.shape[1]
        y, h_n, c_n, c_all = layer(
            spec,
            torch.cat([x, x.new_zeros(1, B, x.shape[2])]),
            h0,
            c0,
            weights,
            projection=projection,
            lengths=torch.zeros(B, dtype=torch.long),
            return_states=return_states,
        )
        return y[:0], h_n, c_n, c_all[:0]
    steps = torch.arange(x.shape[0], device=x.device)[:, None]  # [T, 1]
    alive = None if lengths is None else steps < lengths.to(x.device)  # [T, B]
    # boundary[t, b]: no state passes between steps t-1 and t. Beyond a row's end there is nothing to separate.
    boundary = resets if resets is None or alive is None else resets & alive

    outputs = []
    with without_autocast(x.device.type):  # what to round is said here
        for direction in range(h0.shape[0]):
            c = None if c0 is None else c0[direction]
            w_ih, w_hh, b_ih, b_hh = weights[4 * direction : 4 * direction + 4]
            assert w_ih is not None
            assert w_hh is not None
            reverse = direction == 1
            w_hr = projection[direction]
            outputs.append(
                _direction(spec, x, h0[direction], c, w_ih, w_hh, b_ih, b_hh, w_hr, alive, boundary, reverse, grad_clip)
            )
    ys, hs, cs, all_cs = ([out[i] for out in outputs] for i in range(4))
    two_states = len(spec.states) == 2
    absent = x.new_empty(0, dtype=compute_dtype(x.dtype))
    return (
        torch.cat(ys, dim=-1),
        torch.stack(hs),
        torch.stack(cs) if two_states else absent,
        torch.cat(all_cs, dim=-1) if two_states and return_states else absent.clone(),
    )


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off for a type of device, where it is on."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        context: AbstractContextManager[Any] = torch.autocast(device, enabled=False)
        return context
    return nullcontext()


def _direction(
    spec: CellSpec,
    x: Tensor,  # [T, B, I]
    h: Tensor,  # [B, H or P]
    c: Tensor | None,  # [B, H]
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    alive: Tensor | None,  # [T, B]
    boundary: Tensor | None,  # [T, B]
    reverse: bool,
    grad_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction: y [T, B, H], h_n [B, H], c_n [B, H] and c_all [T, B, H] (h in their place if there is no c)."""
    storage, compute = x.dtype, compute_dtype(x.dtype)
    T = x.shape[0]
    if alive is not None:
        x = x.masked_fill(~alive[:, :, None], 0)  # padding may hold anything, NaN too
    w_ih, w_hh = w_ih.to(compute), w_hh.to(compute)
    b_ih, b_hh, w_hr = (None if w is None else w.to(compute) for w in (b_ih, b_hh, w_hr))
    gx = linear(x.to(compute), w_ih, b_ih)  # [T, B, G*H]
    if grad_clip:
        gx = _clip_gradient(gx, grad_clip)

    state: tuple[Tensor, ...] = (h.to(compute),) if c is None else (h.to(compute), c)
    y: list[Tensor] = [x] * T
    c_all: list[Tensor] = [x] * T
    for t in reversed(range(T)) if reverse else range(T):
        before = state
        edge = t + 1 if reverse else t  # the boundary just crossed; the reverse direction comes from step t+1
        if boundary is not None and edge < T:
            before = tuple(s.masked_fill(boundary[edge][:, None], 0) for s in state)
        gh = spec.recurrent_part(gx[t], before[0], w_hh, b_hh)  # [B, G*H]
        if grad_clip:
            gh = _clip_gradient(gh, grad_clip)
        after = spec.next_state(gx[t], gh, before)
        h_next = after[0] if w_hr is None else linear(after[0], w_hr)
        after = (h_next.to(storage).to(compute), *after[1:])
        if alive is not None:
            state = tuple(torch.where(alive[t][:, None], new, old) for new, old in zip(after, state))
            y[t], c_all[t] = (s.masked_fill(~alive[t][:, None], 0) for s in (after[0], after[-1]))
        else:
            state = after
            y[t], c_all[t] = after[0], after[-1]
    if T == 0:  # a PackedSequence of empty rows
        return x.new_empty(0, *state[0].shape), state[0].to(storage), state[-1], gx.new_empty(0, *state[-1].shape)
    return torch.stack(y).to(storage), state[0].to(storage), state[-1], torch.stack(c_all)
