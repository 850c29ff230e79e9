"""Measures rows one after another for as long as there is time, and keeps what was measured whatever happens."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.machine import CannotRun
from benchmarks.gpu.results import Part, Results

ROW_LIMIT = 120.0  # seconds: a kernel that waits for ever is not worth a GPU's loan
SAVE_EVERY, STATE_EVERY = 5.0, 20.0
HUNG = 3  # exit status


class Row:
    """A name, and what measures it."""

    def __init__(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        self.name, self.measure = name, measure


def _end_process(part: Part, name: str) -> None:
    print(f"{name}: no end after {ROW_LIMIT:.0f} s; run again to go on behind it", file=sys.stderr, flush=True)
    part.add(name, {"failed": f"no end after {ROW_LIMIT:.0f} s"})
    part.end()
    os._exit(HUNG)  # the thread that waits for the GPU cannot be told


def run(
    results: Results,
    name: str,
    rows: Sequence[Row],
    line: Callable[[str, dict[str, Any]], str],
    *,
    seconds: float,
    again: bool,
) -> int:
    """Measures the rows that these sources have not been measured with, or all `again`.

    Returns:
        1 if a row or a part of it failed, a result disagrees, or time was not enough; else 0.

    Raises:
        CannotRun: a row broke the GPU's context. It counts as measured, so that the next run goes on behind it.
    """
    part = results.begin(name)
    left = [row for row in rows if again or not part.has(row.name)]
    print(f"{name}: {len(left)} of {len(rows)} rows are to be measured", flush=True)
    start = saved = time.perf_counter()
    noted, wrong = 0.0, 0
    for number, row in enumerate(left):
        now = time.perf_counter()
        if now - start > seconds:
            print(f"{name}: the time is spent, {len(left) - number} rows are left: run again to go on")
            wrong = 1
            break
        if now - noted > STATE_EVERY:
            part.note_state()
            noted = now
        if now - saved > SAVE_EVERY:
            results.save()
            saved = now
        watchdog = threading.Timer(ROW_LIMIT, _end_process, (part, row.name))
        watchdog.daemon = True
        watchdog.start()
        try:
            found = row.measure()
        except torch.AcceleratorError as error:
            part.add(row.name, {"failed": str(error).split("\n")[0]})
            part.end()
            raise CannotRun(f"{row.name} broke the GPU's context: {error}; run again to go on behind it") from None
        except Exception as error:  # the rows after it may be right
            found = {"failed": (str(error).strip() or type(error).__name__).split("\n")[0][:300]}
        finally:
            watchdog.cancel()
        torch.cuda.empty_cache()
        part.add(row.name, found)
        wrong = wrong or int("failed" in found or bool(found.get("disagrees") or found.get("broken")))
        print(f"[{number + 1}/{len(left)}] {line(row.name, found)}", flush=True)
    part.end()
    print(f"written to {results.path}")
    return wrong
