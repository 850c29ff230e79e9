"""Fixtures of every test: torch's global state is put back, and each instruction set that this CPU has is tried."""

import sys
from collections.abc import Iterator

import pytest
import torch

from tests.helpers import ISAS, instruction_set, poisoned_memory, threads


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
