"""Tensors that a step writes in place, where the kernels do not do it themselves: checked, then copied into."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def named_state(hx: Any) -> dict[str, Tensor]:
    """The tensors of a state, by the names that messages give them."""
    if hx is None:
        return {}
    return {"hx": hx} if isinstance(hx, Tensor) else {f"hx[{i}]": hx[i] for i in range(len(hx))}


def write_step(
    named_weights: Callable[[], Iterable[tuple[str, Tensor]]],  # what the step reads besides its arguments
    input: Tensor,
    hx: Any,
    state: Any,
    inplace: bool,
    y: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """Writes what a step was asked to: the new state into hx, y into `out`; nothing unless all can be written.

    Raises:
        TypeError: `out` is not a tensor, or hx not a pair of tensors where the state is one.
        ValueError: there is no state to write.
        RuntimeError: `out` has another shape than y; what `write` raises.
    """
    written: dict[str, Tensor] = {}
    values: list[Tensor] = []
    if out is not None and y is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"out must be a tensor, got {type(out).__name__}")
        if out.shape != y.shape:
            raise RuntimeError(f"out must have shape {list(y.shape)}, got {list(out.shape)}")
        written["out"] = out
        values.append(y)
    if inplace:
        if hx is None:
            raise ValueError("inplace=True needs a state to write: hx must not be None")
        if not isinstance(state, Tensor) and not (isinstance(hx, tuple | list) and len(hx) == len(state)):
            raise TypeError(f"inplace=True writes into hx: it must be a pair of tensors, got {type(hx).__name__}")
        written |= named_state(hx)
        values += [state] if isinstance(state, Tensor) else state
    if written:
        write(written, {"input": input} | named_state(hx) | dict(named_weights()), values)


def write(
    written: dict[str, Tensor],
    read: dict[str, Tensor],
    values: Sequence[Tensor],  # of the shapes of `written`
) -> None:
    """Copies the values into the tensors.

    Raises:
        RuntimeError: one of them is not plain memory of its own, apart from what the step reads; gradients are wanted.
    """
    if any([value.requires_grad for value in values]):
        raise RuntimeError(
            f"{' and '.join(written)} cannot be written in place while gradients are wanted. "
            "Call step under torch.no_grad() or torch.inference_mode()"
        )
    for (name, tensor), value in zip(written.items(), values, strict=True):
        if tensor.requires_grad:
            raise RuntimeError(f"{name} requires grad and cannot be written in place")
        if tensor.device != value.device:
            raise RuntimeError(f"{name} must be on the device of the result, {value.device}, got {tensor.device}")
        if tensor.dtype != value.dtype:
            raise RuntimeError(f"{name} must have the dtype of the result. Expected {value.dtype}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous to be written in place, got strides {tensor.stride()}")
        for other, its in (written | read).items():
            if other != name and _overlap(tensor, its):
                raise RuntimeError(f"{name} cannot be written in place: it shares memory with {other}")
    for tensor, value in zip(written.values(), values):
        if torch.compiler.is_compiling() or not tensor.is_inference():
            tensor.copy_(value)
        else:  # torch wants to be in that mode again, but nothing can have saved such a tensor
            with torch.inference_mode():
                tensor.copy_(value)


def _overlap(a: Tensor, b: Tensor) -> bool:
    plain = (Tensor, torch.nn.Parameter)
    if torch.compiler.is_compiling() or type(a) not in plain or type(b) not in plain or not a.is_cpu or not b.is_cpu:
        return False  # no addresses to look at
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    return a_begin < b_end and b_begin < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one past the last."""
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size() if tensor.numel() else begin
