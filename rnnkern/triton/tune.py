"""Measures the plans that config.py could choose, and writes the fastest to the user's own table (table.py).

For each size and pass: every plan runs once, which compiles it and shows that its results are those of the stepwise
engine; those that did are timed in turns, as users call them: launches by Python and a wait at the end. A plan that
fails is told of and passed over. Where the CUDA backend runs, it takes its turns among them, by its own choice of an
engine: what it took is written beside the plan, for rnnkern/ops/_dispatch.py.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern._bench.timing import compare
from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.triton import config, table
from rnnkern.triton.launch import device_guard
from rnnkern.triton.probe import error_line
from rnnkern.triton.table import Entry, Plan, Table, Work

Function = Callable[[], object]
# Between two plans, of the largest value: they sum in other orders, and over some hundred steps.
TOLERANCES = {torch.bfloat16: 1e-1, torch.float16: 2e-2, torch.float32: 1e-3, torch.float64: 1e-9}
TF32_TOLERANCE = 2e-2


class Trial(NamedTuple):
    """What became of a plan."""

    plan: Plan | None  # None: not Triton, but the CUDA backend
    first_call_seconds: float  # with what had to be compiled, or read from Triton's cache
    seconds: float | None  # None: it failed
    why: str = ""


def kernel_cache() -> Path:
    """The folder in which Triton keeps what it compiled."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))


def make_layer(work: Work, T: int, device: torch.device) -> tuple[Any, ...]:
    """A layer of this size with random inputs and weights, as operators take it, up to resets; I = H."""
    H, D, B = work.H, work.D, work.B
    generator = torch.Generator(device).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, device=device) * 2 - 1
        return values.to(work.dtype)

    gates, scale = len(CELLS[work.cell].gates) * H, H**-0.5
    shapes = ((gates, H), (gates, H), (gates,), (gates,)) * D
    weights = tuple(uniform(*shape) * scale for shape in shapes) + (None,) * (8 - 4 * D)
    h0 = uniform(D, B, H)
    c0 = uniform(D, B, H).to(compute_dtype(work.dtype)) if len(CELLS[work.cell].states) == 2 else None
    return work.cell, uniform(T, B, H), h0, c0, *weights, None, None


