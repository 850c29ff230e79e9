"""The GPU report's sweeps on the CPU: a clock that needs no GPU, and rows small enough."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, device, functional, layers, results, small, sweep
from benchmarks.gpu.results import Results
from rnnkern._bench.cases import Case


class HostClock:
    """In the place of events, which need a GPU."""

    def __init__(self) -> None:
        self.launching: dict[Any, list[float]] = {}

    def __call__(self, function: Any, calls: int) -> float:
        function()
        self.launching.setdefault(function, []).append(1e-6)
        return 1e-3

    launching_seconds = device.DeviceClock.launching_seconds
    host_bound = device.DeviceClock.host_bound


def run_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Results:
    """Until the test ends the sweeps run on the CPU; what asks the GPU is told something."""
    for module in (layers, functional, small):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for name, value in {
        "synchronize": None,
        "empty_cache": None,
        "memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 << 20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(layers, "backward_plan", lambda row: "grid")
    monkeypatch.setattr(layers, "TRITON_ENGINES", ("stepwise",))  # interpreted, all of them take long
    facts = {"gpu": "Some GPU", "capability": "9.0", "multiprocessors": 1, "memory_gib": 1, "l2_mib": 1.0}
    monkeypatch.setattr(results, "identity", lambda: facts)
    return Results.of_this_gpu(tmp_path)


def measured(rows: list[sweep.Row], on: Results, part: str, line: Any, **options: Any) -> int:
    return sweep.run(on, part, rows, line, **{"seconds": 3600.0, "again": False, **options})


def layer_row(name: str) -> cases.LayerCase:
    case = Case.parse(name.replace("-tf32", ""))
    dtype = "tf32" if "tf32" in name else {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype]
    layers = "stack" if case.bidirectional else "two" if case.layers == 2 else "plain"
    return cases.LayerCase(case, dtype, "packed" if case.ragged else layers, 0)
