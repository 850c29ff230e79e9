"""The recurrent layer's operators on NVIDIA GPUs, and their emulation on the CPU: fake kernels and autograd.

`csrc/torch/cuda_layer.cpp` has the kernels: rnnkern::cuda_layer, rnnkern::cuda_layer_inference and
rnnkern::cuda_layer_backward are rnnkern::layer and its kin with two arguments more, the engine and whether products of
float32 may be TF32.
"""

from typing import Any

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import _dispatch
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
    D, _, H = h0.shape
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    spec, compute = CELLS[cell], compute_dtype(x.dtype)
    values = D * rows * H * len(spec.saved) * x.element_size()  # bytes, in the storage type; c in the compute type
    kept = D * rows * H * (len(spec.states) - 1) + (values + compute.itemsize - 1) // compute.itemsize
    return (*fake_inference(cell, x, h0, c0, *rest), x.new_empty(kept, dtype=compute))


def _layer_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return backward_of_layer(ctx, torch.ops.rnnkern.cuda_layer_backward.default, *gradients)


if _library.available:
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
            _dispatch.cuda_plan(cell, x, h0, backward)
    if training:
        y, h_n, c_n, c_all, _ = torch.ops.rnnkern.cuda_layer.default(*inputs, grad_clip, *how)
        return y, h_n, c_n, c_all
    outputs: Outputs = torch.ops.rnnkern.cuda_layer_inference.default(*inputs, *how)
    return outputs
