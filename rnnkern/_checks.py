"""What functions and modules ask of tensors that they are given, and the dtype that autocast reads them in."""

import torch
from torch import Tensor


def check_tensor(name: str, tensor: object) -> None:
    """Raises TypeError unless it is a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")


def check_kind(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """Raises unless dtype (autocast's, where it is on) and device are those of the other."""
    if tensor.dtype != other.dtype and autocast_dtype(tensor) != autocast_dtype(other):
        raise RuntimeError(f"{name}: expected dtype {other.dtype} of {other_name}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise RuntimeError(f"{name}: expected device {other.device} of {other_name}, got {tensor.device}")


def autocasts(tensor: Tensor) -> bool:
    """Whether torch.autocast is on for the device of this tensor, and casts it: any float but float64."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device, dtype = tensor.device.type, tensor.dtype
    return (
        dtype.is_floating_point
        and dtype != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that torch's own products would read the tensor in: autocast's where it casts, else the tensor's."""
    return torch.get_autocast_dtype(tensor.device.type) if autocasts(tensor) else tensor.dtype
