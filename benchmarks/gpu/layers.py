"""Recurrent layers on a GPU: ours, as it chooses and by each engine in CUDA and Triton, against cuDNN and eager."""

import time
from collections.abc import Callable
from typing import Any

import torch

import rnnkern
from benchmarks.gpu.cases import LayerCase
from benchmarks.gpu.device import DEVICE, DeviceClock, call_seconds, float32_products, kernels, peak_mib
from benchmarks.peers import TOLERANCES, PeerDisagrees, check_agreement
from rnnkern import _library
from rnnkern._bench.cases import OURS, TORCH, modules, runner
from rnnkern._bench.timing import compare
from rnnkern.ops._dispatch import ENGINES, TRITON_ENGINES, cuda_plan

EAGER, PROJECTION, TRITON = "eager", "projection", f"{OURS} triton"
EAGER_ROUNDS, EAGER_UP_TO_STEPS = 3, 100
Function = Callable[[], object]


def forced(function: Function, backend: str, engine: str | None = None) -> Function:
    """The function with a backend, and an engine of it, forced."""
    options = {} if engine is None else {"engine": engine}

    def run() -> object:
        with rnnkern.backend(backend, **options):
            return function()

    return run


def projection(row: LayerCase) -> Function:
    """The product of all inputs with W_ih alone, as it is in the layer's forward."""
    case = row.case
    x = case.input(DEVICE).view(-1, case.I)[: int(case.lengths().sum())]  # of packed rows those that there are
    weight = torch.cat([w for name, w in modules(case, DEVICE)[TORCH].named_parameters() if "weight_ih" in name])
    return lambda: torch.mm(x, weight.t())


def candidates(row: LayerCase) -> dict[str, Function]:
    """What is compared, ours first; some may refuse when they are called."""
    case = row.case
    of = modules(case, DEVICE)
    ours, theirs = runner(case, of[OURS], DEVICE), runner(case, of[TORCH], DEVICE)
    found = {OURS: ours, TORCH: theirs}
    found |= {f"{OURS} {engine}": forced(ours, "cuda", engine) for engine in ENGINES}
    found[TRITON] = forced(ours, "triton")
    found |= {f"{TRITON} {engine}": forced(ours, "triton", engine) for engine in TRITON_ENGINES}
    if case.T <= EAGER_UP_TO_STEPS:
        found[EAGER] = forced(ours, "eager")
    if not case.training and case.layers == 1:
        found[PROJECTION] = projection(row)
    return found


def try_all(functions: dict[str, Function]) -> tuple[dict[str, Function], dict[str, str], dict[str, float]]:
    """The functions that run, why others do not, and the seconds of first calls, in which kernels may be compiled.

    What breaks the GPU's context is raised.
    """
    running, refused, first_calls = {}, {}, {}
    for name, function in functions.items():
        begin = time.perf_counter()
        try:
            function()
            torch.cuda.synchronize()
            running[name], first_calls[name] = function, time.perf_counter() - begin
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:  # BackendUnavailable, no memory, an engine's own refusal
            refused[name] = str(error).strip().split("\n")[0][:300]
            torch.cuda.empty_cache()
    return running, refused, first_calls


def choice(function: Function) -> str:
    """What `rnnkern.explain` says ran, without the facts of the CPU."""
    return "; ".join(map(str, rnnkern.explain(function).layers))


def backward_plan(row: LayerCase) -> str:
    """The engine that the backward of the last layer takes by itself; `choice` tells that of the forward."""
    case, D = row.case, 2 if row.case.bidirectional else 1
    step = torch.empty(case.B, case.H * D if case.layers > 1 else case.I, dtype=case.dtype, device=DEVICE)
    return cuda_plan(case.cell, step.expand(case.T, -1, -1), step.new_empty(D, case.B, case.H), None, backward=True)


