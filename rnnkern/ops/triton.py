"""The recurrent layer's operators by Triton's kernels: schemas, fake kernels and autograd.

rnnkern::triton_layer, rnnkern::triton_layer_inference and rnnkern::triton_layer_backward take and give what
rnnkern::cuda_layer and its kin do. They are defined here, since nothing of them is compiled before it runs; the kernels
are imported at the first call.
"""

from typing import Any

import torch
from torch import Tensor

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

_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_LAYER = (
    f"str cell, {{}}Tensor x, Tensor h0, Tensor? c0, {_WEIGHTS}, Tensor? w_ih_reverse, Tensor? w_hh_reverse, "
    "Tensor? b_ih_reverse, Tensor? b_hh_reverse, Tensor? lengths, Tensor? resets, "
)
_ENGINE = "str engine, bool tf32"
_GRADIENTS = ", ".join(
    f"Tensor d{name}"
    for name in ("x", "h0", "c0", *(w + s for s in ("", "_reverse") for w in ("w_ih", "w_hh", "b_ih", "b_hh")))
)
_DEVICES = ("cuda", "xpu", "cpu")  # cpu: by Triton's interpreter


def _kernels() -> Any:
    from rnnkern.triton import launch, layer

    return launch, layer


def _forward(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, rest: list[Any], engine: str, tf32: bool, save: bool
) -> tuple[Tensor, ...]:
    *weights, lengths, resets, return_states = rest
    launch, layers = _kernels()
    with launch.device_guard(x):
        layer = layers.Layer(cell, x, h0, c0, tuple(weights), lengths, resets, tf32)
        outputs: tuple[Tensor, ...] = layers.forward(layer, engine, return_states, save)
        return outputs


def _layer(cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, _, engine, tf32 = rest  # grad_clip is for backward
    return _forward(cell, x, h0, c0, inputs, engine, tf32, save=True)


def _layer_inference(cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, engine, tf32 = rest
    return _forward(cell, x, h0, c0, inputs, engine, tf32, save=False)


def _layer_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *weights, lengths, resets, y, saved, need_dx, need_dh0, need_dw, clip, engine, tf32 = rest
    launch, layers = _kernels()
    with launch.device_guard(x):
        layer = layers.Layer(cell, x, h0, c0, tuple(weights), lengths, resets, tf32)
        wanted = need_dx, need_dh0, need_dw
        gradients: tuple[Tensor, ...] = layers.backward(layer, engine, dy, dh_n, dc_n, dc_all, y, saved, *wanted, clip)
        return gradients


def _fake_layer(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, layers = _kernels()
    D, _, H = h0.shape
    outputs = fake_inference(cell, x, h0, c0, *rest)
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    kept, _ = layers.saved_sizes(cell, rows, D, H, x.dtype)
    return (*outputs, x.new_empty(kept, dtype=outputs[2].dtype))


def _autograd_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return backward_of_layer(ctx, torch.ops.rnnkern.triton_layer_backward.default, *gradients)


_OUTPUTS = "Tensor y, Tensor h_n, Tensor c_n, Tensor c_all"
for _name, _schema, _run, _fake in (
    (
        "triton_layer",
        f"({_LAYER.format('')}bool return_states, float grad_clip, {_ENGINE}) -> ({_OUTPUTS}, Tensor saved)",
        _layer,
        _fake_layer,
    ),
    (
        "triton_layer_inference",
        f"({_LAYER.format('')}bool return_states, {_ENGINE}) -> ({_OUTPUTS})",
        _layer_inference,
        fake_inference,
    ),
    (
        "triton_layer_backward",
        f"({_LAYER.format('Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, ')}Tensor y, Tensor saved, "
        f"bool need_dx, bool need_dh0, bool need_dw, float grad_clip, {_ENGINE}) -> ({_GRADIENTS})",
        _layer_backward,
        fake_backward,
    ),
):
    torch.library.define(f"rnnkern::{_name}", _schema)
    torch.library.impl(f"rnnkern::{_name}", _DEVICES, _run)
    torch.library.register_fake(f"rnnkern::{_name}", _fake)
torch.library.register_autograd("rnnkern::triton_layer", _autograd_backward, setup_context=setup_layer)
torch.library.register_autograd("rnnkern::triton_layer_backward", double_backward, setup_context=setup_backward)


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
    """`rnnkern.ops.recurrence.recurrence` by Triton's kernels.

    Raises:
        rnnkern.BackendUnavailable: the engine that the caller forced cannot run this.
    """
    inputs = (cell, x, h0, c0, *weights, lengths, resets, return_states)
    how = _dispatch.forced_engine(), _dispatch.tf32_allowed()
    if how[0] and not torch.compiler.is_compiling():
        _dispatch.triton_plan(cell, x, h0, backward=False)
    if training:
        y, h_n, c_n, c_all, _ = torch.ops.rnnkern.triton_layer.default(*inputs, grad_clip, *how)
        return y, h_n, c_n, c_all
    outputs: Outputs = torch.ops.rnnkern.triton_layer_inference.default(*inputs, *how)
    return outputs
