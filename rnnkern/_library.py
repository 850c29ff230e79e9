"""Loads the compiled kernels: operators (librnnkern.so, into torch.ops.rnnkern) and _C (build facts, ISA choice).

The emulated CUDA kernels, for tests, are a library of their own, librnnkern_emulated.so, loaded when asked for.
"""

import functools
import importlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from rnnkern import triton
from rnnkern.triton import probe

_PATH = Path(__file__).with_name("librnnkern.so")
_EMULATED_PATH = Path(__file__).with_name("librnnkern_emulated.so")
_LEFT_OUT = Path(__file__).with_name("without_extension")  # setup.py puts it into wheels of Python alone
# What these sources call. A library that was built of older ones lacks some.
OPERATORS = (
    *("layer", "layer_inference", "layer_backward", "layer_int8", "pack", "pack_int8"),
    *("attention", "attention_inference", "attention_backward"),
    *("cuda_layer", "cuda_layer_inference", "cuda_layer_backward", "cuda_plan"),
    *("cuda_stack", "cuda_stack_inference", "cuda_stack_backward", "cuda_stack_plan"),
    *("cuda_attention", "cuda_attention_inference", "cuda_attention_backward"),
    *("cuda_cell_step", "cuda_attention_step", "cuda_lengths"),
)
_BUILD_FACTS = ("version", "compiler", "optimized", "cuda")


def _lacking(extension: ModuleType) -> str:
    """What the library lacks of what these sources need, "" if nothing."""
    facts = extension.build_info()
    for name in OPERATORS:
        if not hasattr(torch.ops.rnnkern, name):
            return f"the operator {name}"
    return next((f"the build fact {name}" for name in _BUILD_FACTS if name not in facts), "")


def _load() -> tuple[ModuleType | None, str]:
    """Returns _C and why it is missing ("" if it is not)."""
    if _LEFT_OUT.exists():
        return None, "rnnkern was installed without compiled kernels (RNNKERN_EXTENSION=0)"
    if not _PATH.exists():
        return None, f"{_PATH.name} is not built (run `make build` or `pip install .`)"
    try:
        torch.ops.load_library(_PATH)  # type: ignore[no-untyped-call]
        extension = importlib.import_module("rnnkern._C")
        lacking = _lacking(extension)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"{_PATH.name} does not load: {error}"
    if lacking:
        return None, f"{_PATH.name} is of another version, without {lacking} (run `make build` or `pip install .`)"
    return extension, ""


extension, reason = _load()  # rnnkern._C, or None and why
available = extension is not None
# What the CUDA kernels were compiled for: sm_NN is machine code, compute_NN is PTX, which drivers compile.
cuda_code: tuple[str, ...] = () if extension is None else tuple(extension.build_info()["cuda"].split())


def _missing_cuda() -> str:
    if not available:
        return reason
    return "" if cuda_code else "this build has no CUDA kernels: nvcc was not found, or not wanted"


def runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code compiled for an architecture.

    Machine code runs on the same major version from its own minor version on, PTX on all later GPUs; but that of sm_90a
    and compute_90a on 9.0 alone, and of sm_100f and its like on its family, the GPUs of one major version.

    Source: CUDA C++ programming guide, "Compute Capabilities", "Feature Set Compiler Targets".
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)
    if match is None:
        raise ValueError(f"code must be named like sm_80, sm_90a or compute_100, got {code!r}")
    kind, suffix = match[1], match[4]
    compiled = int(match[2]), int(match[3])
    if suffix == "a":
        return capability == compiled
    if kind == "sm" or suffix == "f":
        return capability[0] == compiled[0] and capability >= compiled
    return capability >= compiled


def unsupported(code: Sequence[str], device: str, capability: tuple[int, int]) -> str:
    """Why a GPU runs none of the CUDA kernels of a build, "" if it does."""
    if any(runs_on(each, capability) for each in code):
        return ""
    has = f"{device} has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, {has}"
    return (
        f"the CUDA kernels were compiled for {', '.join(code)}, {has} "
        f"(build with CMAKE_ARGS=-DRNNKERN_CUDA_ARCHITECTURES={capability[0]}{capability[1]})"
    )


# Why the kernels of a backend are not here, "" if they are.
missing = {"cpu": reason, "cuda": _missing_cuda(), "cuda-emulated": "the emulated kernels are not loaded"}
_warned: set[str] = set()


@functools.cache
def _no_code_on_gpu(code: tuple[str, ...], index: int) -> str:
    if not torch.cuda.is_available():
        return ""
    return unsupported(code, f"cuda:{index}", torch.cuda.get_device_capability(index))


def _no_code_on(code: tuple[str, ...], index: int | None) -> str:
    """`unsupported` of the GPU of that index, or of the current one; asked once, since every call of a layer asks."""
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _no_code_on_gpu(code, index)


# As in rnnkern.ops.onnx: Dynamo is to call this, not to put the question for the capability into the graph.
_no_code_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def missing_on(device: torch.device) -> dict[str, str]:
    """`missing`, for tensors on a device."""
    missing_here = {**missing, "triton": triton.missing_on(device.type)}
    if device.type == "cuda" and not missing["cuda"]:
        missing_here["cuda"] = _no_code_on(cuda_code, device.index)
    return missing_here


def load_emulated() -> None:
    """Loads the emulated CUDA kernels, unless that was done; `missing` says whether it went well."""
    if not missing["cuda-emulated"]:
        return
    if not available:
        missing["cuda-emulated"] = reason
    elif not _EMULATED_PATH.exists():
        missing["cuda-emulated"] = f"{_EMULATED_PATH.name} is not built (run `make build`)"
    else:
        try:
            torch.ops.load_library(_EMULATED_PATH)  # type: ignore[no-untyped-call]
            missing["cuda-emulated"] = ""
        except (OSError, RuntimeError) as error:
            missing["cuda-emulated"] = f"{_EMULATED_PATH.name} does not load: {error}"


def warn_if_missing(device: torch.device) -> None:
    """Says once that the CPU's kernels are missing, or that Triton fails: the reference is far slower than torch.nn.

    Not that a GPU has no kernels because nobody installed any: that is what `info` and `explain` tell.
    """
    why = reason if device.type == "cpu" else probe.known_refusal(device)
    if why and why not in _warned:
        _warned.add(why)
        warnings.warn(f"rnnkern runs its slow eager reference: {why}", RuntimeWarning, stacklevel=2)


warn_if_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
