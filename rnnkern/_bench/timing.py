"""Fair comparison of several functions: interleaved rounds, medians, ratios taken pair by pair.

Machines drift, and shared ones more so. Each round measures every function once, one right after the other, so that a
ratio compares neighbours in time; the order turns round by round, so that no function always runs after the same other.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of each function; `samples[name][k]` of round k."""

    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples[name])

    def best(self, name: str) -> float:
        """The fastest round, seconds per call."""
        return min(self.samples[name])

    def ratio(self, peer: str, ours: str) -> float:
        """How many times faster `ours` is than `peer`: the median over rounds of peer's time / our time."""
        return statistics.median(p / o for p, o in zip(self.samples[peer], self.samples[ours]))

    def ratio_range(self, peer: str, ours: str) -> tuple[float, float]:
        """The quartiles of the paired ratios."""
        ratios = sorted(p / o for p, o in zip(self.samples[peer], self.samples[ours]))
        if len(ratios) < 4:
            return ratios[0], ratios[-1]
        lower, _, upper = statistics.quantiles(ratios, n=4)
        return lower, upper


def _run(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample_seconds: float = 1e-3,
    rest: float = 0.0,
    run: Callable[[Callable[[], object], int], float] = _run,
    limits: Mapping[str, int] = MappingProxyType({}),
) -> Comparison:
    """Times the functions against each other.

    Args:
        functions: what to run, by name.
        seconds: the time to spend over all functions; `min_rounds` are made even where that takes longer.
        min_rounds: rounds made at least.
        max_rounds: rounds made at most.
        sample_seconds: a function faster than this is called several times per round, and the mean taken.
        rest: seconds of sleep before each function's turn, which then begins with as many calls that do not count. For
            functions with threads of their own: these spin for some milliseconds after a call, on cores that the next
            function needs.
        run: calls a function so many times and returns the seconds per call.
        limits: rounds of a function that is to have no more, being slow; ratios are then of those rounds alone.

    Returns:
        The samples of all rounds.

    Example:
        >>> result = compare({"list": lambda: list(range(100)), "sum": lambda: sum(range(100))}, seconds=0.01)
        >>> result.ratio("list", "sum") > 0
        True
    """
    calls = {}
    for name, function in functions.items():
        run(function, 1)  # first touch, lazy initialisation
        calls[name] = max(1, round(sample_seconds / max(run(function, 1), 1e-9)))
    order = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() - start > seconds:
                break
            for name in order:
                if done >= limits.get(name, max_rounds):
                    continue
                if rest:
                    time.sleep(rest)
                    run(functions[name], calls[name])
                samples[name].append(run(functions[name], calls[name]))
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return Comparison(samples)
