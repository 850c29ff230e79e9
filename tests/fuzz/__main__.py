"""Fuzzes what users call: `python -m tests.fuzz --seconds 120`; `python -m tests.fuzz "ModuleCase(...)"` repeats one.

A child does the work and tells in a file what it is at, so that a crash or a hang shows which case did it.
"""

import argparse
import faulthandler
import random
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import cases, loss
from tests.fuzz.checks import check

PATIENCE = 120  # seconds without a new case, counted while this process is not stopped itself
FAILED = 3  # the child's answer if it has told of a case; a sanitizer's is 1
STRATEGIES = {
    "module": cases.module_cases(),
    "keyword": cases.keyword_cases(),
    "attention": cases.attention_cases(),
    "loss": loss.loss_cases(),
}


def repeat(case: cases.Case | str) -> str:
    return f"python -m tests.fuzz {shlex.quote(str(case))}"


def run(name: str, number: int, examples: int, journal: Path | None = None) -> str:
    """Checks random cases; returns the smallest that fails with its traceback, or nothing."""
    failed: list[str] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(STRATEGIES[name])
    def attempt(case: cases.Case) -> None:
        if journal is not None:  # at once, so that what reads it never finds a part
            new = journal.with_suffix(".new")
            new.write_text(repr(case))
            new.replace(journal)
        try:
            check(case)
        except Exception:
            failed[:] = [f"{traceback.format_exc()}\nReproduce: {repeat(case)}"]
            raise

    try:
        attempt()
    except Exception:
        return failed[0] if failed else traceback.format_exc()
    return ""


def child(seconds: float, number: int, names: list[str], journal: Path) -> int:
    faulthandler.enable()
    end, rounds, examples = time.monotonic() + seconds, 0, 100
    while time.monotonic() < end:
        for name in names:
            failure = run(name, number + rounds, examples, journal)
            if failure:
                print(failure, flush=True)
                return FAILED
        rounds += 1
    print(f"{rounds * len(names) * examples} cases, none failed", flush=True)
    return 0


def watch(arguments: argparse.Namespace) -> int:
    number = random.randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"seed {number}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "case"
        command = ["--seconds", str(arguments.seconds), "--seed", str(number), "--journal", str(journal)]
        for name in arguments.only:
            command += ["--only", name]
        process = subprocess.Popen([sys.executable, "-m", "tests.fuzz", *command])
        last, idle = "", 0
        while process.poll() is None and idle < PATIENCE:
            time.sleep(1)
            now = journal.read_text() if journal.exists() else ""
            last, idle = now, idle + 1 if now == last else 0
        if process.poll() is None:
            process.kill()
            process.wait()
            end = f"no end after {PATIENCE} s"
        elif process.returncode in (0, FAILED):
            return process.returncode
        else:
            end = f"died with {process.returncode}"
        where = f"\nReproduce: {repeat(journal.read_text())}" if journal.exists() else " before its first case"
        print(end + where, flush=True)
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("case", nargs="?", help="the repr of a case, to run it alone")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, help="of the first cases; by default another one every time")
    parser.add_argument("--only", action="append", default=[], choices=STRATEGIES, help="a kind of cases; or all")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        check(eval(arguments.case, vars(cases) | vars(loss)))
        print("passed")
        return 0
    if arguments.journal:
        return child(arguments.seconds, arguments.seed, arguments.only or list(STRATEGIES), arguments.journal)
    return watch(arguments)


if __name__ == "__main__":
    sys.exit(main())
