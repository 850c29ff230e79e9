"""Builds, tests and measures rnnkern on the GPU at hand, in parts that each fit ten minutes: `make gpu-report`.

Every part adds to benchmarks/results/<GPU>/gpu.json. A row that the present sources were measured with is left out,
so that a part that ran out of time goes on where it stopped when it is run again.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT
from benchmarks.gpu import cases, commands, functional, layers, summary
from benchmarks.gpu.device import DeviceClock
from benchmarks.gpu.machine import CannotRun, need_engines, need_gpu
from benchmarks.gpu.results import NAME, Results
from benchmarks.gpu.sweep import Row, run
from rnnkern import triton
from rnnkern.__main__ import seconds as some_seconds

PARTS = ("build", "tests", "sanitize", "latencies", "layers", "kernels", "attention", "loss", "summary")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--part", choices=PARTS, help="one part (default: all, each in a process of its own)")
    top.add_argument("--list", action="store_true", help="print the rows of the part and stop; needs no GPU")
    top.add_argument("--seconds", type=some_seconds, default=540, metavar="S", help="time for a part (default 540)")
    top.add_argument("--each", type=some_seconds, default=0.2, metavar="S", help="time for a row (default 0.2)")
    top.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds TEXT")
    top.add_argument("--again", action="store_true", help="also rows that these sources have been measured with")
    top.add_argument("--tools", nargs="+", choices=commands.TOOLS, default=commands.TOOLS, help="of compute-sanitizer")
    top.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the GPUs' folders (default benchmarks/results)"
    )
    cases.add_arguments(top)
    return top


def layer_rows(arguments: argparse.Namespace) -> list[cases.LayerCase]:
    return [row for row in cases.chosen(arguments) if arguments.only in row.name]


def kernel_rows(arguments: argparse.Namespace) -> list[cases.LayerCase]:
    """Profiles of thousands of launches take long, and say nothing that those of a hundred steps do not."""
    return [row for row in layer_rows(arguments) if row.case.T in cases.FIRST["T"]]


def functional_rows(part: str, arguments: argparse.Namespace) -> list[functional.Case]:
    of = {"attention": functional.attention_cases, "loss": functional.loss_cases}
    return [row for row in of[part]() if arguments.only in row.name]


def names(part: str, arguments: argparse.Namespace) -> list[str]:
    """What the part would measure."""
    if part in ("attention", "loss"):
        return [row.name for row in functional_rows(part, arguments)]
    if part in ("layers", "kernels"):
        return [row.name for row in (layer_rows if part == "layers" else kernel_rows)(arguments)]
    if part == "latencies":
        return list(commands.latency_names())
    return commands.sanitized(arguments.tools, arguments.only) if part == "sanitize" else [part]


def run_layers(arguments: argparse.Namespace) -> int:
    need_engines()
    clock = DeviceClock()
    rows = [Row(row.name, lambda row=row: layers.measure(row, clock, arguments.each)) for row in layer_rows(arguments)]
    return run_rows("layers", rows, layers.line, arguments)


def run_kernels(arguments: argparse.Namespace) -> int:
    need_engines()
    rows = [Row(row.name, lambda row=row: layers.measure_kernels(row)) for row in kernel_rows(arguments)]
    return run_rows("kernels", rows, layers.kernels_line, arguments)


def run_functional(arguments: argparse.Namespace) -> int:
    need_engines()
    clock = DeviceClock()
    chosen = functional_rows(arguments.part, arguments)
    rows = [Row(row.name, lambda row=row: functional.measure(row, clock, arguments.each)) for row in chosen]
    return run_rows(arguments.part, rows, functional.line, arguments)


def run_rows(part: str, rows: list[Row], line: Callable[[str, dict], str], arguments: argparse.Namespace) -> int:
    results = Results.of_this_gpu(arguments.out)
    return run(results, part, rows, line, seconds=arguments.seconds, again=arguments.again)


def summarize(arguments: argparse.Namespace) -> int:
    folders = sorted(path.parent for path in (arguments.out or RESULTS).glob(f"*/{NAME}"))
    if not folders:
        raise CannotRun(f"no results of a GPU: no {NAME} below {arguments.out or RESULTS}")
    for folder in folders:
        summary.write(folder)
    return 0


def run_part(arguments: argparse.Namespace) -> int:
    """Runs one part; its exit status."""
    if arguments.part == "build":
        return commands.build(arguments.seconds)
    own = {"layers": run_layers, "kernels": run_kernels, "summary": summarize}
    own |= dict.fromkeys(("attention", "loss"), run_functional)
    if arguments.part in own:
        return own[arguments.part](arguments)
    need_gpu()
    results = Results.of_this_gpu(arguments.out)
    if arguments.part == "tests":
        return commands.tests(results, arguments.seconds)
    if arguments.part == "sanitize":
        return commands.sanitize(results, arguments.seconds, names("sanitize", arguments))
    return commands.latencies(results, arguments.seconds)


def run_all(argv: Sequence[str]) -> int:
    """Every part in a process of its own: what the build made is loaded, and a part that crashes ends alone."""
    told = []
    for part in PARTS:
        begin = time.perf_counter()
        status = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *argv, "--part", part], cwd=ROOT).returncode
        told.append((part, status, time.perf_counter() - begin))
        if part == "build" and (status == 1 or (status != 0 and not triton.available)):
            break  # without nvcc there is Triton
    for part, status, seconds in told:
        print(f"{part:<10} {'done' if status == 0 else f'exit status {status}'} in {seconds:.0f} s")
    return int(any(status != 0 for _, status, _ in told))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 2 where it cannot run, 1 where something is wrong or left."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(given)
    if arguments.list:
        print(
            "\n".join(
                name for part in ([arguments.part] if arguments.part else PARTS) for name in names(part, arguments)
            )
        )
        return 0
    try:
        if arguments.part is None:
            need_gpu()
            return run_all(given)
        return run_part(arguments)
    except CannotRun as error:
        print(f"{arguments.part or 'gpu-report'}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
