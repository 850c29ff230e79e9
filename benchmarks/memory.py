"""Peak memory of one run, each in a process of its own, so that nothing kept by an earlier run hides it."""

import ctypes
import multiprocessing
import re
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.attention import AttentionCase
from benchmarks.loss import LossCase
from benchmarks.rows import Row, row_builders


def status_kib(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1])


def smallest(row: Row) -> Row:
    """A row that takes next to nothing."""
    if isinstance(row, AttentionCase):
        return replace(row, B=1, Tq=1, Tk=2, D=16)
    return replace(row, N=1, V=2, D=16) if isinstance(row, LossCase) else replace(row, B=1, T=1, I=16, H=16)


def measure_here(row: Row, implementation: str, threads: int) -> float:
    """MiB that a run takes at its peak over what was there before: outputs, workspaces and, in training, gradients."""
    torch.set_num_threads(threads)
    row_builders(smallest(row))[implementation]()()  # libraries and threads start
    function = row_builders(row)[implementation]()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) / 1024


def _child(pipe: Connection, row: Row, implementation: str, threads: int) -> None:
    try:
        pipe.send(measure_here(row, implementation, threads))
    except (OSError, AttributeError):  # no procfs, no malloc_trim, or not allowed
        pipe.send(None)


def peak_mib(row: Row, implementation: str) -> float | None:
    """`measure_here` in a fresh process; None where the system does not tell."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.rows"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, row, implementation, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()
