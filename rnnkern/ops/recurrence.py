"""The recurrent layer as an operator: fake kernels, autograd, and the function that picks who runs it.

C++ (`csrc/torch/ops.cpp`) defines the schemas and the CPU kernels:
  rnnkern::layer            forward, keeps what backward needs
  rnnkern::layer_inference  forward without an autograd formula, which alone would cost microseconds per call
  rnnkern::layer_backward   every first gradient; its own gradient goes through the eager reference
  rnnkern::pack             weights in the kernels' layout, for inference calls of few rows
The operators trust their input; `recurrence` checks the weights, `rnnkern.nn` the rest.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells import CELLS, find_cell, reference
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import onnx
from rnnkern.ops._dispatch import select
from rnnkern.ops.packs import NAMES, PackCache, Weights
from rnnkern.ops.short import FEW_ROWS, SHORT

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, h_n, c_n, c_all


def _fake_inference(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *rest: Any,  # the weights, lengths, resets, return_states, packed
) -> Outputs:
    return_states = rest[10]
    D, B, H = h0.shape
    two_states = len(CELLS[cell].states) == 2
    compute = compute_dtype(x.dtype)
    return (
        x.new_empty(*x.shape[:-1], D * H),
        x.new_empty(D, B, H),
        x.new_empty((D, B, H) if two_states else (0,), dtype=compute),
        x.new_empty((*x.shape[:-1], D * H) if two_states and return_states else (0,), dtype=compute),
    )


def _fake_layer(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, _, H = h0.shape
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    spec = CELLS[cell]
    kept = (H + 15) // 16 * 16 * (len(spec.saved) + len(spec.states) - 1)
    saved = x.new_empty(D * rows * kept, dtype=compute_dtype(x.dtype))
    return (*_fake_inference(cell, x, h0, c0, *rest), saved)


def _fake_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *rest: Any,  # the weights, lengths, resets, y, saved, need_dx, need_dh0, need_dw, perhaps grad_clip
) -> tuple[Tensor, ...]:
    weights, (need_dx, need_dh0, need_dw) = rest[:8], rest[12:15]
    compute = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        h0.new_empty(h0.shape if need_dh0 else (0,)),
        x.new_empty(0 if c0 is None or not need_dh0 else c0.shape, dtype=compute),
        *(x.new_empty(0 if w is None or not need_dw else w.shape) for w in weights),
    )


def _fake_pack(cell: str, w_ih: Tensor, *rest: Any) -> Tensor:
    return w_ih.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=compute_dtype(w_ih.dtype))


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.cell = inputs[0]
    y, _, c_n, c_all, saved = output
    ctx.save_for_backward(*inputs[1:14], y, saved)  # x to resets
    ctx.two_states = inputs[3] is not None
    ctx.every_state = ctx.two_states and inputs[14]
    ctx.grad_clip = inputs[15]
    ctx.mark_non_differentiable(saved, *(() if ctx.two_states else (c_n,)), *(() if ctx.every_state else (c_all,)))
    ctx.set_materialize_grads(False)


def _layer_backward(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc_all: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad  # cell, x, h0, c0, 8 weights, lengths, resets, return_states, grad_clip
    dc_n = dc_n if ctx.two_states else None  # AOTAutograd gives zeros of shape [0] here
    dc_all = dc_all if ctx.every_state else None
    saved = ctx.saved_tensors  # may run hooks, such as a checkpoint's whole forward: not below autograd
    # Without this, every backward would enter the Python formula of its own gradient to find that nobody wants one.
    with contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.rnnkern.layer_backward.default(
            ctx.cell, dy, dh_n, dc_n, dc_all, *saved, needed[1], any(needed[2:4]), any(needed[4:12]), ctx.grad_clip
        )
    return (None, *(grad if need else None for grad, need in zip(grads, needed[1:12])), None, None, None, None)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.cell = inputs[0]
    ctx.save_for_backward(*inputs[1:18])  # dy to resets: y and saved follow from them
    ctx.grad_clip = inputs[23]
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *dgrads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of `layer_backward`: the reference runs again, its gradient is taken twice.

    Every tensor enters through an alias of its own, so that one that is a function of another (tied weights, say)
    counts once; the aliases keep the graph where it is wanted, which gives derivatives of any order.
    """
    *tensors, lengths, resets = ctx.saved_tensors  # dy, dh_n, dc_n, dc_all, x, h0, c0, 8 weights
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            None if t is None else t.view_as(t) if higher and t.requires_grad else t.detach().requires_grad_()
            for t in tensors
        ]
        cotangents, inputs = aliases[:4], aliases[4:]
        x, h0, c0, *weights = inputs
        assert x is not None
        assert h0 is not None
        outputs = reference.layer(
            CELLS[ctx.cell],
            x,
            h0,
            c0,
            tuple(weights),
            lengths=lengths,
            resets=resets,
            return_states=cotangents[3] is not None,
            grad_clip=ctx.grad_clip,
        )
        first = grad_of(outputs, cotangents, inputs, create_graph=True)
        second = grad_of(first, dgrads, aliases, create_graph=higher)
    return (None, *second, None, None, None, None, None, None, None, None)


def grad_of(
    outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad` among lists with holes: no cotangent means zero, no dependence gives None."""
    pairs = [(o, g) for o, g in zip(outputs, cotangents) if o is not None and g is not None and o.requires_grad]
    wanted = [i for i in inputs if i is not None]
    if not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return [None if i is None else next(found) for i in inputs]


if _library.available:
    torch.library.register_fake("rnnkern::layer", _fake_layer)
    torch.library.register_fake("rnnkern::layer_inference", _fake_inference)
    torch.library.register_fake("rnnkern::layer_backward", _fake_backward)
    torch.library.register_fake("rnnkern::pack", _fake_pack)
    torch.library.register_autograd("rnnkern::layer", _layer_backward, setup_context=_setup_layer)
    torch.library.register_autograd("rnnkern::layer_backward", _double_backward, setup_context=_setup_backward)
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
        _setup_layer(ctx, inputs, output)
        return output

    backward = staticmethod(_layer_backward)


_apply_layer: Any = _Layer.apply


def check_lengths(lengths: Tensor, T: int, B: int) -> Tensor:
    """Returns lengths as an int64 tensor on the CPU, [B]; raises RuntimeError if one is not within 0..T.

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
    if exporting or select(cell, x, h0, projection[0] is not None) == "eager":
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
    if tracing or (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or h0.requires_grad
            or (c0 is not None and c0.requires_grad)
            or any([w is not None and w.requires_grad for w in weights])
        )
    ):
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
