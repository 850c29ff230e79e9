"""Which of our backends was faster, CUDA or Triton, row by row: what the dispatcher's order is to follow."""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.candidates import CUDA, TRITON
from benchmarks.render import table

Row = dict[str, Any]
GROUPS = {"layers": ("cell", "dtype", "shape", "mode"), "attention": ("score", "dtype", "training")}
MODES = {True: "forward and backward", False: "forward"}
LISTED = 20


def triton_ratio(row: Row) -> float | None:
    """How many times as fast as CUDA Triton was; None where one of them did not run, or computed something else."""
    if {CUDA, TRITON} & set(row.get("disagrees", ())):
        return None
    found: float | None = row.get("triton_ratio", {}).get(CUDA)
    return found


def winner(row: Row) -> str:
    """The faster one, and how many times as fast, "" where only one ran."""
    ratio = triton_ratio(row)
    if ratio is None:
        return ""
    return f"triton {ratio:.2f}" if ratio > 1 else f"cuda {1 / ratio:.2f}"


def describe(case: Row, facts: tuple[str, ...]) -> str:
    """A group in words."""
    return ", ".join(MODES.get(case[fact], str(case[fact])) for fact in facts)


def order_tables(parts: Row) -> Iterator[str]:
    """How often either was faster, by kind of row, and where Triton was."""
    groups: dict[str, list[float]] = {}
    rows: dict[str, float] = {}
    for part, facts in GROUPS.items():
        for name, row in parts.get(part, {"rows": {}})["rows"].items():
            ratio = triton_ratio(row)
            if ratio is not None:
                rows[name] = ratio
                groups.setdefault(f"{part}: {describe(row['case'], facts)}", []).append(ratio)
    if not rows:
        return
    yield "## CUDA or Triton"
    head = ["", "rows", "cuda faster", "triton faster", "triton x cuda, median", "least", "most"]
    cells = []
    for group, ratios in sorted(groups.items()):
        faster = sum(ratio > 1 for ratio in ratios)
        spread = (f"{value:.2f}" for value in (statistics.median(ratios), min(ratios), max(ratios)))
        cells.append([group, str(len(ratios)), str(len(ratios) - faster), str(faster), *spread])
    yield table(head, cells)
    faster_rows = sorted((name for name in rows if rows[name] > 1), key=rows.__getitem__, reverse=True)
    if faster_rows:
        cells = [[f"`{name}`", f"{rows[name]:.2f}"] for name in faster_rows[:LISTED]]
        yield table([f"triton faster: {len(cells)} of {len(faster_rows)}", "x cuda"], cells)
