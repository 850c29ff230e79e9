"""Recurrent layers with int8 weights: how weights are rounded, the operators' fake kernels, and who runs a layer.

C++ (`csrc/torch/ops.cpp`) defines the schemas and the CPU kernels:
  rnnkern::layer_int8       forward alone; there is no gradient
  rnnkern::pack_int8        weights in the kernels' layout
Row r of a weight matrix stands for scale[r] * weight[r]. The kernels round each row of x, and each half of a row of h,
to 15 bits and a sign with a scale of its own at every step, multiply and add integers exactly, and keep all else,
biases and states too, in float32. The eager reference multiplies in float32 and rounds weights alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells import CELLS, reference
from rnnkern.ops import onnx
from rnnkern.ops._dispatch import select
from rnnkern.ops.formulas import Outputs, fake_inference
from rnnkern.ops.packs import PackCache, Weights
from rnnkern.ops.recurrence import _fake_pack, check_weights

# Of both directions: w_ih, w_hh, b_ih, b_hh; then scale_ih, scale_hh. Matrices are int8, all else is float32.
Int8Weights = Weights
LARGEST = 127


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a matrix to multiples of a 127th of its largest magnitude.

    Args:
        weight: float32 [R, K].

    Returns:
        int8 [R, K], -127 to 127
        float32 [R], the scales: row r stands for scale[r] * int8[r]

    Raises:
        ValueError: an element is infinite or NaN.
    """
    largest = weight.detach().abs().amax(dim=1)
    if not bool(largest.isfinite().all()):
        raise ValueError("weights that are infinite or NaN cannot be rounded to int8")
    scale = largest / LARGEST
    divisor = torch.where(scale > 0, scale, 1)
    return (weight.detach() / divisor[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def dequantized(weights: Int8Weights) -> Weights:
    """What the weights stand for: float32 w_ih, w_hh, b_ih, b_hh of both directions."""
    result = list(weights[:8])
    for matrix, scale in zip((0, 1, 4, 5), weights[8:]):
        rounded = result[matrix]
        if rounded is not None and scale is not None:
            result[matrix] = rounded.to(scale.dtype) * scale[:, None]
    return tuple(result)


def _fake_layer_int8(cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any) -> Outputs:
    return fake_inference(cell, x, h0, c0, *rest[:8], *rest[12:])  # without the scales


def _fake_pack_int8(cell: str, w_ih: Tensor, *rest: Any) -> Tensor:
    return _fake_pack(cell, w_ih.new_empty(0, dtype=torch.float32))


if _library.available:
    torch.library.register_fake("rnnkern::layer_int8", _fake_layer_int8)
    torch.library.register_fake("rnnkern::pack_int8", _fake_pack_int8)
    _layer_int8 = torch.ops.rnnkern.layer_int8.default


class Int8PackCache(PackCache):
    """Packed int8 weights. They seldom change, so they are packed when first seen, and kept for calls of any length."""

    def add(self, layer: int, key: list[Any], cell: str, weights: Int8Weights) -> Tensor:
        """Packs these weights."""
        packed: Tensor = torch.ops.rnnkern.pack_int8.default(cell, *weights)
        self._remember(layer, key, weights, packed)
        return packed


def recurrence_int8(
    cell: str,
    x: Tensor,  # float32 [T, B, I], or [N, I] of a PackedSequence
    h0: Tensor,  # [D, B, H]
    c0: Tensor | None,  # [D, B, H], for cells of two states
    weights: Int8Weights,
    *,
    lengths: Tensor | None = None,  # int64 [B] on the CPU
    resets: Tensor | None = None,  # bool [T, B]
    return_states: bool = False,
    projection: tuple[Tensor | None, ...] = (None, None),  # as `recurrence` has it; there is none
    packs: PackCache | None = None,
    layer: int = 0,  # which entry of `packs` is this layer's
) -> Outputs:
    """Runs one layer with int8 weights; arguments and results are those of `rnnkern.ops.recurrence.recurrence`.

    Raises:
        RuntimeError: a gradient is wanted; a weight or scale does not fit x in device, dtype or shape.
        rnnkern.BackendUnavailable: the backend that the caller forced cannot run this.
    """
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, h0, c0, *weights)]):
        raise RuntimeError(
            "layers with int8 weights have no gradient, but one is wanted of their input, state or biases. "
            "Call them under torch.no_grad() or torch.inference_mode(), or train the float module"
        )
    exporting = onnx.exporting()  # ONNX has no such operator: weights are multiplied out
    if exporting or select(cell, x, h0, False, lengths=lengths, int8=True) == "eager":
        check_weights(x, weights, cell, h0, h0, matrices=torch.int8)
        run = partial(onnx.layer, cell) if exporting else partial(reference.layer, CELLS[cell])
        return run(x, h0, c0, dequantized(weights), lengths=lengths, resets=resets, return_states=return_states)
    tracing = torch._C._get_tracing_state() is not None
    if tracing:
        onnx.refuse_torchscript()
    packed = key = None
    # A pack would be a constant of torch.jit.trace's graph, which is to read the module's weights.
    if packs is not None and not torch.compiler.is_compiling() and not tracing:
        key, packed = packs.find(layer, weights)
    if packed is None:  # a pack was checked when it was made
        check_weights(x, weights, cell, h0, h0, matrices=torch.int8)
        if packs is not None and key is not None:
            packed = packs.add(layer, key, cell, weights)
    result: Outputs = _layer_int8(cell, x, h0, c0, *weights, lengths, resets, return_states, packed)
    return result
