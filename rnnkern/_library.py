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
