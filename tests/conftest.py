"""Fixtures of every test: torch's global state is put back, and each instruction set that this CPU has is tried."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import ISAS, instruction_set, poisoned_memory


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


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
