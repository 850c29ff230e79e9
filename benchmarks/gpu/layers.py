"""Recurrent layers on a GPU: ours, as it chooses and by each engine in CUDA and Triton, against cuDNN and eager."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.attention import EAGER
from benchmarks.gpu.candidates import CUDA, TRITON, Function, choice, disagreements, forced, times_of, try_all, wrong_in
from benchmarks.gpu.cases import LayerCase
from benchmarks.gpu.device import DEVICE, DeviceClock, call_seconds, float32_products, kernels, peak_mib
from benchmarks.peers import TOLERANCES
from rnnkern import _library
from rnnkern._bench.cases import OURS, TORCH, modules, runner
from rnnkern._bench.timing import compare
from rnnkern.ops._dispatch import ENGINES, TRITON_ENGINES, cuda_plan

PROJECTION = "projection"
EAGER_ROUNDS, EAGER_UP_TO_STEPS = 3, 100


def projection(row: LayerCase) -> Function:
    """The product of all inputs with W_ih alone, as it is in the layer's forward."""
    case = row.case
    x = case.input(DEVICE).view(-1, case.I)[: int(case.lengths().sum())]  # of packed rows those that there are
    weight = torch.cat([w for name, w in modules(case, DEVICE)[TORCH].named_parameters() if "weight_ih" in name])
    return lambda: torch.mm(x, weight.t())


def candidates(row: LayerCase) -> dict[str, Function]:
    """What is compared; some may refuse when they are called.

    Engines stand before what chooses among them, so that their first calls are those that compile.
    """
    case = row.case
    of = modules(case, DEVICE)
    ours, theirs = runner(case, of[OURS], DEVICE), runner(case, of[TORCH], DEVICE)
    found = {}
    for name, backend, engines in ((CUDA, "cuda", ENGINES), (TRITON, "triton", TRITON_ENGINES)):
        found |= {f"{name} {engine}": forced(ours, backend, engine) for engine in engines}
        found[name] = forced(ours, backend)
    found |= {OURS: ours, TORCH: theirs}
    if case.T <= EAGER_UP_TO_STEPS:
        found[EAGER] = forced(ours, "eager")
    if not case.training and case.layers == 1:
        found[PROJECTION] = projection(row)
    return found


def builders(functions: dict[str, Function]) -> dict[str, Callable[[], Function]]:
    """Functions that are there already, as `try_all` takes them."""
    return {name: lambda function=function: function for name, function in functions.items()}


def backward_plan(row: LayerCase) -> str:
    """The engine that the backward of the last layer takes by itself; `choice` tells that of the forward."""
    case, D = row.case, 2 if row.case.bidirectional else 1
    step = torch.empty(case.B, case.H * D if case.layers > 1 else case.I, dtype=case.dtype, device=DEVICE)
    return cuda_plan(case.cell, step.expand(case.T, -1, -1), step.new_empty(D, case.B, case.H), None, backward=True)


def measure(row: LayerCase, clock: DeviceClock, seconds: float) -> dict[str, Any]:
    """One row of the results: seconds on the device and of a call, ratios, memory, and who refused."""
    with float32_products(row.tf32), torch.set_grad_enabled(row.case.training):
        tried = try_all(builders(candidates(row)))
        functions = tried.running
        result: dict[str, Any] = {"case": row.facts(), **tried.facts()}
        if OURS not in functions:
            return result
        result["choice"] = choice(functions[OURS])
        if TRITON in functions:
            result["triton_choice"] = choice(functions[TRITON])
        if row.case.training and not _library.missing["cuda"]:
            result["backward"] = backward_plan(row)
        compared = {name: function for name, function in functions.items() if name != PROJECTION}
        tolerance = 1e-2 if row.dtype == "tf32" else TOLERANCES[row.case.dtype]
        result["disagrees"] = disagreements(row.name, compared, TORCH, tolerance) if TORCH in functions else {}
        result["peak_mib"] = {name: peak_mib(function) for name, function in compared.items()}
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
            who: times.ratio(who, TRITON) for who in (TORCH, EAGER, CUDA) if {who, TRITON} <= set(functions)
        },
        "ratio_quartiles": {peer: times.ratio_range(peer, OURS) for peer in (TORCH,) if peer in functions},
        "rounds": len(times.samples[OURS]),
    }
    return result


def measure_kernels(row: LayerCase) -> dict[str, Any]:
    """The kernels of torch.nn's layer and of ours."""
    with float32_products(row.tf32), torch.set_grad_enabled(row.case.training):
        of = candidates(row)
        tried = try_all(builders({name: of[name] for name in (OURS, TRITON, TORCH)}))
        found = {name: kernels(function) for name, function in tried.running.items()}
        return {"case": row.facts(), "refused": tried.refused, **found}


def kernels_line(name: str, row: dict[str, Any]) -> str:
    """The kernels of a row for the terminal."""
    if "failed" in row:
        return f"{name}: {row['failed']}"
    told = (f"{who} {row[who]['launches']} of {row[who]['top'][:1]}" for who in (TORCH, OURS, TRITON) if who in row)
    return f"{name}: {', '.join(told)}"


def line(name: str, row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "seconds" not in row:
        return f"{name}: {row.get('failed') or row['broken'] or row['refused']}"
    times = times_of(row)
    ratio = f"{row['ratio'][TORCH]:.2f}x" if TORCH in row["ratio"] else "  ?  "
    return f"{ratio:>7} {name}: us {times}{wrong_in(row)}"
