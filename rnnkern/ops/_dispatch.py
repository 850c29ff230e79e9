"""The one place that chooses a backend: a pure function and a way to override it; `explain` shows what it chose."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from rnnkern import _library, triton
from rnnkern.cells import CELLS, EAGER_CELLS
from rnnkern.ops import _overrides
from rnnkern.ops.explain import LayerNote, both_passes, explaining, note
from rnnkern.triton import probe

BACKENDS = ("cpu", "cuda", "triton", "eager")  # in order of preference
EMULATED = "cuda-emulated"  # CUDA's kernels run by the CPU, for tests; chosen only by force
ENGINES = ("stepwise", "cluster", "grid")  # of the CUDA backend
TRITON_ENGINES = ("stepwise", "resident", "grid")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ENGINES_OF = {"cuda": ENGINES, EMULATED: ENGINES, "triton": TRITON_ENGINES}
# Those that may run on a type of device, best first; on others the refusal of the CPU's is worth telling.
PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}
TRANSFORMED = "torch.func transforms and forward-mode derivatives are not supported"


class BackendUnavailable(RuntimeError):
    """A backend forced by `rnnkern.backend` cannot run here; the message says why."""


class Choice(NamedTuple):
    """A backend, and why the ones before it were passed over."""

    backend: str
    why: str


def refusal(
    backend: str,
    cell: str,
    device: str,
    dtype: torch.dtype,
    H: int,
    *,
    projection: bool = False,
    transformed: bool = False,
    missing: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Why a backend cannot run a layer, "" if it can; the arguments are those of `choose`."""
    if backend == "eager":
        return ""
    own = "cuda" if backend == "cuda" else "cpu"
    if backend != "triton" and device != own:
        return f"the tensors are on {device}, not on the {own}"
    if projection:
        return f"proj_size is not supported by {backend} kernels"
    if dtype not in KERNEL_DTYPES and not (dtype == torch.int8 and backend == "cpu"):
        return f"{dtype} is not supported by {backend} kernels"
    if transformed:
        return f"{TRANSFORMED} by {backend} kernels"
    if cell in EAGER_CELLS:
        return (
            f"{cell} is not supported by {backend} kernels: they multiply by the recurrent weights before they know r"
        )
    if cell not in CELLS or (backend == "triton" and cell not in triton.CELLS):
        return f"cell {cell!r} is not supported by {backend} kernels"
    if H == 0:
        return f"a hidden size of zero is not supported by {backend} kernels"
    return missing.get(backend, "")


def choose(
    cell: str,
    device: str,
    dtype: torch.dtype,
    T: int,
    B: int,
    H: int,
    *,
    projection: bool = False,
    transformed: bool = False,
    forced: str | None = None,
    missing: Mapping[str, str] = MappingProxyType({}),
    seconds: Mapping[str, float] = MappingProxyType({}),
) -> Choice:
    """Chooses the backend for one layer from these facts alone, so that it can be tested for hardware that is not here.

    Args:
        cell: name of a cell, as `rnnkern.cells.find_cell` takes it.
        device: device type of the tensors, as in `torch.device.type`.
        dtype: dtype of the input, or torch.int8 for weights that are.
        T: time steps.
        B: batch size.
        H: hidden size.
        projection: whether the layer projects h (proj_size).
        transformed: whether a torch.func transform or forward-mode differentiation is active.
        forced: the backend that the user asks for, or None.
        missing: for each backend why its kernels are absent, "" if they are present.
        seconds: what the call took by each backend of this device, by recorded results: the fastest goes first. Empty:
            nothing is recorded, and the order is that of PREFERRED.

    Raises:
        BackendUnavailable: `forced` cannot run this.
    """
    order: Sequence[str] = (forced,) if forced else PREFERRED.get(device, ("cpu",))
    recorded: list[str] = []
    if seconds and not forced:
        order = sorted(order, key=lambda backend: seconds[backend])
        took = [f"{1e3 * seconds[backend]:.3g} ms" for backend in order]
        recorded.append(f"{order[0]} took {took[0]}, {order[1]} {took[1]} by the table of plans")
    passed_over: list[str] = []
    for backend in order:
        why = refusal(backend, cell, device, dtype, H, projection=projection, transformed=transformed, missing=missing)
        if not why:
            return Choice(backend, "forced by rnnkern.backend" if forced else "; ".join((*recorded, *passed_over)))
        if forced:
            raise BackendUnavailable(f"backend {forced!r} cannot run {cell}: {why}")
        passed_over.append(why)
    return Choice("eager", f"{'; '.join(passed_over)}: eager reference")


def _choose_here(cell: str, device: torch.device, dtype: torch.dtype, T: int, B: int, H: int, **facts: Any) -> Choice:
    """`choose` on this machine, where Triton is tried on a GPU when it would first run there."""
    missing = _library.missing_on(device)
    choice = choose(cell, device.type, dtype, T, B, H, missing=missing, **facts)
    if choice.backend == "triton" and (why := probe.refusal(device)):
        choice = choose(cell, device.type, dtype, T, B, H, missing={**missing, "triton": why}, **facts)
    return choice


