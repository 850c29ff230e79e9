"""The recurrent layer as an operator: fake kernels, autograd, and the function that picks who runs it.

C++ (`csrc/torch/ops.cpp`) defines the schemas and the CPU kernels:
  rnnkern::layer            forward, keeps what backward needs
  rnnkern::layer_inference  forward without an autograd formula, which alone would cost microseconds per call
  rnnkern::layer_backward   every first gradient; its own gradient goes through the eager reference
  rnnkern::pack             weights in the kernels' layout, for inference calls of few rows
The operators trust their input; `recurrence` checks the weights, `rnnkern.nn` the rest.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells import CELLS, find_cell, reference
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import cuda, onnx, triton
from rnnkern.ops._dispatch import select
from rnnkern.ops.formulas import (
    Outputs,
    backward_of_layer,
    double_backward,
    fake_backward,
    fake_inference,
    setup_backward,
    setup_layer,
)
from rnnkern.ops.packs import NAMES, PackCache, Weights
from rnnkern.ops.short import FEW_ROWS, SHORT


def _fake_layer(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, _, H = h0.shape
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    spec = CELLS[cell]
    kept = (H + 15) // 16 * 16 * (len(spec.saved) + len(spec.states) - 1)
    saved = x.new_empty(D * rows * kept, dtype=compute_dtype(x.dtype))
    return (*fake_inference(cell, x, h0, c0, *rest), saved)


def _fake_pack(cell: str, w_ih: Tensor, *rest: Any) -> Tensor:
    return w_ih.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=compute_dtype(w_ih.dtype))


def _layer_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return backward_of_layer(ctx, torch.ops.rnnkern.layer_backward.default, *gradients)


if _library.available:
    torch.library.register_fake("rnnkern::layer", _fake_layer)
    torch.library.register_fake("rnnkern::layer_inference", fake_inference)
    torch.library.register_fake("rnnkern::layer_backward", fake_backward)
    torch.library.register_fake("rnnkern::pack", _fake_pack)
    torch.library.register_autograd("rnnkern::layer", _layer_backward, setup_context=setup_layer)
    torch.library.register_autograd("rnnkern::layer_backward", double_backward, setup_context=setup_backward)
    _layer = torch.ops.rnnkern.layer.default
    _layer_inference = torch.ops.rnnkern.layer_inference.default


class _Layer(torch.autograd.Function):
    """`rnnkern::layer` with its registered formula, reached without the dispatcher's detour through Python.

    Halves the time of a short training call; tracers need the operator itself.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _layer(*inputs)
        setup_layer(ctx, inputs, output)
        return output

    backward = staticmethod(_layer_backward)


_apply_layer: Any = _Layer.apply


