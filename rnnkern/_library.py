"""Loads the compiled kernels: operators (librnnkern.so, into torch.ops.rnnkern) and _C (build facts, ISA choice).

The emulated CUDA kernels, for tests, are a library of their own, librnnkern_emulated.so, loaded when asked for.
"""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

_PATH = Path(__file__).with_name("librnnkern.so")
_EMULATED_PATH = Path(__file__).with_name("librnnkern_emulated.so")


def _load() -> tuple[ModuleType | None, str]:
    """Returns _C and why it is missing ("" if it is not)."""
    if not _PATH.exists():
        return None, f"{_PATH.name} is not built (run `make build` or `pip install .`)"
    try:
        torch.ops.load_library(_PATH)  # type: ignore[no-untyped-call]
        return importlib.import_module("rnnkern._C"), ""
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"{_PATH.name} does not load: {error}"


extension, reason = _load()  # rnnkern._C, or None and why
available = extension is not None


def _missing_cuda() -> str:
    if not available:
        return reason
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("rnnkern::cuda_layer", "CUDA")
    return "" if has_kernels else "this build has no CUDA kernels: nvcc was not found, or not wanted"


# Why the kernels of a backend are not here, "" if they are.
missing = {"cpu": reason, "cuda": _missing_cuda(), "cuda-emulated": "the emulated kernels are not loaded"}
_warned = False


def missing_on(device: torch.device) -> dict[str, str]:
    """`missing`, for tensors on a device."""
    if device.type == "cuda" and not missing["cuda"] and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return {**missing, "cuda": f"the CUDA kernels need compute capability 8.0, {device} has {major}.{minor}"}
    return missing


def load_emulated() -> None:
    """Loads the emulated CUDA kernels, unless that was done; `missing` says whether it went well."""
    if not missing["cuda-emulated"]:
        return
    if not available:
        missing["cuda-emulated"] = reason
    elif not _EMULATED_PATH.exists():
        missing["cuda-emulated"] = f"{_EMULATED_PATH.name} is not built (run `make build`)"
    else:
        torch.ops.load_library(_EMULATED_PATH)  # type: ignore[no-untyped-call]
        missing["cuda-emulated"] = ""


def warn_if_missing() -> None:
    """Says once that the compiled kernels are missing: the eager reference is far slower than torch.nn."""
    global _warned
    if available or _warned:
        return
    _warned = True
    warnings.warn(f"rnnkern runs its slow eager reference: {reason}", RuntimeWarning, stacklevel=2)


def empty_cache() -> None:
    """Returns to the system the memory that the CPU kernels keep for coming calls, as torch.cuda.empty_cache does.

    Large gradients and what backward needs come from a pool, since fresh memory costs more than most kernels. What no
    tensor uses stays there, at most until it and what is in use reach the most that ever was in use.

    Example:
        >>> import torch, rnnkern
        >>> rnnkern.nn.GRU(64, 256)(torch.ones(100, 32, 64))[0].sum().backward()
        >>> rnnkern.empty_cache()
    """
    if extension is not None:
        extension.release_pool()