@functools.lru_cache(maxsize=4096)
def _cached_choice(
    cell: str,
    device: torch.device,
    dtype: torch.dtype,
    T: int,
    B: int,
    H: int,
    projection: bool,
    recorded: tuple[int, bool, bool] | None = None,  # D, TF32, gradients: by recorded results; None: without
) -> Choice:
    """`choose` without an override; a short call spends half a microsecond here, not three."""
    seconds = {} if recorded is None else _recorded_seconds(cell, device, dtype, B, H, *recorded)
    return _choose_here(cell, device, dtype, T, B, H, projection=projection, seconds=seconds)


@functools.cache
def _has_records(device: torch.device) -> bool:
    """Whether recorded results may change what runs on a device; asked at every call that cuda would run."""
    if device.type != "cuda" or triton.reason:
        return False
    from rnnkern.triton import config

    return config.measured(device)


def _recorded_seconds(
    cell: str, device: torch.device, dtype: torch.dtype, B: int, H: int, D: int, tf32: bool, gradients: bool
) -> dict[str, float]:
    """What a layer took by cuda and by triton, by the user's table of plans; empty: it does not say."""
    from rnnkern.triton import config

    return config.measured_seconds(cell, dtype, H, B, D, tf32, config.facts_of(device), gradients)


def _records(device: torch.device, T: int, D: int) -> tuple[int, bool, bool] | None:
    """What else than its sizes says which results were recorded of a layer: D, TF32, gradients; None: none were.

    Of a single step none are: those that were measured have many, and for one the CUDA backend has other kernels.
    """
    whole = _overrides.get("whole")  # T and D of the layer of which this call is a segment: that one is trained
    T, D = whole or (T, D)
    gradients = whole is not None or torch.is_grad_enabled()
    return (D, tf32_allowed(), gradients) if T != 1 and _has_records(device) else None


def choose_gpu(
    cell: str, device: torch.device, dtype: torch.dtype, T: int, B: int, H: int, D: int, projection: bool = False
) -> Choice:
    """`choose` without an override, where cuda could run: recorded results may prefer triton."""
    return _cached_choice(cell, device, dtype, T, B, H, projection, _records(device, T, D))


def absence(backend: str) -> str:
    """Why a backend can run nothing here, "" if it can."""
    device = "cuda" if backend == "cuda" else "cpu"
    if backend == "triton" and not triton.interprets():
        device = next((kind for kind in ("cuda", "xpu") if torch.get_device_module(kind).is_available()), device)
    why = refusal(backend, "lstm", device, torch.float32, 1, missing=_library.missing_on(torch.device(device)))
    if backend == "triton":
        if device == "cpu" and not triton.reason and not triton.interprets():
            return f"torch {torch.__version__} finds no GPU; {why}"
        return why or probe.refusal(torch.device(device))
    return "torch finds no GPU" if not why and device == "cuda" and not torch.cuda.is_available() else why


@contextmanager
def backend(name: str, *, engine: str | None = None) -> Iterator[None]:
    """Forces a backend ("eager", "cpu", "triton", "cuda") for the layers that this thread runs inside the block.

    "cuda-emulated" runs the CUDA kernels on the CPU, for tests: right, and thousands of times slower.

    Args:
        name: the backend.
        engine: of the backends "cuda" and "triton": "stepwise" (a product and a kernel for each step) or "grid" (one
            kernel for all steps, recurrent weights on the chip), "cluster" of "cuda" (the same, within clusters of
            blocks) and "resident" of "triton" (within single blocks); None: the library chooses for each pass.

    Raises:
        ValueError: there is no backend or engine of that name.
        BackendUnavailable: it can run nothing here; inside the block: it cannot run that layer.

    Example:
        >>> import torch, rnnkern
        >>> with rnnkern.backend("eager"):
        ...     y, h_n = rnnkern.nn.GRU(3, 4)(torch.ones(5, 2, 3))
    """
    if name not in (*BACKENDS, EMULATED):
        raise ValueError(f"backend must be one of {', '.join(sorted((*BACKENDS, EMULATED)))}, got {name!r}")
    if engine is not None and engine not in _ENGINES_OF.get(name, ()):
        raise ValueError(
            f"engine must be one of {', '.join(ENGINES)} with backend 'cuda', of {', '.join(TRITON_ENGINES)} with "
            f"'triton'; got {engine!r} with {name!r}"
        )
    if name == EMULATED:
        _library.load_emulated()
    why = absence(name)
    if why:
        raise BackendUnavailable(f"backend {name!r} cannot run: {why}")
    with _overrides.Override("forced", name), _overrides.Override("engine", engine):
        yield


