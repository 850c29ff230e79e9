"""Loads the compiled kernels: operators (librnnkern.so, into torch.ops.rnnkern) and _C (build facts, ISA choice)."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

_PATH = Path(__file__).with_name("librnnkern.so")


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
_warned = False


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
