"""The recurrent layer around the recurrence: x W_ih^T by torch, an engine of Triton, gradients of weights by torch.

The counterpart of csrc/torch/cuda_layer.cpp: the same arguments, results, and layouts of what forward keeps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops.lengths import copy_lengths
from rnnkern.ops.products import widens
from rnnkern.triton import config, grid, resident, stepwise
from rnnkern.triton.cells import find_cell
from rnnkern.triton.config import divide_up
from rnnkern.triton.launch import launch
from rnnkern.triton.pointwise import Backward, Forward
from rnnkern.triton.sequence import Sequence, previous_h
from rnnkern.triton.table import Plan


def saved_sizes(cell: str, rows: int, D: int, H: int, dtype: torch.dtype) -> tuple[int, int]:
    """Elements in the compute type that forward keeps: all, and those of them that are c before each step.

    c comes first, then the cell's values in the storage type. c is rounded up to 16 bytes, so that what a kernel may
    assume of addresses does not follow from the number of steps.
    """
    spec, units = CELLS[cell], rows * D * H
    c = divide_up(units * (len(spec.states) - 1), 4) * 4
    return c + divide_up(units * len(spec.saved) * dtype.itemsize, compute_dtype(dtype).itemsize), c


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes: where slices begin may follow from B, and alignment compiles anew."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def multiply_batch(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, a batch of products; b is `Layer.factor` or its transpose, out is in the compute dtype."""
    if out.dtype == b.dtype:
        torch.bmm(a.to(b.dtype), b, out=out)
    else:
        torch.bmm(a, b, out.dtype, out=out)


