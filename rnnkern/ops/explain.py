"""What `rnnkern.explain` tells: which backend ran each layer, attention and loss, and why."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rnnkern import _library
from rnnkern.ops import _overrides


@dataclass(frozen=True)
class LayerNote:
    """What ran one layer, and why."""

    cell: str
    device: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    D: int
    backend: str
    why: str
    engine: str = ""  # of a GPU backend, with what it takes of the GPU; of both passes where these may differ

    def __str__(self) -> str:
        shape = f"T={self.T} B={self.B} I={self.I} H={self.H} D={self.D}"
        why = f" ({self.why})" if self.why else ""
        engine = f", {self.engine}" if self.engine else ""
        return f"{self.cell} {shape} {self.dtype.removeprefix('torch.')} {self.device}: {self.backend}{why}{engine}"


@dataclass(frozen=True)
class AttentionNote:
    """What ran one attention, and why."""

    score: str
    device: str
    dtype: str
    B: int
    Tq: int
    Tk: int
    D: int  # size of a projected query
    Dv: int
    backend: str
    why: str

    def __str__(self) -> str:
        shape = f"B={self.B} Tq={self.Tq} Tk={self.Tk} D={self.D} Dv={self.Dv}"
        why = f" ({self.why})" if self.why else ""
        return f"{self.score} attention {shape} {self.dtype.removeprefix('torch.')} {self.device}: {self.backend}{why}"


@dataclass(frozen=True)
class LossNote:
    """What ran one `linear_cross_entropy`, and why."""

    device: str
    dtype: str
    N: int
    V: int
    D: int
    backend: str
    why: str
    rows: int  # of a chunk at most, 0: all logits at once

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        chunks = f", {self.rows} rows at a time" if self.rows else ", all logits at once"
        shape = f"N={self.N} V={self.V} D={self.D}"
        dtype = self.dtype.removeprefix("torch.")
        return f"linear_cross_entropy {shape} {dtype} {self.device}: {self.backend}{why}{chunks}"


_NOTHING_RAN = (
    "no recurrent layer, attention or linear_cross_entropy of rnnkern ran "
    "(modules of torch.nn run torch's kernels unless rnnkern.accelerate(model) or rnnkern.enable() was called)"
)


@dataclass(frozen=True)
class Explanation:
    """What `explain` saw: a note per recurrent layer, attention or loss as they ran, and facts of the CPU kernels."""

    layers: tuple[LayerNote | AttentionNote | LossNote, ...]
    isa: str  # instruction set of the CPU kernels, "" if they are not loaded
    threads: int
    missing: str = field(default="")  # why the CPU kernels are not loaded

    def __str__(self) -> str:
        kernels = f"isa {self.isa}" if self.isa else f"not loaded, {self.missing}"
        lines = [f"{i}: {note}" for i, note in enumerate(self.layers)] or [_NOTHING_RAN]
        return "\n".join([*lines, f"cpu kernels: {kernels}; threads: {self.threads}"])


def explaining() -> bool:
    """Whether `explain` is at work in this thread."""
    return _overrides.get("notes") is not None


def note(kind: Callable[..., Any], *facts: Any) -> None:
    """Tells `explain`, if it is at work in this thread, what runs."""
    notes = _overrides.get("notes")
    if notes is not None:
        notes.append(kind(*facts))


def both_passes(plan: Callable[..., str], dtype: torch.dtype, backend: str) -> str:
    """For `explain`: plan(backward=False), where gradients are enabled plan(backward=True), and how float32 fares."""
    engine = plan(backward=False)
    if torch.is_grad_enabled():
        engine += f"; backward: {plan(backward=True)}"
    if dtype == torch.float32 and backend == "cuda":
        settings = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
        engine += f"; {float32_products(engine, *(place.fp32_precision for place in settings))}"
    return engine


def float32_products(engine: str, rnn: str, matmul: str) -> str:
    """How a layer of float32 is multiplied on a GPU, for `explain`, from what the engines are and torch's settings.

    Args:
        engine: of each pass, as `cuda_plan` describes it.
        rnn: torch.backends.cudnn.rnn.fp32_precision.
        matmul: torch.backends.cuda.matmul.fp32_precision.
    """
    torchs = f"{'TF32' if matmul == 'tf32' else 'float32'} (torch.backends.cuda.matmul)"
    if "cluster" not in engine and "grid" not in engine:
        return f"products: {torchs}"
    recurrence = f"{'TF32' if rnn == 'tf32' else 'three TF32'} (torch.backends.cudnn.rnn)"
    return f"recurrence in cluster and grid: {recurrence}, other products: {torchs}"


def explain(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Runs `module(*args, **kwargs)` once and tells which backend ran each recurrent layer, attention and
    `linear_cross_entropy`, and why.

    The module may be any model or function that runs these of rnnkern; layers of torch.nn are told of only
    while `rnnkern.enable` is on. It really runs, in its own mode
    and with gradients as they are enabled, since both decide what runs: whatever a call changes in it, such as the
    running statistics of a BatchNorm in training mode, changes here too. Only torch's random state is left as it was.

    Raises:
        TypeError: the module cannot be called.

    Example:
        >>> import torch, rnnkern
        >>> told = rnnkern.explain(rnnkern.nn.LSTM(3, 4, proj_size=2), torch.ones(5, 1, 3))
        >>> told.layers[0].backend
        'eager'
    """
    if not callable(module):
        raise TypeError(f"module must be a module or a function to be called, got {type(module).__name__}")
    notes: list[LayerNote] = []
    with torch.random.fork_rng(devices=[]), _overrides.Override("notes", notes):
        module(*args, **kwargs)
    isa = _library.extension.get_isa() if _library.extension is not None else ""
    return Explanation(tuple(notes), isa, torch.get_num_threads(), _library.reason)
