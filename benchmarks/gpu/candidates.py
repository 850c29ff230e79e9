"""What a row compares: who runs here and who does not, and why; what first calls take; whose results differ."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import rnnkern
from benchmarks.peers import PeerDisagrees, check_agreement
from rnnkern import triton
from rnnkern._bench.cases import OURS
from rnnkern.triton import probe

CUDA, TRITON = f"{OURS} cuda", f"{OURS} triton"  # each by the engine that it chooses
Function = Callable[[], object]


def forced(function: Function, backend: str, engine: str | None = None) -> Function:
    """The function with a backend, and an engine of it, forced."""
    options = {} if engine is None else {"engine": engine}

    def run() -> object:
        with rnnkern.backend(backend, **options):
            return function()

    return run


@contextlib.contextmanager
def loaded_kernels() -> Iterator[dict[str, list[str]]]:
    """The names of the kernels that Triton loads meanwhile: `compiled` anew, or `cached` on disk.

    Those that the process has loaded before are not among them, nor those that are interpreted.
    """
    found: dict[str, list[str]] = {"compiled": [], "cached": []}
    if not triton.available or triton.interprets():
        yield found
        return
    if torch.cuda.is_available():
        probe.refusal(torch.device("cuda"))  # what it tries once in a process is no part of anybody's first call
    from triton import knobs

    def note(*, metadata: dict[str, Any], cache_hit: bool, **_: object) -> None:
        found["cached" if cache_hit else "compiled"].append(metadata["name"])

    before, knobs.compilation.listener = knobs.compilation.listener, note
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def first_line(text: str) -> str:
    """Of an error's message."""
    return text.strip().split("\n")[0][:300]


@dataclass
class Tried:
    """What became of the candidates of a row at their first calls."""

    running: dict[str, Function] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # why
    broken: dict[str, str] = field(default_factory=dict)  # by errors that are no refusals, such as the compiler's
    seconds: dict[str, float] = field(default_factory=dict)  # until the first call had ended, with all it compiled
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)  # of Triton: compiled, and found on disk

    def refuse(self, name: str, why: str) -> None:
        """Leaves one out."""
        self.running.pop(name, None)
        self.refused[name] = first_line(why)

    def facts(self) -> dict[str, Any]:
        """For the results."""
        return {
            "refused": self.refused,
            "broken": self.broken,
            "first_call_seconds": {name: self.seconds[name] for name in self.running},
            "first_call_kernels": {name: self.kernels[name] for name in self.running if name in self.kernels},
        }


def try_all(builders: Mapping[str, Callable[[], Function]]) -> Tried:
    """Builds each candidate and calls it once. What breaks the GPU's context is raised."""
    tried = Tried()
    for name, build in builders.items():
        try:
            with loaded_kernels() as loaded:
                begin = time.perf_counter()
                function = build()
                function()
                torch.cuda.synchronize()
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:  # BackendUnavailable, PeerUnavailable, no memory, an engine's own refusal
            tried.refuse(name, str(error))
            torch.cuda.empty_cache()
            continue
        except Exception as error:  # the others may be right
            tried.broken[name] = f"{type(error).__name__}: {first_line(str(error))}"
            continue
        tried.running[name], tried.seconds[name] = function, time.perf_counter() - begin
        if any(loaded.values()):
            tried.kernels[name] = {how: len(kernels) for how, kernels in loaded.items()}
    return tried


def choice(function: Function) -> str:
    """What `rnnkern.explain` says ran, without the facts of the CPU."""
    return "; ".join(map(str, rnnkern.explain(function).layers))


def disagreements(row: str, functions: Mapping[str, Function], reference: str, tolerance: float) -> dict[str, str]:
    """Whose results are not those of `reference`, and by how much."""
    found = {}
    for name, function in functions.items():
        if name == reference:
            continue
        pair = {OURS: function, reference: functions[reference]}
        try:
            check_agreement(row, pair, {OURS: None, reference: tolerance})
        except PeerDisagrees as error:
            found[name] = str(error)
    return found


def times_of(row: dict[str, Any]) -> str:
    """Everybody's microseconds."""
    waited = row["host_bound"]
    return ", ".join(f"{who} {1e6 * t:.0f}{' (host)' * (who in waited)}" for who, t in row["seconds"].items())


def wrong_in(row: dict[str, Any]) -> str:
    """Whose results differ, and who failed, for the end of a line."""
    told = (f" {what.upper()}: {row[what]}" for what in ("disagrees", "broken") if row[what])
    return "".join(told)