@dataclass
class Layer:
    """The arguments of a layer as the engines take them, contiguous."""

    cell: str
    x: Tensor  # [T, B, I], or packed rows [N, I]
    h0: Tensor  # [D, B, H]
    c0: Tensor | None  # [D, B, H] in the compute dtype
    weights: tuple[Tensor | None, ...]
    lengths: Tensor | None  # int64 [B] on the CPU
    resets: Tensor | None  # bool [T, B]
    tf32: bool

    def __post_init__(self) -> None:
        self.D, self.B, self.H = self.h0.shape
        self.x, self.h0 = self.x.contiguous(), aligned(self.h0)
        self.c0 = None if self.c0 is None else self.c0.contiguous()
        packed = self.x.dim() == 2
        self.rows = self.x.shape[0] if packed else self.x.shape[0] * self.x.shape[1]
        self.T = self.x.shape[0]
        longest, padded = self.T, False
        lengths = offsets = None
        if self.lengths is not None:
            longest = int(self.lengths.max()) if self.B > 0 else 0
            self.T = longest if packed else self.T
            padded = not packed and self.B > 0 and int(self.lengths.min()) < self.T
            lengths = copy_lengths(self.lengths, self.x.device)
            if packed:
                steps = torch.arange(self.T, device=self.x.device)
                ended = torch.searchsorted(lengths.flip(0), steps, right=True)  # packed rows come longest first
                offsets = torch.nn.functional.pad((self.B - ended).cumsum(0), (1, 0))
        self.longest, self.padded = longest, padded
        resets = None if self.resets is None else aligned(self.resets)
        self.sequence = Sequence(lengths, offsets, resets)
        self.spec = CELLS[self.cell]
        self.gates = len(self.spec.gates) * self.H
        self.compute = compute_dtype(self.x.dtype)
        self.w_hh = self.matrix(1).view(self.D, self.gates, self.H)

    def stacked(self, which: int) -> Tensor | None:
        """A weight of both directions, one above the other."""  # [D*G*H] or [D*G*H, ...]
        present = [w for w in self.weights[which : 4 * self.D : 4] if w is not None]
        return torch.cat(present) if len(present) == 2 else present[0].contiguous() if present else None

    def matrix(self, which: int) -> Tensor:
        """`stacked`, of what is never missing."""
        stacked = self.stacked(which)
        assert stacked is not None
        return stacked

    def factor(self) -> Tensor:
        """W_hh for products into the compute dtype: in that dtype already where torch cannot widen what it sums."""
        return self.w_hh if widens(self.w_hh) else self.w_hh.to(self.compute)

    def plan(self, engine: str, backward: bool) -> Plan:
        """How an engine runs a pass of this."""
        facts = config.facts_of(self.x.device)
        return config.plan(self.cell, self.x.dtype, self.H, self.B, self.D, engine, self.tf32, facts, backward)

    def constants(self, plan: Plan) -> dict[str, Any]:
        """What every kernel of an engine takes by name."""
        given: dict[str, Any] = {
            "G": len(self.spec.gates),
            "H": self.H,
            "D": self.D,
            "SAVED": len(self.spec.saved),
            "R": plan.rows,
            "num_warps": plan.warps,
        }
        if plan.engine == "stepwise":
            return given | {"U": plan.units}
        given["PRECISION"] = config.precision(config.facts_of(self.x.device), self.x.dtype, self.tf32)
        if plan.engine == "resident":
            return given | {"UP": plan.units, "num_stages": 1}
        return given | {
            "U": plan.units,
            "S": plan.slices,
            "KS": plan.slice_size,
            "num_stages": 1,
            "launch_cooperative_grid": plan.cooperative,
        }

    def tiles(self, plan: Plan) -> tuple[int, ...]:
        """The grid of an engine's kernels."""
        rows, units = divide_up(self.B, plan.rows), divide_up(self.H, plan.units)
        if plan.engine == "stepwise":
            return rows * units, self.D
        return (rows, self.D) if plan.engine == "resident" else (units, rows, self.D)

    def output(self, columns: int, dtype: torch.dtype) -> Tensor:
        """Of every row and step, [..., columns]; zero past the end of rows."""
        make = self.x.new_zeros if self.padded else self.x.new_empty
        return make((*self.x.shape[:-1], columns), dtype=dtype)

    def values(self, saved: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two parts of what forward keeps: the cell's values, and c before each step."""
        kept, c = saved_sizes(self.cell, self.rows, self.D, self.H, self.x.dtype)
        return saved[c:kept].view(self.x.dtype), None if self.c0 is None else saved[:c]


def forward(layer: Layer, engine: str, return_states: bool, save: bool) -> tuple[Tensor, ...]:
    """y, h_n, c_n, c_all, with [0] in place of what is not there; and what backward needs, if that is to be kept."""
    plan = layer.plan(engine, backward=False)
    D, B, H, x = layer.D, layer.B, layer.H, layer.x
    none = x.new_empty(0, dtype=layer.compute)
    y = layer.output(D * H, x.dtype)
    h_n = layer.h0.clone()
    c_n = None if layer.c0 is None else layer.c0.clone()
    c_all = layer.output(D * H, layer.compute) if return_states and c_n is not None else None
    saved = c_before = kept = None
    if save:
        kept = x.new_empty(saved_sizes(layer.cell, layer.rows, D, H, x.dtype)[0], dtype=layer.compute)
        saved, c_before = layer.values(kept)
    gx = linear(x.view(layer.rows, x.shape[-1]), layer.matrix(0), layer.stacked(2))
    given = Forward(gx, layer.w_hh, layer.stacked(3), layer.h0, y, h_n, c_n, c_all, saved, c_before)
    constants = layer.constants(plan) | {"CELL": find_cell(layer.cell).forward}
    sizes = layer.T, B
    if plan.engine == "resident":
        launch(resident.forward, layer.tiles(plan), layer.sequence, given, *sizes, **constants)
    elif plan.engine == "grid":
        for first, last, counters in launches(layer, plan, 0, layer.longest):
            launch(grid.forward, layer.tiles(plan), layer.sequence, given, counters, first, last, *sizes, **constants)
    else:
        gh, h = x.new_empty(D, B, layer.gates, dtype=layer.compute), layer.h0.clone()
        if layer.sequence.resets is not None and layer.T > 0:
            h[0].masked_fill_(
                layer.sequence.resets[0][:, None], 0
            )  # an episode may start with direction 0's first step
        w = layer.factor().transpose(1, 2)
        for step in range(layer.longest):
            multiply_batch(gh, h, w)
            launch(stepwise.forward_step, layer.tiles(plan), layer.sequence, given, gh, h, step, *sizes, **constants)
    outputs = y, h_n, none if c_n is None else c_n, none.clone() if c_all is None else c_all
    return outputs if kept is None else (*outputs, kept)


def launches(layer: Layer, plan: Plan, first: int, last: int) -> list[tuple[int, int, Tensor | None]]:
    """The grid engine's launches in order: first step, last step + 1, counters; backward takes them from the end."""
    if plan.cooperative:
        shape = divide_up(layer.B, plan.rows), layer.D
        return [(first, last, layer.x.new_zeros(shape, dtype=torch.int32))]
    return [(step, step + 1, None) for step in range(first, last)]


def backward(
    layer: Layer,
    engine: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    y: Tensor,
    kept: Tensor,
    need_dx: bool,
    need_dh0: bool,
    need_dw: bool,
    clip: float,
) -> tuple[Tensor, ...]:
    """Gradients of x, h0, c0 and 8 weights; [0] in place of what is not wanted."""
    plan = layer.plan(engine, backward=True)
    D, B, H, x, rows = layer.D, layer.B, layer.H, layer.x, layer.rows
    compute, gates = layer.compute, layer.gates
    none = x.new_empty(0)

    def state(gradient: Tensor | None) -> Tensor:
        return layer.h0.new_zeros(D, B, H, dtype=compute) if gradient is None else gradient.to(compute, copy=True)

    h_before = x.new_empty(rows, D * H)
    tile_rows = 16
    launch(
        previous_h,
        (divide_up(layer.T * B, tile_rows), D),
        layer.sequence,
        layer.h0,
        y.contiguous(),
        h_before,
        layer.T,
        B,
        H=H,
        D=D,
        R=tile_rows,
        U=128,
        num_warps=4,
    )
    dgh = layer.output(D * gates, x.dtype)
    dgx = layer.output(D * gates, x.dtype) if layer.spec.split_gates else None
    dh0, dc0 = state(dh_n).contiguous(), None if layer.c0 is None else state(dc_n).contiguous()
    saved, c_before = layer.values(kept)
    given = Backward(
        layer.w_hh,
        None if dy is None else aligned(dy),
        None if dc_all is None else aligned(dc_all),
        saved,
        c_before,
        h_before,
        dgx,
        dgh,
        dh0,
        dc0,
    )
    constants = layer.constants(plan) | {"CELL": find_cell(layer.cell).backward, "CLIP": clip}
    sizes = layer.T, B
    if plan.engine == "resident":
        launch(resident.backward, layer.tiles(plan), layer.sequence, given, *sizes, **constants)
    elif plan.engine == "grid":
        for first, last, counters in reversed(launches(layer, plan, -1, layer.longest)):
            launch(grid.backward, layer.tiles(plan), layer.sequence, given, counters, first, last, *sizes, **constants)
    else:
        dgh_step, product = x.new_empty(D, B, gates), x.new_empty(D, B, H, dtype=compute)
        factor = layer.factor()
        for step in reversed(range(-1, layer.longest)):
            launch(
                stepwise.backward_step,
                layer.tiles(plan),
                layer.sequence,
                given,
                dgh_step,
                product,
                step,
                *sizes,
                **constants,
            )
            if step >= 0:
                multiply_batch(product, dgh_step, factor)

    dgh = dgh.view(rows, D * gates)
    dgx = dgh if dgx is None else dgx.view(rows, D * gates)
    if need_dw and layer.padded:  # padding of x may hold anything, and zero times NaN is NaN
        assert layer.sequence.lengths is not None
        steps = torch.arange(layer.T, device=x.device)[:, None]
        x = x.masked_fill((steps >= layer.sequence.lengths)[:, :, None], 0)
    dx = (dgx @ layer.matrix(0)).view(x.shape) if need_dx else none
    dw = []
    for i, w in enumerate(layer.weights):
        d, which = divmod(i, 4)
        if w is None or not need_dw:
            dw.append(none.clone())
            continue
        gradient = (dgx if which % 2 == 0 else dgh)[:, d * gates : (d + 1) * gates]  # [N, G*H]
        if which == 0:
            dw.append(gradient.t() @ x.view(rows, x.shape[-1]))
        elif which == 1:
            dw.append(gradient.t() @ h_before[:, d * H : (d + 1) * H])
        else:
            dw.append(gradient.sum(0))
    if not need_dh0:
        return dx, none.clone(), none.to(compute, copy=True), *dw
    return dx, dh0.to(x.dtype), none.to(compute, copy=True) if dc0 is None else dc0, *dw