def disagreements(row: LayerCase, functions: dict[str, Function]) -> dict[str, str]:
    """Whose results are not cuDNN's, and by how much."""
    found = {}
    tolerance = 1e-2 if row.dtype == "tf32" else TOLERANCES[row.case.dtype]
    for name in functions:
        if name in (TORCH, PROJECTION) or TORCH not in functions:
            continue
        pair = {OURS: functions[name], TORCH: functions[TORCH]}
        try:
            check_agreement(row.name, pair, {OURS: None, TORCH: tolerance})
        except PeerDisagrees as error:
            found[name] = str(error)
    return found


def measure(row: LayerCase, clock: DeviceClock, seconds: float) -> dict[str, Any]:
    """One row of the results: seconds on the device and of a call, ratios, memory, and who refused."""
    with float32_products(row.tf32), torch.set_grad_enabled(row.case.training):
        functions, refused, first_calls = try_all(candidates(row))
        result: dict[str, Any] = {"case": row.facts(), "refused": refused, "first_call_seconds": first_calls}
        if OURS not in functions:
            return result
        result["choice"] = choice(functions[OURS])
        if TRITON in functions:
            result["triton_choice"] = choice(functions[TRITON])
        if row.case.training and not _library.missing["cuda"]:
            result["backward"] = backward_plan(row)
        result["disagrees"] = disagreements(row, functions)
        result["peak_mib"] = {name: peak_mib(function) for name, function in functions.items() if name != PROJECTION}
        waited = [name for name in (OURS, TORCH) if name in functions]
        result["call_seconds"] = {name: call_seconds(functions[name]) for name in waited}
        times = compare(
            functions, seconds=seconds, run=clock, sample_seconds=0.0, max_rounds=50, limits={EAGER: EAGER_ROUNDS}
        )
    device_seconds = {name: times.median(name) for name in functions}
    result |= {
        "seconds": device_seconds,
        "host_bound": clock.host_bound(device_seconds, functions),
        "launching_seconds": {name: clock.launching_seconds(function) for name, function in functions.items()},
        "ratio": {peer: times.ratio(peer, OURS) for peer in (TORCH, EAGER) if peer in functions},
        "triton_ratio": {
            who: times.ratio(who, TRITON) for who in (TORCH, EAGER, OURS) if {who, TRITON} <= set(functions)
        },
        "ratio_quartiles": {peer: times.ratio_range(peer, OURS) for peer in (TORCH,) if peer in functions},
        "rounds": len(times.samples[OURS]),
    }
    return result


def measure_kernels(row: LayerCase) -> dict[str, Any]:
    """The kernels of torch.nn's layer and of ours."""
    with float32_products(row.tf32), torch.set_grad_enabled(row.case.training):
        of = candidates(row)
        functions, refused, _ = try_all({name: of[name] for name in (OURS, TRITON, TORCH)})
        return {"case": row.facts(), "refused": refused, **{name: kernels(f) for name, f in functions.items()}}


def kernels_line(name: str, row: dict[str, Any]) -> str:
    """The kernels of a row for the terminal."""
    if "failed" in row:
        return f"{name}: {row['failed']}"
    told = (f"{who} {row[who]['launches']} of {row[who]['top'][:1]}" for who in (TORCH, OURS, TRITON) if who in row)
    return f"{name}: {', '.join(told)}"


def times_of(row: dict[str, Any]) -> str:
    """Everybody's microseconds."""
    waited = row["host_bound"]
    return ", ".join(f"{who} {1e6 * t:.0f}{' (host)' * (who in waited)}" for who, t in row["seconds"].items())


def line(name: str, row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "seconds" not in row:
        return f"{name}: {row.get('failed') or row['refused']}"
    times = times_of(row)
    ratio = f"{row['ratio'][TORCH]:.2f}x" if TORCH in row["ratio"] else "  ?  "
    wrong = f" DISAGREES: {row['disagrees']}" if row["disagrees"] else ""
    return f"{ratio:>7} {name}: us {times}{wrong}"
