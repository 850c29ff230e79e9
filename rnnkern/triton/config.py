"""Which engine runs a layer, and how it cuts it: from a table by device and size, never by trying at the first call.

The numbers come from what the compiler says of registers and shared memory (compile.py, resources.json) and from the
napkin maths at the heads of the engines; none was measured on a GPU.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rnnkern.cells import CELLS
from rnnkern.triton import interprets

# Bytes of shared memory that a program has besides weights, at most: sums and changes of layout.
SCRATCH = 20480
# AMD's compiler keeps weights in registers, of which a program of 4 warps has 512 KB; above these bytes it spills.
REGISTER_WEIGHTS = {"resident": 49152, "grid": 131072}


class Facts(NamedTuple):
    """What is to be known of a device."""

    kind: str  # "cuda", "hip", "xpu", or "interpreter"
    multiprocessors: int
    shared_bytes: int  # that one program may have

    @property
    def cooperative(self) -> bool:
        """Whether all programs of a launch can be made to run at once."""
        return self.kind in ("cuda", "hip")


class Plan(NamedTuple):
    """How an engine runs one pass of a layer."""

    engine: str
    rows: int  # of a program
    units: int  # of a program; of resident all, padded to a power of two
    warps: int
    slices: int = 0  # grid: of a chunk of the sum, and their size
    slice_size: int = 0
    cooperative: bool = False  # grid: one launch for all steps

    def __str__(self) -> str:
        how = f"{self.engine}, {self.rows} rows x {self.units} units, {self.warps} warps"
        return f"{how}, a launch per step" if self.engine == "grid" and not self.cooperative else how


_pretended: Facts | None = None


@contextlib.contextmanager
def pretending(facts: Facts) -> Iterator[None]:
    """Plans are made for another device meanwhile."""
    global _pretended
    before, _pretended = _pretended, facts
    try:
        yield
    finally:
        _pretended = before


@functools.cache
def _facts(device: torch.device) -> Facts:
    if interprets():
        return Facts("interpreter", 132, 232448)  # an H100's sizes, so that plans are what a GPU would have
    if device.type == "xpu":
        return Facts("xpu", torch.xpu.get_device_properties(device).gpu_subslice_count, 65536)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Facts("hip", found.multi_processor_count, 65536)
    return Facts("cuda", found.multi_processor_count, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def facts_of(device: torch.device) -> Facts:
    """Of a device of tensors."""
    return _pretended or _facts(device)


def precision(facts: Facts, dtype: torch.dtype, tf32: bool) -> str:
    """How products of this dtype are computed, as `tl.dot` names it."""
    if dtype == torch.float32 and facts.kind == "cuda":
        return "tf32" if tf32 else "tf32x3"  # three products of tf32 parts: errors like those of float32
    return "ieee"


def power_of_two(n: int) -> int:
    """The least that is not less than n."""
    return 1 << max(n - 1, 0).bit_length()


def divide_up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _stepwise(H: int) -> Plan:
    units = min(power_of_two(H), 128)
    return Plan("stepwise", rows=max(512 // units, 1), units=units, warps=4)


def _no_room(engine: str, weights: int, scratch: int, facts: Facts) -> str:
    """Why a program cannot hold so many bytes of weights, "" if it can."""
    room = REGISTER_WEIGHTS[engine] if facts.kind == "hip" else facts.shared_bytes - scratch
    return f"a program has room for {room} bytes of W_hh, and needs {weights}" if weights > room else ""


def _resident(gates: int, H: int, B: int, D: int, size: int, facts: Facts) -> Plan | str:
    """The plan, or why there is none; `size`: bytes of a weight."""
    units = max(power_of_two(H), 16)
    why = _no_room("resident", gates * units * units * size, SCRATCH, facts)
    if why:
        return why
    many = divide_up(B, 16) * D > 2 * facts.multiprocessors  # programs enough: then larger ones, which spare weights
    warps = 4 if facts.kind == "hip" or units < 64 else 8
    return Plan("resident", rows=32 if many and units <= 64 and warps == 8 else 16, units=units, warps=warps)


def _grid(gates: int, H: int, B: int, D: int, size: int, facts: Facts) -> Plan | str:
    """The plan, or why there is none; `size`: bytes of a weight."""
    warps, units, rows = 4 if facts.kind == "hip" else 8, 16, 16
    slice_size = max(16, min(power_of_two(divide_up(H, warps)), 64))
    while slice_size > 16 and divide_up(H, warps * slice_size) * slice_size > divide_up(H, warps * 16) * 16:
        slice_size //= 2  # while that pads H less
    weights = gates * units * divide_up(H, warps * slice_size) * warps * slice_size * size
    why = _no_room("grid", weights, SCRATCH if size < 8 else 2 * SCRATCH, facts)
    if why:
        return why
    programs = divide_up(H, units) * divide_up(B, rows) * D
    if facts.cooperative and programs > facts.multiprocessors:
        return f"{programs} programs must run at once, the device has {facts.multiprocessors} multiprocessors"
    return Plan("grid", rows, units, warps, warps, slice_size, facts.cooperative)


def plan(cell: str, dtype: torch.dtype, H: int, B: int, D: int, engine: str, tf32: bool, facts: Facts) -> Plan:
    """Chooses an engine and cuts a layer for it.

    Args:
        cell: its name.
        dtype: of x.
        H: hidden size.
        B: rows.
        D: directions.
        engine: that the caller wants, or "" for the first of resident, grid and stepwise that can run.
        tf32: whether products of float32 may be TF32.
        facts: of the device.

    Raises:
        RuntimeError: `engine` cannot run this; the message says "cannot run: " and why.
    """
    gates, size = len(CELLS[cell].gates), dtype.itemsize
    if precision(facts, dtype, tf32) == "tf32x3":
        size *= 2  # a weight is kept as two numbers of TF32
    found: Plan | str = _stepwise(H)
    for candidate in ("resident", "grid"):
        if engine != candidate and (engine or facts.kind == "xpu"):  # nobody has compiled these for xpu
            continue
        if dtype == torch.float64:
            found = "float64 is for the stepwise engine"
        elif facts.kind == "interpreter" and dtype == torch.bfloat16:
            found = "Triton's interpreter multiplies bfloat16 wrongly"
        elif candidate == "resident":
            found = _resident(gates, H, B, D, size, facts)
        else:
            found = _grid(gates, H, B, D, size, facts)
        if isinstance(found, Plan):
            return found
    if isinstance(found, str):
        if engine:
            raise RuntimeError(f"the {engine} engine cannot run: {found}")
        return _stepwise(H)
    return found
