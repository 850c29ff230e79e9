"""What short calls past the dispatcher (`csrc/torch/short_call.cpp`) need of torch, and when they may not be made."""

from typing import Any

import torch
from torch.autograd import forward_ad

from rnnkern import _library
from rnnkern.ops import _overrides

SHORT = 16  # below this many steps calls go past the dispatcher, and weights are packed once for many of them
FEW_ROWS = 1024  # so are those of calls with fewer rows (steps times batch): to pack takes as long as 6 rows or so


def watched() -> bool:
    """Whether `rnnkern.backend` or `explain` is at work, or forward-mode differentiation."""
    return _overrides.count > 0 or forward_ad._current_level >= 0


# While one of these says anything but zero, someone wants to see or change what tensors do.
_WATCHERS = (
    torch.is_grad_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._is_any_autocast_enabled,
    watched,
)


def _connect() -> Any:
    """`_C.ShortCall`, or None where the kernels or torch's exchange API are missing."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _library.extension is None or api is None:
        return None
    connected = _library.extension.connect_torch(
        api, torch.Tensor, torch.nn.Parameter, torch._C._increment_version, _WATCHERS, SHORT
    )
    return _library.extension.ShortCall if connected else None


ShortCall: Any = _connect()
