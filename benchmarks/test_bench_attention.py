"""pytest-benchmark over a few attentions, against every peer: `python -m pytest benchmarks`."""

from collections.abc import Callable

import pytest

from benchmarks.attention import AttentionCase

CASES = [
    AttentionCase("additive", 32, 1, 50, 512, training=True),
    AttentionCase("additive", 32, 50, 50, 512),
    AttentionCase("dot", 32, 1, 50, 512),
    AttentionCase("dot", 32, 50, 50, 512, training=True),
]


@pytest.mark.parametrize(
    ("case", "implementation"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.builders()],
)
def test_attention(benchmark: Callable[..., object], case: AttentionCase, implementation: str) -> None:
    benchmark.group = case.name
    benchmark(case.builders()[implementation]())
