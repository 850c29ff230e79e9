"""Attention as an operator: the eager reference, fake kernels, autograd, and the function that picks who runs it.

C++ (`csrc/torch/attention.cpp`) defines the schemas and the CPU kernels:
  rnnkern::attention            has an autograd formula
  rnnkern::attention_inference  the same without one, which alone would cost microseconds per call
  rnnkern::attention_backward   every first gradient; its own gradient goes through the eager reference
rnnkern::cuda_attention and its kin (`csrc/torch/cuda_attention.cpp`) are the same on a GPU, or emulated; there
rnnkern::cuda_lengths brings lengths from the CPU. rnnkern::triton_attention and its kin are defined here, since nothing
of them is compiled before it runs.
The operators trust their input; `rnnkern.functional.attention` checks it.
"""

import contextlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rnnkern import _library
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops import _dispatch, _overrides, explain, onnx
from rnnkern.ops.lengths import copy_lengths
from rnnkern.triton import probe

Score = Literal["dot", "additive"]


def reference(
    query: Tensor,  # [B, Tq, D]
    key: Tensor,  # [B, Tk, D]
    value: Tensor,  # [B, Tk, Dv]
    vector: Tensor | None,  # [D], for the additive score
    lengths: Tensor | None,  # int64 [B]
    mask: Tensor | None,  # bool [B, Tk], True is padding
    score: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch: differentiable any number of times, any dtype and device; materialises every score.

    Low precision (bfloat16, float16) is computed in float32 and rounded at the end, under autocast too.

    Returns:
        context [B, Tq, Dv], weights [B, Tq, Tk]; both zero for a row without a valid key.
    """
    dtype, device = query.dtype, query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return reference(query, key, value, vector, lengths, mask, score, scale)
    query, key, value = (tensor.to(compute_dtype(dtype)) for tensor in (query, key, value))
    padding = mask
    if lengths is not None:
        padding = torch.arange(key.shape[1], device=key.device) >= lengths.to(key.device)[:, None]  # [B, Tk]
    if padding is not None:  # what is padding may hold anything, NaN too
        key = key.masked_fill(padding[..., None], 0)
        value = value.masked_fill(padding[..., None], 0)
    if vector is None:
        scores = scale * query @ key.transpose(1, 2)  # [B, Tq, Tk]
    else:
        scores = torch.tanh(query[:, :, None] + key[:, None]) @ vector.to(query.dtype)  # [B, Tq, Tk, A] on the way
    if padding is None:
        weights = scores.softmax(-1)
    else:
        nothing = padding.all(-1)[:, None, None]  # their softmax would be NaN, and so its gradient
        scores = scores.masked_fill(padding[:, None], -torch.inf).masked_fill(nothing, 0)
        weights = scores.softmax(-1).masked_fill(padding[:, None], 0)
    return (weights @ value).to(dtype), weights.to(dtype)


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    score: str,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    B, Tq, _ = query.shape
    Tk, Dv = value.shape[1:]
    return query.new_empty(B, Tq, Dv), query.new_empty((B, Tq, Tk) if need_weights else (0,))


def _fake_backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    score: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dvector = query.new_empty(0 if vector is None else vector.shape)
    return query.new_empty(query.shape), query.new_empty(key.shape), query.new_empty(value.shape), dvector


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.score, ctx.scale, ctx.need_weights = inputs[6:]
    ctx.save_for_backward(*inputs[:6])
    ctx.set_materialize_grads(False)


def _backward_by(operator: Any, ctx: Any, dcontext: Tensor | None, dweights: Tensor | None) -> tuple[Any, ...]:
    dweights = dweights if ctx.need_weights else None
    saved = ctx.saved_tensors  # may run hooks, such as a checkpoint's whole forward: not below autograd
    # Without this, every backward would enter the Python formula of its own gradient to find that nobody wants one.
    with contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
        grads = operator(dcontext, dweights, *saved, ctx.score, ctx.scale)
    needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:4]))
    return (*needed, None, None, None, None, None)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.score, ctx.scale = inputs[8:]
    ctx.save_for_backward(*inputs[:8])
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *dgrads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of `attention_backward`: the reference runs again, its gradient is taken twice.

    Every tensor enters through an alias of its own, so that key and value may be one tensor; the aliases keep the graph
    where it is wanted, which gives derivatives of any order.
    """
    *tensors, lengths, mask = ctx.saved_tensors  # dcontext, dweights, query, key, value, vector
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases: list[Any] = [
            None if t is None else t.view_as(t) if higher and t.requires_grad else t.detach().requires_grad_()
            for t in tensors
        ]
        cotangents, inputs = aliases[:2], aliases[2:]
        query, key, value, vector = inputs
        outputs = reference(query, key, value, vector, lengths, mask, ctx.score, ctx.scale)
        grads = _gradient(outputs, inputs, cotangents, create_graph=True)
        second = _gradient(grads, aliases, list(dgrads), create_graph=higher)
    return (*second, None, None, None, None)


def _gradient(outputs: Any, inputs: list[Any], cotangents: list[Any], *, create_graph: bool) -> list[Tensor | None]:
    """One entry per input; None where there is no input, no cotangent or no path."""
    pairs = [(o, g) for o, g in zip(outputs, cotangents) if o is not None and g is not None and o.requires_grad]
    wanted = [i for i in inputs if i is not None]
    if not pairs:
        return [None] * len(inputs)
    outs, grads = zip(*pairs)
    found = iter(torch.autograd.grad(outs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [None if i is None else next(found) for i in inputs]


class Operators(NamedTuple):
    """One device's: `apply` is `attention` with its registered formula, reached without the dispatcher's detour through
    Python. That halves the time of a short training call; tracers need the operator itself.
    """

    attention: Any
    inference: Any
    backward: Any
    apply: Any


def _register(prefix: str) -> Operators:
    operators = torch.ops.rnnkern
    attention, inference, backward = (
        getattr(operators, prefix + name).default for name in ("attention", "attention_inference", "attention_backward")
    )

    def attention_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return _backward_by(backward, ctx, *gradients)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                output: tuple[Tensor, Tensor] = attention(*inputs)
            _setup_attention(ctx, inputs, output)
            return output

        backward = staticmethod(attention_backward)

    torch.library.register_fake(f"rnnkern::{prefix}attention", _fake_attention)
    torch.library.register_fake(f"rnnkern::{prefix}attention_inference", _fake_attention)
    torch.library.register_fake(f"rnnkern::{prefix}attention_backward", _fake_backward)
    torch.library.register_autograd(f"rnnkern::{prefix}attention", attention_backward, setup_context=_setup_attention)
    torch.library.register_autograd(
        f"rnnkern::{prefix}attention_backward", _double_backward, setup_context=_setup_backward
    )
    return Operators(attention, inference, backward, Function.apply)


def _fake_lengths(lengths: Tensor, key: Tensor) -> Tensor:
    return key.new_empty(lengths.shape, dtype=torch.int64)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? vector, Tensor? lengths, Tensor? mask, str score, float scale"
)
_FORWARD = f"({_INPUTS}, bool need_weights) -> (Tensor context, Tensor weights)"
_BACKWARD = (
    f"(Tensor? dcontext, Tensor? dweights, {_INPUTS}) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dvector)"
)


def _triton_attention(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from rnnkern.triton import attention, launch  # which import Triton

    with launch.device_guard(query):
        return attention.attention(query, *rest)


def _triton_attention_backward(
    dcontext: Tensor | None, dweights: Tensor | None, query: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rnnkern.triton import attention, launch

    with launch.device_guard(query):
        return attention.attention_backward(dcontext, dweights, query, *rest)


for _name, _schema, _run in (
    ("triton_attention", _FORWARD, _triton_attention),
    ("triton_attention_inference", _FORWARD, _triton_attention),
    ("triton_attention_backward", _BACKWARD, _triton_attention_backward),
):
    torch.library.define(f"rnnkern::{_name}", _schema)
    torch.library.impl(f"rnnkern::{_name}", ("cuda", "xpu", "cpu"), _run)  # cpu: by Triton's interpreter

OPERATORS: dict[str, Operators] = {"triton": _register("triton_")}  # by backend
if _library.available:
    torch.library.register_fake("rnnkern::cuda_lengths", _fake_lengths)
    OPERATORS["cpu"] = _register("")
    OPERATORS["cuda"] = OPERATORS[_dispatch.EMULATED] = _register("cuda_")


def refusal(backend: str, device: torch.device, dtype: torch.dtype, transformed: bool) -> str:
    """Why the kernels of a backend cannot run this attention, "" if they can."""
    own = "cuda" if backend == "cuda" else "cpu"
    if backend != "triton" and device.type != own:
        return f"the tensors are on {device.type}, not on the {own}"
    if dtype not in _dispatch.KERNEL_DTYPES or (backend != "cpu" and dtype == torch.float64):
        return f"{dtype} is not supported by {backend} kernels"
    if transformed:
        return f"{_dispatch.TRANSFORMED} by {backend} kernels"
    return probe.refusal(device) if backend == "triton" else _library.missing_on(device)[backend]


def _choose(forced: str | None, device: torch.device, dtype: torch.dtype, transformed: bool) -> tuple[str, str]:
    """The backend, and why those before it were passed over; "eager" if none can run this."""
    if forced == "eager":
        return "eager", "forced"
    passed_over = ""
    for backend in (forced,) if forced else _dispatch.PREFERRED.get(device.type, ("cpu",)):
        why = refusal(backend, device, dtype, transformed)
        if not why:
            return backend, passed_over
        passed_over += f"; {why}" if passed_over else why
    return "eager", passed_over


def place_lengths(
    lengths: Tensor,  # int64 [B]
    key: Tensor,  # [B, Tk, D]
) -> Tensor:
    """Lengths on the device of the keys that they count.

    From the CPU they come to a GPU with a launch of ours; where there is none, with launches of torch's into a CUDA
    graph, which takes no copy from pageable memory, and else with a copy.

    Raises:
        RuntimeError: a length on the CPU is not within 0..Tk, and goes to a GPU, where nobody could tell.
    """
    device, compiling = key.device, torch.compiler.is_compiling()
    emulated = _dispatch.forced() == _dispatch.EMULATED
    if not lengths.is_cpu or (key.is_cpu and not emulated) or onnx.exporting():
        return lengths.to(device)
    if not compiling:  # a traced program cannot; there our operator checks, but nobody before a copy
        _check_range(lengths, key.shape[1])
    ours = key.is_cuda or key.is_cpu
    absent = not ours or _library.missing_on(device)["cuda" if key.is_cuda else _dispatch.EMULATED]
    if not absent and (compiling or not _dispatch.transformed()):
        placed: Tensor = torch.ops.rnnkern.cuda_lengths.default(lengths, key)
        return placed
    return copy_lengths(lengths, device)


def attend(
    query: Tensor,  # [B, Tq, D]
    key: Tensor,  # [B, Tk, D]
    value: Tensor,  # [B, Tk, Dv]
    *,
    score: Score,
    vector: Tensor | None = None,  # [D], for the additive score
    scale: float = 1.0,  # of the dot score
    lengths: Tensor | None = None,  # int64 [B], of `place_lengths`
    mask: Tensor | None = None,  # bool [B, Tk], True is padding
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over projected queries and keys, on the device's kernels or, where they cannot run, on the reference.

    Raises:
        RuntimeError: a length on the CPU is not within 0..Tk.
        rnnkern.BackendUnavailable: the backend that the caller forced cannot run this.
    """
    compiling = torch.compiler.is_compiling()
    # The kernel checks what a traced program cannot. Lengths on a GPU are not worth waiting for: it takes the nearest.
    if lengths is not None and not compiling and lengths.device.type == "cpu":
        _check_range(lengths, key.shape[1])
    exporting = onnx.exporting()
    forced = None if exporting else _dispatch.forced()  # what is exported runs on none of our backends
    transformed = not compiling and _dispatch.transformed()
    backend, why = _choose(forced, query.device, query.dtype, transformed)
    if exporting:
        backend, why = "eager", "ONNX has no such operator"
    if backend == "eager" and forced not in (None, "eager"):
        raise _dispatch.BackendUnavailable(f"backend {forced!r} cannot run {score} attention: {why}")
    if _overrides.count:  # `explain` may want to know
        explain.note(
            explain.AttentionNote,
            score,
            str(query.device),
            str(query.dtype),
            *query.shape[:2],
            key.shape[1],
            query.shape[2],
            value.shape[2],
            backend,
            "forced by rnnkern.backend" if forced else f"{why}: eager reference" if backend == "eager" else why,
        )
    if backend == "eager":
        if forced is None:
            _library.warn_if_missing(query.device)
        context, weights = reference(query, key, value, vector, lengths, mask, score, scale)
        return context, weights if need_weights else None
    tracing = torch._C._get_tracing_state() is not None
    if tracing:  # torch.jit.trace: the graph must serve with gradients, too
        onnx.refuse_torchscript()
    grad = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (vector is not None and vector.requires_grad)
    )
    operators = OPERATORS[backend]
    run = operators.inference
    if tracing or grad:
        run = operators.attention if tracing or compiling else operators.apply
    context, weights = run(query, key, value, vector, lengths, mask, score, scale, need_weights)
    return context, weights if need_weights else None


def _check_range(lengths: Tensor, Tk: int) -> None:
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):  # vmap lets nobody look but at all samples
        lengths = torch._C._functorch.get_unwrapped(lengths)
    values = lengths.flatten().tolist()
    if values and not 0 <= min(values) <= max(values) <= Tk:
        wrong = next(length for length in values if not 0 <= length <= Tk)
        raise RuntimeError(f"lengths: expected values in 0..{Tk}, the number of keys, got {wrong}")
