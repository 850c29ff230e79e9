"""Measures every row against its peers and writes the report: `python -m benchmarks.report --help`."""

import argparse
import dataclasses
import fnmatch
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import render
from benchmarks.attention import EAGER, SDPA, AttentionCase
from benchmarks.environment import (
    PARTIAL,
    RESULTS,
    ROOT,
    chosen_threads,
    environment,
    find_probes,
    folder_for,
    probe,
    write_json,
)
from benchmarks.loss import CHUNKED, LossCase
from benchmarks.memory import peak_mib
from benchmarks.peers import PEERS
from benchmarks.rows import SMOKE, Row, all_rows, check_row, row_runners
from rnnkern.__main__ import seconds as some_seconds
from rnnkern._bench.cases import OURS, TORCH, Case
from rnnkern._bench.probes import MachineProbe, Probes, ceilings
from rnnkern._bench.timing import compare

MEMORY_OF = (OURS, TORCH, EAGER, SDPA, CHUNKED)
# After a call the threads of a runtime, and torch's, spin for ten milliseconds and more, on cores that the next needs.
REST_SECONDS = 0.03


def kind(row: Row) -> str:
    """The table that the row stands in."""
    if isinstance(row, AttentionCase):
        return "attention"
    if isinstance(row, LossCase):
        return "loss"
    if row.ragged:
        return "ragged"
    return "recurrence" if row.dtype == torch.float32 else "low precision"


def measure(row: Row, now: MachineProbe | None, seconds: float, memory: bool) -> dict[str, Any]:
    """One row of the report."""
    with torch.set_grad_enabled(row.training):
        functions = row_runners(row)
        check_row(row, functions)
        apart = torch.get_num_threads() > 1 and any(name in PEERS and PEERS[name].own_threads for name in functions)
        result = compare(functions, seconds=seconds, rest=REST_SECONDS if apart else 0.0)
    peers = [name for name in functions if name != OURS]
    del functions
    recurrence = isinstance(row, Case)
    return {
        "name": row.name,
        "kind": kind(row),
        "case": {key: str(v) if key == "dtype" else v for key, v in dataclasses.asdict(row).items()},
        "seconds": {name: result.median(name) for name in result.samples},
        "best_seconds": {name: result.best(name) for name in result.samples},
        "ratio": {peer: result.ratio(peer, OURS) for peer in peers},
        "ratio_quartiles": {peer: result.ratio_range(peer, OURS) for peer in peers},
        "rounds": len(result.samples[OURS]),
        "floor_seconds": row.floor(ceilings(now)) if recurrence and now is not None else None,
        "valid_share": row.valid_share() if recurrence else 1.0,
        "peak_mib": {name: peak_mib(row, name) for name in result.samples if name in MEMORY_OF} if memory else None,
    }


def line(entry: dict[str, Any]) -> str:
    """A measured row for the terminal."""
    times = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in entry["seconds"].items())
    ratios = ", ".join(f"{value:.2f}x {peer}" for peer, value in entry["ratio"].items())
    floor = entry["floor_seconds"]
    share = f", {100 * floor / entry['seconds'][OURS]:.0f}% of the floor" if floor else ""
    return f"{entry['name']:<40} {times}: {ratios}{share}"


def chosen(rows: Iterable[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose name matches a pattern: a part of the name, or with * and ? a whole one. All without patterns."""
    whole = [pattern if set(pattern) & set("*?[") else f"*{pattern}*" for pattern in patterns]
    return [row for row in rows if not whole or any(fnmatch.fnmatchcase(row.name, pattern) for pattern in whole)]


def run(rows: Sequence[Row], probes: Probes | None, seconds: float, memory: bool) -> dict[str, Any]:
    """Measures the rows on torch's threads; the probes are taken before and after, and floors use those from before."""
    before = probe(probes)
    entries = []
    for number, row in enumerate(rows):
        entries.append(measure(row, before, seconds, memory))
        print(f"[{number + 1}/{len(rows)}] {line(entries[-1])}", flush=True)
    after = probe(probes)
    return {
        "threads": torch.get_num_threads(),
        "probes": {
            "before": dataclasses.asdict(before) if before else None,
            "after": dataclasses.asdict(after) if after else None,
        },
        "rows": entries,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    top.add_argument("--only", action="append", default=[], metavar="PATTERN", help="rows whose name holds PATTERN")
    top.add_argument("--smoke", action="store_true", help="a few rows, briefly: shows that measuring works")
    top.add_argument("--list", action="store_true", help="print the rows' names and stop")
    top.add_argument("--seconds", type=some_seconds, metavar="S", help="time for each row (default 1.5, smoke 0.3)")
    top.add_argument(
        "--threads",
        type=chosen_threads,
        metavar="N,...",
        help="torch's threads, one section each (default: torch's own choice, then 1; smoke: torch's own choice); "
        "attention and memory are measured in the first section only",
    )
    top.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    top.add_argument(
        "--out",
        type=Path,
        help="folder for the machines' folders (default benchmarks/results, and build/benchmarks for part of the rows)",
    )
    top.add_argument("--update-readme", action="store_true", help="write the committed results into README.md and stop")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    rows = list(all_rows())
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return 0
    if arguments.update_readme:
        render.update_readme(ROOT / "README.md", RESULTS)
        return 0
    rows = chosen([row for row in rows if row.name in SMOKE] if arguments.smoke else rows, arguments.only)
    if not rows:
        print(f"no row matches {' '.join(arguments.only)}: see --list", file=sys.stderr)
        return 2
    head = environment()
    own = head["machine"]["threads"]
    first, *others = arguments.threads or ([own] if arguments.smoke or own == 1 else [own, 1])
    seconds = arguments.seconds or (0.3 if arguments.smoke else 1.5)
    probes = find_probes()
    torch.set_num_threads(first)
    sections = [run(rows, probes, seconds, memory=not arguments.no_memory)]
    for threads in others:
        torch.set_num_threads(threads)
        torch.compiler.reset()  # compiled code has a fixed number of threads
        both = [row for row in rows if not isinstance(row, AttentionCase)]
        sections.append(run(both, probes, seconds, memory=False))
    torch.set_num_threads(own)
    partial = arguments.smoke or arguments.only
    folder = folder_for(arguments.out or (PARTIAL if partial else RESULTS), head["machine"])
    report = {**head, "sections": sections}
    write_json(report, folder / "report.json")
    render.write(report, folder)
    print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
