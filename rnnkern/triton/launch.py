"""The one way to run a kernel; and what a launch would compile, for a GPU that is not here."""

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnnkern.triton import config


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments: tensors and numbers in order, constexprs and Triton's options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)


_recorded: list[Launch] | None = None  # of the process, as config's facts are: compile.py and tests have one thread


@contextlib.contextmanager
def recording(facts: config.Facts) -> Iterator[list[Launch]]:
    """Inside, layers are cut for a GPU of these facts, and what would be launched is listed instead."""
    global _recorded
    launches: list[Launch] = []
    with config.pretending(facts):
        before, _recorded = _recorded, launches
        try:
            yield launches
        finally:
            _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the current stream; an empty grid is no launch."""
    if 0 in grid:
        return
    constants["enable_fp_fusion"] = True  # a * b + c in one instruction: Triton from 3.10 on does so on request only
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants))
        return
    try:
        kernel[grid](*arguments, **constants)
    except RuntimeError as error:
        if "cooperative launch" not in str(error):  # the driver's words where programs cannot all run at once
            raise
        raise RuntimeError(
            f"the driver refuses to run {math.prod(grid)} programs of the grid engine at once: this process has fewer "
            'multiprocessors than its device; force another engine: rnnkern.backend("triton", engine="stepwise")'
        ) from error


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's device the current one, on which Triton launches."""
    if x.device.type in ("cpu", "meta"):
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(x.device).device(x.device)
    return guard
