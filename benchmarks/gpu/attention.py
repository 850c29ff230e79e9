"""Attention on a GPU: ours against the formula in eager torch, that formula compiled, and torch's fused dot product."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

import rnnkern
from benchmarks.attention import EAGER, AttentionCase
from benchmarks.gpu.device import DEVICE, DeviceClock, float32_products, peak_mib
from benchmarks.gpu.layers import choice, times_of
from benchmarks.peers import TOLERANCES, PeerDisagrees, check_agreement
from benchmarks.runtimes import PeerUnavailable
from rnnkern._bench.cases import OURS
from rnnkern._bench.timing import compare

SIZES = (
    (32, 1, 50, 512),
    (64, 1, 1000, 512),
    (32, 50, 50, 512),
    (64, 50, 1000, 512),
    (8, 200, 500, 64),
)  # B, Tq, Tk, D
SCORES = ("additive", "scaled_dot")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def all_cases() -> Iterator[AttentionCase]:
    """Every row."""
    for dtype in DTYPES:
        for size in SIZES:
            for score in SCORES:
                for training in (False, True):
                    yield AttentionCase(score, *size, training=training, dtype=dtype, device=DEVICE)


def build(case: AttentionCase) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The functions that run here, and why others do not: ours without kernels is the eager formula again."""
    functions, refused = {}, {}
    for name, builder in case.builders().items():
        try:
            function = builder()
            note = rnnkern.explain(function).layers[0] if name == OURS else None
            if note is not None and note.backend == "eager":
                refused[name] = f"no CUDA kernels: {note.why or note.backend}"
            else:
                function()
                functions[name] = function
        except (PeerUnavailable, torch.OutOfMemoryError) as error:
            refused[name] = str(error).split("\n")[0][:300]
    return functions, refused


def measure(case: AttentionCase, clock: DeviceClock, seconds: float) -> dict[str, Any]:
    """One row of the results. Products of float32 are not rounded to TF32."""
    torch._dynamo.reset()  # else it stops compiling after the eighth shape
    with float32_products(False), torch.set_grad_enabled(case.training):
        functions, refused = build(case)
        facts = {**dataclasses.asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
        result: dict[str, Any] = {"case": facts, "refused": refused, "disagrees": {}}
        first = next(iter(functions))
        if first == OURS:
            result["choice"] = choice(functions[OURS])
            try:
                check_agreement(case.name, functions, dict.fromkeys(functions, TOLERANCES[case.dtype]))
            except PeerDisagrees as error:
                result["disagrees"] = {OURS: str(error)}
        result["peak_mib"] = {name: peak_mib(function) for name, function in functions.items()}
        times = compare(functions, seconds=seconds, run=clock, sample_seconds=0.0, max_rounds=50)
    device_seconds = {name: times.median(name) for name in functions}
    return result | {
        "seconds": device_seconds,
        "host_bound": clock.host_bound(device_seconds, functions),
        "ratio": {peer: times.ratio(peer, OURS) for peer in functions if peer != OURS and OURS in functions},
        "rounds": len(times.samples[first]),
    }


def line(name: str, row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "seconds" not in row:
        return f"{name}: {row['failed']}"
    times = times_of(row)
    ratio = f"{row['ratio'][EAGER]:.2f}x {EAGER}, " if EAGER in row["ratio"] else ""
    return f"{name}: {ratio}us {times}; left out: {row['refused'] or 'none'}"
