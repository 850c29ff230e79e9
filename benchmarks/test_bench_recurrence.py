"""pytest-benchmark over a few recurrences: `python -m pytest benchmarks`. The report compares; these track."""

from collections.abc import Callable

import pytest

from rnnkern._bench.cases import OURS, TORCH, Case, runners

CASES = [
    Case("lstm", 1, 1, 256, 256),
    Case("gru", 100, 1, 256, 256),
    Case("lstm", 100, 8, 256, 256, training=True),
    Case("rnn_tanh", 100, 32, 256, 256, training=True),
    Case("gru", 100, 32, 256, 256, layers=2, bidirectional=True),
    Case("gru", 1, 64, 256, 256, single_step=True),
]


@pytest.mark.parametrize("implementation", [OURS, TORCH])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recurrence(benchmark: Callable[..., object], case: Case, implementation: str) -> None:
    benchmark.group = case.name
    benchmark(runners(case)[implementation])