def check_lengths(lengths: Tensor, T: int, B: int) -> Tensor:
    """Returns lengths as an int64 tensor on the CPU, [B]; raises RuntimeError if one is not within 0..T.

    There they decide what is launched, so that those on a GPU have to be waited for. While a CUDA graph is captured
    that cannot be: RuntimeError says so.

    Under `torch.compile` only the kernels look at the values, with the same exception.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.dim() != 1 or lengths.shape[0] != B:
        raise RuntimeError(f"lengths must have one entry per row. Expected shape [{B}], got {list(lengths.shape)}")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise RuntimeError(f"lengths must be integers. Expected torch.int64, got {lengths.dtype}")
    if lengths.device.type == "meta":
        raise RuntimeError("lengths must hold values, got a tensor on the meta device")
    if lengths.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "lengths must be on the CPU while a CUDA graph is captured, which keeps their values; "
            f"got a tensor on {lengths.device}"
        )
    lengths = lengths.detach().to("cpu", torch.int64)
    if B > 0 and not torch.compiler.is_compiling():  # a traced program cannot look at values: the kernels refuse
        values = lengths
        while torch._C._functorch.is_functorch_wrapped_tensor(values):  # vmap lets nobody look but at all samples
            values = torch._C._functorch.get_unwrapped(values)
        low, high = (int(v) for v in values.aminmax())
        if low < 0 or high > T:
            raise RuntimeError(f"lengths must be within 0 and the number of steps {T}, got {low if low < 0 else high}")
    return lengths.contiguous()


def check_weights(
    x: Tensor, weights: Weights, cell: str, gates: Tensor, recurrent: Tensor, matrices: torch.dtype | None = None
) -> None:
    """Raises RuntimeError, in torch's words where it has some, unless the weights fit x.

    The last sizes of `gates` and `recurrent` are H and that of the recurrent input; only with a projection they differ.
    `matrices` is the dtype of weight matrices, if not that of x; scale_ih and scale_hh of each direction may follow.
    """
    rows = len(find_cell(cell).gates) * gates.shape[-1]
    names = (*NAMES, "scale_ih", "scale_hh")
    shapes = ((rows, x.shape[-1]), (rows, recurrent.shape[-1]), (rows,), (rows,), (rows,), (rows,))
    for at, w in enumerate(weights):
        if w is None:
            continue
        i = at % 4 if at < 8 else 4 + at % 2
        if w.device != x.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, "
                f"found input tensor at {x.device} and parameter tensor at {w.device}"
            )
        if i < 2 and matrices is not None:
            if w.dtype != matrices:
                raise RuntimeError(f"{names[i]} must be rounded. Expected {matrices}, got {w.dtype}")
        elif w.dtype != x.dtype:
            raise RuntimeError(f"{names[i]} must have the dtype of input. Expected {x.dtype}, got {w.dtype}")
        if w.shape != shapes[i]:
            raise RuntimeError(f"{names[i]} must have shape {list(shapes[i])}, got {list(w.shape)}")


def recurrence(
    cell: str,
    x: Tensor,  # [T, B, I], or [N, I] of a PackedSequence
    h0: Tensor,  # [D, B, H], or [D, B, P] with a projection
    c0: Tensor | None,  # [D, B, H] in the compute dtype, for cells of two states
    weights: Weights,
    *,
    lengths: Tensor | None = None,  # int64 [B] on the CPU
    resets: Tensor | None = None,  # bool [T, B]
    return_states: bool = False,
    projection: tuple[Tensor | None, ...] = (None, None),  # w_hr of each direction, [P, H]
    packs: PackCache | None = None,
    layer: int = 0,  # which entry of `packs` is this layer's
    grad_clip: float = 0.0,
) -> Outputs:
    """Runs one layer in one or both directions on the backend that `rnnkern.ops._dispatch.choose` names.

    The meaning of every argument and result is that of `rnnkern.cells.reference.layer`; h0's first size tells whether
    there is a reverse direction. Without gradients and for few rows the weights' packed form comes from `packs`; any
    other backend and a call with gradients empty it.

    Raises:
        RuntimeError: a weight does not fit x in device, dtype or shape.
        rnnkern.BackendUnavailable: the backend that the caller forced cannot run this.
    """
    exporting = onnx.exporting()
    chosen = "onnx" if exporting else select(cell, x, h0, projection[0] is not None, lengths=lengths)
    if chosen in ("onnx", "eager"):
        if packs is not None:
            packs.forget()  # this call may be one with gradients
        check_weights(x, weights, cell, h0 if c0 is None else c0, h0)
        run = partial(onnx.layer, cell) if exporting else partial(reference.layer, find_cell(cell), grad_clip=grad_clip)
        return run(
            *(x, h0, c0, weights),
            projection=projection,
            lengths=lengths,
            resets=resets,
            return_states=return_states,
        )
    tracing = torch._C._get_tracing_state() is not None
    if tracing:  # torch.jit.trace: the graph must serve with and without gradients
        onnx.refuse_torchscript()
    training = tracing or (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or h0.requires_grad
            or (c0 is not None and c0.requires_grad)
            or any([w is not None and w.requires_grad for w in weights])
        )
    )
    if chosen != "cpu":
        check_weights(x, weights, cell, h0, h0)
        run_layer = triton.layer if chosen == "triton" else cuda.layer
        return run_layer(cell, x, h0, c0, weights, lengths, resets, return_states, grad_clip, training)
    if training:
        if packs is not None:
            packs.forget()  # an optimizer may follow that changes the weights without a trace
        check_weights(x, weights, cell, h0, h0)
        call = _layer if tracing or torch.compiler.is_compiling() else _apply_layer
        y, h_n, c_n, c_all, _ = call(cell, x, h0, c0, *weights, lengths, resets, return_states, grad_clip)
        return y, h_n, c_n, c_all
    packed = key = None
    if (
        packs is not None
        and not torch.compiler.is_compiling()  # before any size is looked at: the program is to serve all of them
        and (x.shape[0] < SHORT or x.shape[0] * (x.shape[1] if x.dim() == 3 else 1) < FEW_ROWS)
    ):
        key, packed = packs.find(layer, weights)
    if packed is None:  # a pack was checked when it was made
        check_weights(x, weights, cell, h0, h0)
        if packs is not None and key is not None:
            packed = packs.add(layer, key, cell, weights)
    result: Outputs = _layer_inference(cell, x, h0, c0, *weights, lengths, resets, return_states, packed)
    return result
