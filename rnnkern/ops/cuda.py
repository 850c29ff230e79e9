"""The recurrent layer's operators on NVIDIA GPUs, and their emulation on the CPU: fake kernels and autograd.

`csrc/torch/cuda_layer.cpp` has the kernels: rnnkern::cuda_layer, rnnkern::cuda_layer_inference and
rnnkern::cuda_layer_backward are rnnkern::layer and its kin with two arguments more, the engine and whether products of
float32 may be TF32. `csrc/torch/cuda_step.cpp` has single steps in one launch, which know no gradients:
rnnkern::cuda_cell_step and rnnkern::cuda_attention_step.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import _dispatch, _overrides, onnx
from rnnkern.ops.formulas import (
    Outputs,
    backward_of_layer,
    double_backward,
    fake_backward,
    fake_inference,
    setup_backward,
    setup_layer,
)
from rnnkern.ops.packs import Weights


def _fake_layer(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = kept_elements(cell, x, h0.shape[0] * h0.shape[2])
    return (*fake_inference(cell, x, h0, c0, *rest), x.new_empty(kept, dtype=compute_dtype(x.dtype)))


def kept_elements(cell: str, x: Tensor, units: int) -> int:
    """Of the compute dtype: what forward keeps of a layer for backward."""
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    spec, compute = CELLS[cell], compute_dtype(x.dtype)
    values = rows * units * len(spec.saved) * x.element_size()  # bytes, in the storage type; c in the compute type
    return rows * units * (len(spec.states) - 1) + (values + compute.itemsize - 1) // compute.itemsize


def _layer_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return backward_of_layer(ctx, torch.ops.rnnkern.cuda_layer_backward.default, *gradients)


def _fake_cell_step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(h.shape), x.new_empty(0 if c is None else c.shape, dtype=compute_dtype(x.dtype))


def _fake_attention_step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    value = rest[6]
    return (*_fake_cell_step(cell, x, h, c), x.new_empty(value.shape[0], value.shape[2]))


if _library.available:
    torch.library.register_fake("rnnkern::cuda_cell_step", _fake_cell_step)
    torch.library.register_fake("rnnkern::cuda_attention_step", _fake_attention_step)
    torch.library.register_fake("rnnkern::cuda_layer", _fake_layer)
    torch.library.register_fake("rnnkern::cuda_layer_inference", fake_inference)
    torch.library.register_fake("rnnkern::cuda_layer_backward", fake_backward)
    torch.library.register_autograd("rnnkern::cuda_layer", _layer_backward, setup_context=setup_layer)
    torch.library.register_autograd("rnnkern::cuda_layer_backward", double_backward, setup_context=setup_backward)


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    resets: Tensor | None,
    return_states: bool,
    grad_clip: float,
    training: bool,  # whether a gradient may be asked for
) -> Outputs:
    """`rnnkern.ops.recurrence.recurrence` by the CUDA kernels.

    Raises:
        rnnkern.BackendUnavailable: the engine that the caller forced cannot run this.
    """
    inputs = (cell, x, h0, c0, *weights, lengths, resets, return_states)
    how = _dispatch.forced_engine(), _dispatch.tf32_allowed()
    if how[0] and not torch.compiler.is_compiling():
        for backward in (False, True) if training else (False,):
            _dispatch.cuda_plan(cell, x, h0, lengths, backward)
    if training:
        y, h_n, c_n, c_all, _ = torch.ops.rnnkern.cuda_layer.default(*inputs, grad_clip, *how)
        return y, h_n, c_n, c_all
    outputs: Outputs = torch.ops.rnnkern.cuda_layer_inference.default(*inputs, *how)
    return outputs


# Of a fused step. Its products run on plain FMA units: above this many rows two products on tensor cores and a kernel
# for the rest should take less, by arithmetic alone; nobody has measured it.
FUSED_ROWS = 32
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuses(cell: str, x: Tensor, H: int) -> bool:
    """Whether a step without gradients of rows x [B, ...] and H units is one launch on the backend that runs here."""
    if x.is_cpu and not _overrides.count:
        return False
    return (
        not _dispatch.forced_engine() and x.dtype in FUSED_DTYPES and x.shape[0] <= FUSED_ROWS and runs_here(cell, x, H)
    )


def runs_here(cell: str, x: Tensor, H: int, B: int | None = None) -> bool:
    """Whether these kernels, or their emulation, are what runs B rows of a layer of one direction on x here.

    None: x is of a single step.
    """
    if x.is_cpu and not _overrides.count:
        return False
    forced, compiling = _dispatch.forced(), torch.compiler.is_compiling()
    if forced not in (None, "cuda", _dispatch.EMULATED) or onnx.exporting():
        return False
    if not compiling and _dispatch.transformed():
        return False
    if forced is None and not compiling:  # a short call has no time to ask for the device's capability
        T, B = (1, x.shape[0]) if B is None else (_dispatch.steps_of(x, B), B)
        return _dispatch.choose_gpu(cell, x.device, x.dtype, T, B, H, 1).backend == "cuda"
    missing = _library.missing_on(x.device)
    return not _dispatch.refusal(forced or "cuda", cell, x.device.type, x.dtype, H, missing=missing)


class StepWorkspace(NamedTuple):
    """What the steps of a sequence keep from one launch of `attention_step` to the next; for one launch at a time."""

    counters: Tensor  # int32 [3 + B]: zero between launches
    scratch: Tensor  # float32: of one launch alone

    def fits(self, key: Tensor, value: Tensor) -> bool:
        """Whether it is one for steps that attend to these."""
        counters, scratch = _workspace_sizes(key, value)
        return self.counters.shape[0] == counters and self.scratch.shape[0] >= scratch


STEP_KEYS = 32  # keys of a part of a row: kStepKeys of csrc/cuda/step.h


def _workspace_sizes(key: Tensor, value: Tensor) -> tuple[int, int]:
    B, Tk, D = key.shape
    parts = max(1, -(-Tk // STEP_KEYS))
    return 3 + B, B * (D + parts * (value.shape[2] + 2))


def step_workspace(
    key: Tensor,  # [B, Tk, D]
    value: Tensor,  # [B, Tk, Dv]
) -> StepWorkspace:
    """A workspace for steps that attend to these."""
    counters, scratch = _workspace_sizes(key, value)
    return StepWorkspace(key.new_zeros(counters, dtype=torch.int32), key.new_empty(scratch, dtype=torch.float32))
