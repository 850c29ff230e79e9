"""A linear layer and its cross entropy as one operator, which never holds the logits of all rows.

    z_n = W x_n + b
    loss_n = lse(z_n) - (1 - e) z_n[y_n] - e mean(z_n),   0 where y_n is the ignored index
    dz_n = s_n (softmax(z_n) - (1 - e) onehot(y_n) - e / V),   s_n the gradient of loss_n

Rows go by in chunks. Of each chunk the logits are one product, their softmax turns them into dz in place, and dx = dz W
and dW += dz^T x are two products more. All products are torch's; what differs between devices is the step in between:
torch's softmax in `cross_entropy.py`, one kernel in `rnnkern/triton/linear_cross_entropy.py`.

What backward keeps. A loss that is summed over the rows has one gradient g for all of them: the gradients of the sum
are made in the forward pass, while the softmax is at hand, and backward multiplies them by g. That is 6 N D V floating
point operations, as many as torch needs with all logits in memory, for N D + D V values kept. Losses that stay apart
have gradients s_n known in backward only: nothing is kept, and backward computes the logits again, 8 N D V.

A chunk's rows depend on V alone, and each weight gradient is a sum over chunks in float32 (float64 for float64), in
order. Products have the dtype of the input, as `torch.nn.functional.linear` has them; the softmax is float32.

Operators, for the CPU and (prefix triton_) for GPUs; they trust their input, `rnnkern.functional` checks it:
  rnnkern::linear_cross_entropy            the loss of each row
  rnnkern::linear_cross_entropy_gradients  the (weighted) sum of losses, and its gradients
Derivatives of gradients go through `reference`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rnnkern import _library
from rnnkern.cells.reference import compute_dtype, without_autocast
from rnnkern.ops import _dispatch, _overrides, explain, onnx
from rnnkern.ops.cross_entropy import softmax
from rnnkern.ops.formulas import grad_of
from rnnkern.ops.products import widens
from rnnkern.triton import probe

# Turns a chunk's logits [R, V] into dz, if gradients are wanted, adds its sum over rows to dbias, if there is one, and
# gives the losses [R] in the compute dtype:
# (logits, target [R], scale [R] or None for ones, ignore_index, smoothing, gradients, dbias [V] or None) -> losses
Softmax = Callable[[Tensor, Tensor, Tensor | None, int, float, bool, Tensor | None], Tensor]


class Kind(NamedTuple):
    """What the devices differ in."""

    softmax: Softmax
    chunk: int  # bytes of a chunk's logits, about
    rows: int  # of a chunk at least: fewer make slow products
    selects: bool  # whether ignored rows are left out, which makes a GPU wait
    stride: int  # rows of logits start at multiples of so many values


def reference(
    input: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    target: Tensor,  # int64 [N]
    ignore_index: int,
    smoothing: float,
    reduction: str = "none",
) -> Tensor:
    """The loss in plain PyTorch, which holds all logits: differentiable any number of times, on any device."""
    with without_autocast(input.device.type):
        logits = functional.linear(input, weight, bias).to(compute_dtype(input.dtype))
        return functional.cross_entropy(
            logits, target, ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction
        )


def chunk_rows(kind: Kind, V: int, dtype: torch.dtype) -> int:
    """Rows of a chunk."""
    return max(kind.rows, kind.chunk // (V * dtype.itemsize))


# 16 MiB of logits stay in most CPUs' last-level cache between the product and the softmax. Each chunk reads and writes
# the weight's gradient and packs the weight: with fewer than 256 rows that would show. Nothing lies between rows:
# torch's softmax would copy them.
CPU = Kind(softmax, chunk=2**24, rows=256, selects=True, stride=1)


def _run(
    kind: Kind,
    scale: Tensor | None,  # [N]
    input: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    ignore_index: int,
    smoothing: float,
    needed: tuple[bool, ...],  # gradients of input, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N] and weight gradients in the compute dtype, dinput in the input's; [0] for gradients not needed."""
    (N, D), V = input.shape, weight.shape[0]
    compute, gradients = compute_dtype(input.dtype), any(needed)
    losses = input.new_zeros(N, dtype=compute)
    dinput = input.new_zeros((N, D) if needed[0] else 0)
    dweight = input.new_zeros((V, D) if needed[1] else 0, dtype=compute)
    dbias = input.new_zeros(V if needed[2] else 0, dtype=compute)
    kept = None  # rows that count, None: all
    if kind.selects:
        kept = (target != ignore_index).nonzero()[:, 0]
        kept = None if len(kept) == N else kept
        _check_targets(target if kept is None else target[kept], V)
    count = N if kept is None else len(kept)
    rows = min(chunk_rows(kind, V, input.dtype), count)
    buffer = input.new_empty(rows, -(-V // kind.stride) * kind.stride)[:, :V]
    with without_autocast(input.device.type):
        for start in range(0, count, max(rows, 1)):
            part: Any = slice(start, min(start + rows, count))
            part = part if kept is None else kept[part]
            x, y = input[part], target[part]
            logits = buffer[: len(x)]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)
            s = None if scale is None else scale[part]
            total = dbias if needed[2] else None
            losses[part] = kind.softmax(logits, y, s, ignore_index, smoothing, gradients, total)
            if needed[0]:
                dinput[part] = logits @ weight
            if needed[1]:
                _add_product(dweight, logits.t(), x)
    return losses, dinput, dweight, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, for a total in the compute dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif widens(a):
        total += torch.mm(a, b, out_dtype=total.dtype)
    elif a.dtype == torch.bfloat16:
        total += a @ b
    else:  # float16 might overflow
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _check_targets(target: Tensor, V: int) -> None:
    """torch's exception for a class that is not there."""
    outside = target[(target < 0) | (target >= V)]
    if len(outside):
        raise IndexError(f"Target {outside[0].item()} is out of bounds.")


class Operators(NamedTuple):
    """One device's."""

    losses: Any
    gradients: Any


_LOSSES = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float label_smoothing) -> Tensor"
)
_GRADIENTS = (
    "(Tensor? scale, Tensor input, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float label_smoothing, bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)


def register(prefix: str, kind: Kind) -> Operators:
    """Defines both operators for one kind of device: kernels, fake kernels, autograd."""

    def losses_kernel(
        input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float
    ) -> Tensor:
        return _run(kind, None, input, weight, bias, target, ignore_index, smoothing, (False, False, False))[0]

    def gradients_kernel(
        scale: Tensor | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        smoothing: float,
        *needed: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses, dinput, dweight, dbias = _run(kind, scale, input, weight, bias, target, ignore_index, smoothing, needed)
        return losses.sum() if scale is None else losses @ scale, dinput, dweight, dbias

    for name, schema, kernel, fake in (
        ("linear_cross_entropy", _LOSSES, losses_kernel, _fake_losses),
        ("linear_cross_entropy_gradients", _GRADIENTS, gradients_kernel, _fake_gradients),
    ):
        torch.library.define(f"rnnkern::{prefix}{name}", schema)
        torch.library.impl(f"rnnkern::{prefix}{name}", "default", kernel)
        torch.library.register_fake(f"rnnkern::{prefix}{name}", fake)
    operators = Operators(
        *(getattr(torch.ops.rnnkern, f"{prefix}linear_cross_entropy{name}").default for name in ("", "_gradients"))
    )

    def backward_of_losses(ctx: Any, dlosses: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[:3]
        _, *found = operators.gradients(dlosses, *ctx.saved_tensors, *ctx.options, *needed)
        dtype = ctx.saved_tensors[0].dtype
        return (*(d.to(dtype) if need else None for d, need in zip(found, needed)), None, None, None)

    torch.library.register_autograd(operators.losses, backward_of_losses, setup_context=_setup_losses)
    torch.library.register_autograd(operators.gradients, _backward_of_gradients, setup_context=_setup_gradients)
    return operators


def _fake_losses(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape[0], dtype=compute_dtype(input.dtype))


def _fake_gradients(
    scale: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    *needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = compute_dtype(input.dtype)
    return (
        input.new_empty((), dtype=compute),
        input.new_empty(input.shape if needed[0] else 0),
        input.new_empty(weight.shape if needed[1] else 0, dtype=compute),
        input.new_empty(weight.shape[0] if needed[2] else 0, dtype=compute),
    )


def _setup_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _setup_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.options, ctx.needed = inputs[5:7], inputs[7:]
    ctx.set_materialize_grads(False)


def _backward_of_gradients(ctx: Any, g: Tensor | None, *dgradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The sum's gradients are there; those of the gradients, and of the scale, go through the reference."""
    scale, input, weight, bias, target, *found = ctx.saved_tensors
    nothing = (None,) * 6  # target, options, needed
    if not ctx.needs_input_grad[0] and all(d is None for d in dgradients):
        needed = ctx.needs_input_grad[1:4]
        dtype = input.dtype
        return (
            None,
            *((g * d).to(dtype) if g is not None and need else None for d, need in zip(found, needed)),
            *nothing,
        )
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that one tensor in two places counts once in each; they keep the graph where it is wanted.
        aliases: list[Any] = [
            None if t is None else t.view_as(t) if higher and t.requires_grad else t.detach().requires_grad_()
            for t in (scale, input, weight, bias)
        ]
        factors, *inputs = aliases
        losses = reference(*inputs, target, *ctx.options)  # type: ignore[call-arg]
        total = losses.sum() if factors is None else losses @ factors
        gradients = grad_of([total], [torch.ones_like(total)], inputs, create_graph=True)
        cotangents = [d.to(input.dtype) if d is not None and n else None for d, n in zip(dgradients, ctx.needed)]
        second = grad_of([total, *gradients], [g, *cotangents], aliases, create_graph=higher)
    return (*(s if need else None for s, need in zip(second, ctx.needs_input_grad)), *nothing)


def _triton_softmax(logits: Tensor, *arguments: Any) -> Tensor:
    from rnnkern.triton.linear_cross_entropy import softmax as softmax_rows

    *options, dbias = arguments
    losses = softmax_rows(logits, *options)
    if dbias is not None:
        dbias += logits.sum(0, dtype=dbias.dtype)
    return losses


# 128 MiB: see rnnkern/triton/linear_cross_entropy.py. A GPU reads several values at a time from where rows start.
TRITON = Kind(_triton_softmax, chunk=2**27, rows=256, selects=False, stride=16)
KINDS = {"cpu": CPU, "triton": TRITON}
OPERATORS = {"cpu": register("", CPU), "triton": register("triton_", TRITON)}


def linear_cross_entropy(
    input: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    target: Tensor,  # int64 [N]
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> Tensor:
    """The loss in the compute dtype, [N] or [], by what is best here.

    Raises:
        IndexError: a target on the CPU that is not ignored is not within 0..V-1.
        rnnkern.BackendUnavailable: the backend that the caller forced cannot run this.
    """
    backend, why = _choose(input, weight)
    if _overrides.count:  # `explain` may want to know
        N, (V, D) = input.shape[0], weight.shape
        rows = 0 if backend == "eager" else chunk_rows(KINDS[backend], V, input.dtype)
        explain.note(explain.LossNote, str(input.device), str(input.dtype), N, V, D, backend, why, rows)
    if backend == "eager":
        return reference(input, weight, bias, target, ignore_index, smoothing, reduction)
    operators = OPERATORS[backend]
    tensors = (input, weight, bias)
    needed = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]
    loss: Tensor
    if reduction != "none" and any(needed):
        loss = operators.gradients(None, *tensors, target, ignore_index, smoothing, *needed)[0]
    else:
        loss = operators.losses(*tensors, target, ignore_index, smoothing)  # [N]
        loss = loss if reduction == "none" else loss.sum()
    if reduction == "mean":
        count = (target != ignore_index).sum()
        # Not a division by zero, whose gradient would be NaN; torch's is zero.
        loss = torch.where(count > 0, loss / count.clamp(min=1), torch.nan)
    return loss


def _choose(input: Tensor, weight: Tensor) -> _dispatch.Choice:
    """Who runs this, and why; "eager" is the reference.

    There is nothing for "cuda" to do here: forcing it leaves the choice as it is.
    """
    compiling = torch.compiler.is_compiling()
    forced = _dispatch.forced()
    few = not compiling and _few(input.device.type, input.dtype, input.shape[0], weight.shape[0])
    if few and forced is None:
        return _FEW
    if onnx.exporting() or torch._C._get_tracing_state() is not None:
        return _dispatch.Choice("eager", "what is traced or exported keeps torch's operators")
    if not compiling and _dispatch.transformed():
        return _dispatch.Choice("eager", f"{_dispatch.TRANSFORMED}: eager reference")
    device = input.device
    backend = forced if forced in ("cpu", "triton") else "cpu" if device.type == "cpu" else "triton"
    why = refusal(backend, device, input.dtype)
    if why and forced == backend:
        raise _dispatch.BackendUnavailable(f"backend {backend!r} cannot run linear_cross_entropy: {why}")
    if forced == "eager":
        return _dispatch.Choice("eager", "forced by rnnkern.backend")
    if why:
        if not few:
            _library.warn_if_missing(device)
        return _dispatch.Choice("eager", f"{why}: eager reference")
    if few and forced != backend:
        return _FEW
    return _dispatch.Choice(backend, "forced by rnnkern.backend" if forced == backend else "")


_FEW = _dispatch.Choice("eager", "few logits: torch's two functions")


def _few(device: str, dtype: torch.dtype, N: int, V: int) -> bool:
    """Whether chunks gain nothing: torch holds all logits, and keeps the softmax for backward.

    Of 16 bits the reference has copies in float32, which are a loss earlier than float32's own logits.
    """
    limit = 2**20 if device == "cpu" and dtype.itemsize == 2 else 2**22
    return N <= 256 or limit >= N * V


def refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run this, "" if it can."""
    if backend == "cpu":
        return "" if device.type == "cpu" else f"the tensors are on {device.type}, not on the cpu"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is not supported by triton kernels"
    return probe.refusal(device)