def forced() -> str | None:
    """The backend that this thread forces, or None."""
    return _overrides.get("forced")  # type: ignore[no-any-return]


def forced_engine() -> str:
    """The engine that this thread forces, or ""."""
    return _overrides.get("engine") or ""


def tf32_allowed() -> bool:
    """Whether the cluster and grid engines may multiply float32 as TF32: torch's setting for cuDNN's recurrent layers.

    Products that are left to torch follow its setting for those; torch has none for a single product.
    """
    return bool(torch.backends.cudnn.rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


def cuda_plan(
    cell: str,
    x: torch.Tensor,
    h0: torch.Tensor,  # [D, B, H]
    lengths: torch.Tensor | None,  # int64 [B] on the CPU; not None for packed rows
    backward: bool,
) -> str:
    """The CUDA engine that runs a pass, and what it takes of the GPU.

    Raises:
        BackendUnavailable: the engine that this thread forces cannot run it.
    """
    with _refused(cell):
        plan: str = torch.ops.rnnkern.cuda_plan(cell, x, h0, lengths, forced_engine(), tf32_allowed(), backward)
    return plan


def cuda_stack_plan(
    cell: str,
    x: torch.Tensor,
    h0: torch.Tensor,  # [L, B, H]
    lengths: torch.Tensor | None,
    chunks: int,
    backward: bool,
) -> str:
    """The same of a stack of layers: also whether they run as a wavefront, and in how many chunks of time."""
    how = forced_engine(), tf32_allowed()
    with _refused(cell):
        plan: str = torch.ops.rnnkern.cuda_stack_plan(cell, x, h0, lengths, *how, chunks, backward)
    return plan


@contextmanager
def _refused(cell: str) -> Iterator[None]:
    """What the planner refuses is raised as BackendUnavailable."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        if "cannot run: " not in why:  # what the device said
            raise
        raise BackendUnavailable(f"{cell}: {why}") from None


def triton_plan(cell: str, x: torch.Tensor, h0: torch.Tensor, backward: bool) -> str:
    """The engine of Triton that runs a pass of a layer, and how it cuts the layer.

    Raises:
        BackendUnavailable: the engine that this thread forces cannot run it.
    """
    from rnnkern.triton import config

    D, B, H = h0.shape
    try:
        facts = config.facts_of(x.device)
        return str(config.plan(cell, x.dtype, H, B, D, forced_engine(), tf32_allowed(), facts, backward))
    except RuntimeError as error:
        raise BackendUnavailable(f"{cell}: {error}") from None


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def steps_of(x: torch.Tensor, B: int) -> int:
    """T of x [T, B, I]. Of a PackedSequence's data [N, I] it is not known here: their mean, rounded up."""
    return x.shape[0] if x.dim() == 3 else -(-x.shape[0] // max(B, 1))


def select(
    cell: str,
    x: torch.Tensor,
    h0: torch.Tensor,
    projection: bool,
    fused: bool = False,
    lengths: torch.Tensor | None = None,
    int8: bool = False,
) -> str:
    """The backend of a call on x [T, B, I] and h0 [D, B, H]: what `choose` says under this thread's override.

    `int8`: the weights are; kernels differ.

    For `explain`: `fused` tells of a step that is one launch of its own, `lengths` decide which engine runs.
    """
    D, B, H = h0.shape
    I = x.shape[-1]
    T = x.shape[0] if x.dim() == 3 else -(-x.shape[0] // max(B, 1))  # `steps_of`, and a call less
    device, dtype = x.device, torch.int8 if int8 else x.dtype
    compiling = torch.compiler.is_compiling()
    changed = not compiling and transformed()
    if _overrides.count == 0 and not compiling and not changed:
        choice = _cached_choice(cell, device, dtype, T, B, H, projection)
        if choice.backend == "cpu":
            return "cpu"
        if choice.backend == "cuda" and (records := _records(device, T, D)) is not None:
            choice = _cached_choice(cell, device, dtype, T, B, H, projection, records)
    else:
        # A traced program is to serve batches of any size: results, which are recorded of some, do not count for it.
        records = None if compiling else _records(device, T, D)
        choice = _choose_here(
            cell,
            device,
            dtype,
            T,
            B,
            H,
            projection=projection,
            transformed=changed,
            forced=forced(),
            seconds={} if records is None else _recorded_seconds(cell, device, dtype, B, H, *records),
        )
        if explaining():
            engine = ""
            if choice.backend in ("cuda", EMULATED):
                plan = functools.partial(cuda_plan, cell, x, h0, lengths)
                engine = "one launch" if fused else both_passes(plan, dtype, choice.backend)
            elif choice.backend == "triton":
                engine = both_passes(functools.partial(triton_plan, cell, x, h0), dtype, choice.backend)
            note(LayerNote, cell, str(device), str(dtype), T, B, I, H, D, choice.backend, choice.why, engine)
    if choice.backend == "eager":
        _library.warn_if_missing(device)
    return choice.backend
