"""Whether Triton can run kernels on a GPU: one that does nothing is compiled and launched before the first of ours.

Triton may be installed and yet run nothing: it wants a C compiler for what calls its kernels, the driver's library, a
folder for its cache, and a driver and a GPU that know the code that it makes.
"""

import contextlib
import threading

import torch

from rnnkern import triton

OLDEST_NVIDIA = (8, 0)  # where Triton compiles products for older ones, an assertion of its compiler ends the process


def error_line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nothing(n):  # type: ignore[no-untyped-def]  # a kernel
    """Takes a number, so that it is launched like any other."""


def _launch(device: torch.device) -> None:
    """Compiles and launches `nothing`, or takes it from Triton's cache."""
    import triton as compiler

    from rnnkern.triton.launch import launch

    on_device = contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with on_device:
        launch(compiler.jit(nothing), (1,), 2)


def _probe(device: torch.device) -> str | None:
    """Why nothing runs, "" if it does; None: nothing can be tried, since a CUDA graph is captured."""
    try:
        if device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < OLDEST_NVIDIA:
                needed, has = (".".join(map(str, version)) for version in (OLDEST_NVIDIA, capability))
                return f"Triton's kernels need compute capability {needed}, {device} has {has}"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _launch(device)
    except Exception as error:  # whatever Triton, its compilers and the driver raise
        return f"Triton does not run on {device}: {error_line(error)}"
    return ""


_found: dict[torch.device, str] = {}
_lock = threading.Lock()


def refusal(device: torch.device) -> str:
    """Why Triton's kernels do not run on a device, "" if they do: found out once in a process.

    Raises:
        RuntimeError: a CUDA graph is captured, and Triton has not been tried yet: a graph cannot take what is compiled
            and loaded at a first call, and nothing may be launched that is not to be in it.
    """
    if why := triton.missing_on(device.type):
        return why
    if device.index is None and device.type != "cpu":
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    if device not in _found:
        with _lock:
            found = _found[device] if device in _found else _probe(device)
            if found is None:
                raise RuntimeError(
                    "a CUDA graph is captured, and Triton's kernels are compiled at their first call: run the model "
                    "once before the capture, as torch.cuda.graph asks for"
                )
            _found[device] = found
    return _found[device]


# As in rnnkern.ops.onnx: Dynamo is to call this, not to look into it.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def known_refusal(device: torch.device) -> str:
    """`refusal` as far as it was found out."""
    return _found.get(device, "")