def runner(work: Work, T: int, device: torch.device, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs the pass by a backend's operators; Triton's by the table that holds when it is called."""
    names = (f"{backend}_layer", f"{backend}_layer_inference", f"{backend}_layer_backward")
    forward, inference, backward = (getattr(torch.ops.rnnkern, name).default for name in names)
    cell, *inputs = make_layer(work, T, device)
    if not work.backward:
        return lambda: inference(cell, *inputs, False, "", work.tf32)
    y, *_, kept = forward(cell, *inputs, False, 0.0, "stepwise", work.tf32)
    dy = torch.full_like(y, 1 / 64)  # sums over all rows and steps are to be within float16's range
    gradients = dy, None, None, None
    return lambda: backward(cell, *gradients, *inputs, y, kept, True, True, True, 0.0, "", work.tf32)


def disagreement(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], work: Work) -> str:
    """How far results are from others of the same, "" if they agree."""
    allowed = TF32_TOLERANCE if work.tf32 else TOLERANCES[work.dtype]
    for value, other in zip(found, expected):
        if value.numel() == 0:
            continue
        error, most = float((value - other).abs().max()), float(other.abs().max())
        if not error <= allowed * most:
            return f"its results are off by {error:.2g}, of {most:.2g} at most"
    return ""


def median_seconds(functions: Mapping[str, Function], seconds: float) -> dict[str, float]:
    """Of each function, called in turns with the others."""
    result = compare(functions, seconds=seconds)
    return {name: result.median(name) for name in functions}


def try_plans(
    work: Work,
    T: int,
    device: torch.device,
    measure: Callable[[Mapping[str, Function]], Mapping[str, float]],
    cuda: bool,
) -> list[Trial]:
    """Runs every plan of a pass, and measures those that run; the stepwise engine's first, the CUDA backend last."""
    run = {"triton": runner(work, T, device, "triton")}
    synchronize = (lambda: None) if device.type == "cpu" else torch.get_device_module(device).synchronize

    def call(plan: Plan | None) -> tuple[Tensor, ...]:
        with table.using(table.NOTHING if plan is None else Table({work: plan})):
            results = run["cuda" if plan is None else "triton"]()
            synchronize()
        return results

    expected: tuple[Tensor, ...] | None = None
    first_calls: dict[Plan | None, float] = {}
    failures: dict[Plan | None, str] = {}
    for plan in (*config.cuts(work, config.facts_of(device)), *([None] if cuda else [])):
        begin = time.perf_counter()
        try:
            if plan is None:
                run["cuda"] = runner(work, T, device, "cuda")
                begin = time.perf_counter()
            results = call(plan)
        except torch.AcceleratorError:  # nothing runs on this device any more
            raise
        except Exception as error:  # by the compiler, for want of memory, ...: other plans may run
            failures[plan] = error_line(error)
        first_calls[plan] = time.perf_counter() - begin
        if plan not in failures:
            expected = results if expected is None else expected
            if why := disagreement(results, expected, work):
                failures[plan] = why
    running = {name_of(plan): functools.partial(call, plan) for plan in first_calls if plan not in failures}
    times = measure(running) if running else {}
    return [Trial(plan, first, times.get(name_of(plan)), failures.get(plan, "")) for plan, first in first_calls.items()]


def name_of(plan: Plan | None) -> str:
    """Of a trial."""
    return "cuda" if plan is None else str(plan)


def fastest(trials: Iterable[Trial], default: Plan) -> Entry | None:
    """The entry of a table, or None if every plan failed."""
    times = {trial.plan: trial.seconds for trial in trials if trial.seconds is not None}
    best = min((plan for plan in times if plan is not None), key=times.__getitem__, default=None)
    if best is None:
        return None
    first = next(trial.first_call_seconds for trial in trials if trial.plan == best)
    return Entry(best, times[best], times.get(default), first, times.get(None))


def tune(
    works: Iterable[Work],
    T: int,
    device: torch.device,
    path: Path,
    measure: Callable[[Mapping[str, Function]], Mapping[str, float]],
    tell: Callable[[str], None] = print,
    cuda: bool = False,
) -> int:
    """Measures every plan of every work and adds the fastest to the table in a file, which is written after each.

    Args:
        works: what to measure.
        T: steps; engines are compared alike for any number of them that is not small.
        device: where to measure.
        path: the file; a table of other versions in it is replaced.
        measure: the seconds of functions by name, as `median_seconds`.
        tell: prints a line.
        cuda: whether to measure the CUDA backend, too.

    Returns:
        How many plans were added.

    Raises:
        OSError: the file cannot be read or written; nothing has been measured then.
        rnnkern.triton.table.Unusable: the file is there and is no table.
    """
    facts = config.facts_of(device)
    try:
        entries = table.read(path, facts.name) if path.exists() else {}
    except table.Foreign as error:
        tell(f"{path}: {error}; what is there is replaced")
        entries = {}
    except table.Unusable as error:
        raise table.Unusable(f"{path}: {error}; delete it, or name another file") from None
    table.write(path, facts.name, entries)
    added, compiling = 0, 0.0
    for work in works:
        with torch.no_grad(), device_guard(torch.empty(0, device=device)), table.using(table.NOTHING):
            default = config.plan(work.cell, work.dtype, work.H, work.B, work.D, "", work.tf32, facts, work.backward)
            trials = try_plans(work, T, device, measure, cuda)
        best = fastest(trials, default)
        tell(str(work))
        for trial in trials:
            compiling += trial.first_call_seconds
            mark = "*" if best is not None and trial.plan == best.plan else " "
            time_of = trial.why if trial.seconds is None else f"{1e3 * trial.seconds:.3f} ms"
            rule = " (by rule)" if trial.plan == default else ""
            tell(f"  {mark} {name_of(trial.plan)}{rule}: {time_of}; first call {trial.first_call_seconds:.2f} s")
        if best is not None:
            entries[work] = best
            table.write(path, facts.name, entries)
            added += 1
    tell(f"{added} plans written to {path}; first calls took {compiling:.1f} s in all")
    tell(f"Triton keeps what it compiled in {kernel_cache()} (TRITON_CACHE_DIR)")
    return added
