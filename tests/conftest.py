"""Fixtures of every test: torch's global state is put back, and each instruction set that this CPU has is tried."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported, by torch perhaps
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["RNNKERN_TRITON_TABLE"] = ""  # a user's own table changes what runs

import rnnkern
from rnnkern import _enable, _operators, triton
from tests.helpers import ISAS, instruction_set, poisoned_memory, setting, threads


def pytest_report_header() -> str:
    """Tests of Triton's kernels are many, and all skip where it cannot run: this line says why."""
    how = "interpreted" if triton.interprets() else "compiled"
    why = triton.missing_on("cuda" if torch.cuda.is_available() else "cpu")
    return f"Triton: {why or f'{triton.version}, {how}'}"


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random numbers, and one thread: on tensors this small more only wait; tests of threads ask for them."""
    torch.manual_seed(0)
    with threads(1):
        yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # compiled code is counted against a limit over all tests


@pytest.fixture(params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason="no compiled kernels"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set, which the CPU kernels use meanwhile."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that operators allocate starts as NaN."""
    with poisoned_memory():
        yield


@pytest.fixture
def torch_poison() -> Iterator[None]:
    """Memory that torch allocates starts as NaN: that of Triton's kernels, which `poison` does not reach."""
    with setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True):
        assert torch.empty(1).isnan()
        yield


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Products of float32 are float32's, by every backend, but where a test says otherwise."""
    places = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    yield
    for place, precision in zip(places, before):
        place.fp32_precision = precision


@pytest.fixture
def disabled_afterwards() -> Iterator[None]:
    """Whatever `rnnkern.enable` did is undone."""
    yield
    rnnkern.disable()


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The GPU report's sweeps run on the CPU; its results, in a folder of the test."""
    from tests.gpu_dry_run import run_on_the_cpu

    return run_on_the_cpu(monkeypatch, tmp_path)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who ran each call that reached `enable`'s kernels, "ours" or "torch"."""
    seen: list[str] = []
    known = {cell: (_operators.KnownWeights(), _operators.KnownWeights()) for cell in _operators.MODULES}
    watched, make_kernel = _operators._watched, _operators._make_kernel

    def make(operator: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any) -> Any:
            result = run(*args)
            seen.append("torch" if result is None else "ours")
            return result

        return make_kernel(operator, told)

    def noted() -> bool:
        if watched():
            seen.append("torch")
        return watched()

    monkeypatch.setattr(_operators, "_make_kernel", make)
    monkeypatch.setattr(_operators, "_watched", noted)
    kernels = [kernel for cell in known for kernel in _operators.make_kernels(cell, *known[cell])]
    monkeypatch.setattr(_enable._switch, "_known", known)
    monkeypatch.setattr(_enable._switch, "_kernels", kernels)
    return seen
