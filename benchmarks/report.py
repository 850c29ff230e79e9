"""Measures every row against its peers and writes the report: `python -m benchmarks.report --help`."""

import argparse
import dataclasses
import datetime
import fnmatch
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import rnnkern
from benchmarks import render
from benchmarks.attention import AttentionCase
from benchmarks.memory import peak_mib
from benchmarks.rows import SMOKE, Row, all_rows, row_runners
from rnnkern import _library
from rnnkern._bench.cases import OURS
from rnnkern._bench.machine import cpu_facts, cpu_name, slug
from rnnkern._bench.probes import MachineProbe, Probes, ProbesUnavailable, ceilings
from rnnkern._bench.timing import compare

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What identifies the hardware: results of two different machines never share a folder."""
    facts = cpu_facts()
    return {
        "cpu": cpu_name(),
        "signature": "/".join(facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def software() -> dict[str, Any]:
    """Versions, and the commit if the tree is a clone."""
    extension = _library.extension
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "rnnkern": rnnkern.__version__,
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": extension.get_isa() if extension is not None else None,
        "compiler": extension.build_info()["compiler"] if extension is not None else None,
    }


def folder_for(where: Path, identity: dict[str, Any]) -> Path:
    """The folder of this machine under `where`: its name, numbered if another machine of that name was there first."""
    number = 1
    while True:
        folder = where / (slug() if number == 1 else f"{slug()}-{number}")
        written = folder / "report.json"
        if not written.exists() or json.loads(written.read_text())["machine"] == identity:
            return folder
        number += 1


def probe(probes: Probes | None) -> MachineProbe | None:
    """The ceilings at this moment."""
    return probes.measure(torch.get_num_threads()) if probes is not None else None


def measure(row: Row, now: MachineProbe | None, seconds: float, memory: bool) -> dict[str, Any]:
    """One row of the report."""
    functions = row_runners(row)
    result = compare(functions, seconds=seconds)
    peers = [name for name in functions if name != OURS]
    del functions
    floor = None
    if now is not None and not isinstance(row, AttentionCase):
        floor = row.floor(ceilings(now))
    return {
        "name": row.name,
        "kind": "attention" if isinstance(row, AttentionCase) else "recurrence",
        "case": {key: value for key, value in dataclasses.asdict(row).items() if key != "dtype"},
        "seconds": {name: result.median(name) for name in result.samples},
        "best_seconds": {name: result.best(name) for name in result.samples},
        "ratio": {peer: result.ratio(peer, OURS) for peer in peers},
        "ratio_quartiles": {peer: result.ratio_range(peer, OURS) for peer in peers},
        "rounds": len(result.samples[OURS]),
        "floor_seconds": floor,
        "peak_mib": {name: peak_mib(row, name) for name in result.samples} if memory else None,
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


def run(rows: Sequence[Row], seconds: float, memory: bool) -> dict[str, Any]:
    """Measures the rows; the probes are taken before and after, and floors use those taken before."""
    try:
        probes = Probes()
    except ProbesUnavailable as error:
        print(f"no floors: {error}", file=sys.stderr)
        probes = None
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"other work runs here (load average {load:.1f}): threads will wait for each other", file=sys.stderr)
    before = probe(probes)
    entries = []
    for number, row in enumerate(rows):
        entries.append(measure(row, before, seconds, memory))
        print(f"[{number + 1}/{len(rows)}] {line(entries[-1])}", flush=True)
    after = probe(probes)
    return {
        "machine": machine(),
        "software": software(),
        "date": datetime.date.today().isoformat(),
        "load_before": load,  # average over the minute before: what else was running
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
    top.add_argument("--seconds", type=float, metavar="S", help="time for each row (default 2.5, smoke 0.3)")
    top.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
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
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = chosen([row for row in rows if row.name in SMOKE] if arguments.smoke else rows, arguments.only)
    if not rows:
        print(f"no row matches {' '.join(arguments.only)}: see --list", file=sys.stderr)
        return 2
    seconds = arguments.seconds or (0.3 if arguments.smoke else 2.5)
    report = run(rows, seconds, memory=not arguments.no_memory)
    partial = arguments.smoke or arguments.only
    where = arguments.out or (ROOT / "build" / "benchmarks" if partial else RESULTS)
    folder = folder_for(where, report["machine"])
    render.write(report, folder)
    print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
