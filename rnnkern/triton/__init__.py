"""Kernels in Triton: GPUs of NVIDIA, AMD and Intel without any compiler but Triton's, which comes with torch for them.

  cells/         the pointwise maths of each cell, forward and backward
  sequence.py    which step of a row comes when, and where it lies; pointwise.py: one step of a tile of rows and units
  stepwise.py    engine: torch multiplies by the recurrent weights, one kernel per step does the rest
  resident.py    engine: one program runs all steps of a tile of rows, the weights stay in it
  grid.py        engine: the programs of a cooperative launch share the units, and show each other h after each step
  config.py      which engine, and how it cuts a layer; layer.py: the layer around the recurrence
  tune.py        measures what config.py could choose; table.py: the user's own table, where the fastest stands
  activations.py tanh and sigmoid, for the cells; arithmetic.py: products
  attention.py   attention, forward and backward: which kernels run; attention_call.py: its arguments and their cut
  attention_single.py  kernels for one query per row
  attention_pairs.py   kernels for several; attention_additive.py: additive scores; attention_many.py: the launches
  attention_parts.py   what these kernels share
  linear_cross_entropy.py  the loss of a chunk of logits and its gradient
  launch.py      the one way to run a kernel; compile.py: all kernels ahead of time, and what they need
  probe.py       whether Triton runs anything on a GPU at all, found out before a layer does

Importing this package imports no Triton: that takes time, and most processes on a CPU never need it.
"""

import importlib.util
import os
import re
from pathlib import Path

import numpy

CELLS = frozenset(path.stem for path in Path(__file__).parent.glob("cells/[!_]*.py"))
OLDEST = (3, 6)  # Triton's version; older ones lack tuples of tensors in kernels


def interprets() -> bool:
    """Whether Triton runs kernels by its interpreter, which takes tensors on the CPU: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _look() -> tuple[str, str]:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "", "Triton is not installed"
    found = re.search(r"""^__version__ = ['"]((\d+)\.(\d+)[^'"]*)""", Path(spec.origin).read_text(), re.MULTILINE)
    version = "of an unknown version" if found is None else found[1]
    if found is None or (int(found[2]), int(found[3])) < OLDEST:
        return version, f"the kernels need Triton {'.'.join(map(str, OLDEST))} or later, this is {version}"
    return version, ""


version, reason = _look()  # Triton's, and why it cannot be used here, "" if it can
available = not reason


def interpreter_refusal(version: str, numpy_version: str) -> str:
    """Why Triton's interpreter cannot run our kernels, "" if it can.

    Triton 3.6 takes a loop's bound as int(array of one element), which NumPy refuses from 2.4 on; 3.7 does not.
    """
    if version.startswith("3.6.") and tuple(map(int, numpy_version.split(".")[:2])) >= (2, 4):
        return f"the interpreter of Triton {version} needs NumPy before 2.4, this is {numpy_version}"
    return ""


interpreter_reason = interpreter_refusal(version, numpy.__version__)


def missing_on(device: str) -> str:
    """Why no Triton kernel runs on tensors of a type of device, "" if they run."""
    if device not in ("cpu", "cuda", "xpu"):
        return f"the tensors are on {device}, not on a GPU"
    if device == "cpu" and not reason and not interprets():
        return "Triton's kernels run on GPUs; on a CPU its interpreter alone runs them, for tests: TRITON_INTERPRET=1"
    return reason or (interpreter_reason if interprets() else "")
