"""Which engine runs a layer, and how it cuts it: from a table by device and size, never by trying at the first call.

A plan of the user's own table (table.py), which `python -m rnnkern tune` measures, goes before the rules here. Their
numbers come from what the compiler says of registers and shared memory (compile.py, resources.json) and from the napkin
maths at the heads of the engines; none was measured on a GPU.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rnnkern.cells import CELLS
from rnnkern.triton import interprets, table
from rnnkern.triton.table import Plan, Work

# AMD's compiler keeps weights in registers, of which a program of 4 warps has 512 KB; above these bytes it spills.
REGISTER_WEIGHTS = {"resident": 49152, "grid": 131072}
# Any GPU's compiler keeps them there if a grid's slices are of 16: with 8 warps 81920 bytes do not spill, 114688 do.
SLICES_OF_16 = 81920


class Facts(NamedTuple):
    """What is to be known of a device."""

    kind: str  # "cuda", "hip", "xpu", or "interpreter"
    multiprocessors: int
    shared_bytes: int  # that one program may have
    name: str = ""  # by which a table of plans is kept; "": none is

    @property
    def cooperative(self) -> bool:
        """Whether all programs of a launch can be made to run at once, and to see what others have stored.

        Every NVIDIA GPU that Triton compiles for launches so. AMD's do, too; but what Triton makes of `grid.arrive` for
        them lets the first wave of a program wait for its own stores alone: not there, until hardware has proven it.
        """
        return self.kind == "cuda"


_pretended: Facts | None = None  # of the process, not of a thread: compile.py and tests alone set it


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
        return Facts("interpreter", 132, 232448, "interpreter")  # an H100's sizes: plans are what a GPU would have
    if device.type == "xpu":
        gpu = torch.xpu.get_device_properties(device)
        return Facts("xpu", gpu.gpu_subslice_count, 65536, gpu.name)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Facts("hip", found.multi_processor_count, 65536, found.name)
    shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Facts("cuda", found.multi_processor_count, shared, found.name)


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


def _stepwise(H: int, elements: int = 512) -> Plan:
    units = min(power_of_two(H), 128)
    return Plan("stepwise", rows=max(elements // units, 1), units=units, warps=4)


def _no_room(engine: str, weights: int, scratch: int, facts: Facts) -> str:
    """Why a program cannot hold so many bytes of weights, "" if it can."""
    room = REGISTER_WEIGHTS[engine] if facts.kind == "hip" else facts.shared_bytes - scratch
    return f"a program has room for {room} bytes of W_hh, and needs {weights}" if weights > room else ""


def _resident(work: Work, facts: Facts, rows: int = 0, warps: int = 0) -> Plan | str:
    """The plan, or why there is none; 0: by rule."""
    units = max(power_of_two(work.H), 16)
    size = _weight_bytes(work, facts)
    many = divide_up(work.B, 16) * work.D > 2 * facts.multiprocessors  # programs enough: larger ones spare weights
    warps = warps or (4 if facts.kind == "hip" or units < 64 else 8)
    large = many and units <= 64 and warps == 8 and size == 2  # of wider weights, 32 rows spill
    rows = rows or (32 if large else 16)
    # Besides weights: a tile of the state on its way from one layout to another, in float32, or in two parts of TF32.
    why = _no_room("resident", _gates(work) * units * units * size, rows * units * max(size, 4), facts)
    return why or Plan("resident", rows, units, warps)


def _grid(work: Work, facts: Facts, rows: int = 16, units: int = 16, warps: int = 0) -> Plan | str:
    """The plan, or why there is none; 0: by rule."""
    H, size = work.H, _weight_bytes(work, facts)
    warps = warps or (4 if facts.kind == "hip" else 8)

    def weights_in(slice_size: int) -> int:
        return _gates(work) * units * divide_up(H, warps * slice_size) * warps * slice_size * size

    longest = max(16, power_of_two(divide_up(H, warps)))
    few = longest == 16 or weights_in(16) <= SLICES_OF_16
    sizes = (32, 16) if work.dtype == torch.float32 else (64, 32, 16)
    slice_size = min((s for s in sizes if s <= longest and (few or s > 16)), key=weights_in)  # pads H least
    weights = weights_in(slice_size)
    # Besides weights: h of a chunk on its way into products, and after these the slices' sums; neither is in two parts
    # of TF32, as `size` has it.
    scratch = rows * warps * max(slice_size * min(size, 4), units * 4)
    why = _no_room("grid", weights, scratch, facts)
    if why:
        return why
    # A kernel that launches at all has room for one program on each multiprocessor, whatever its registers and shared
    # memory; a MIG slice is a device with a count of its own. Where a process has fewer than its device (MPS, green
    # contexts), the driver refuses the launch, and launch.py says so: no program waits for one that cannot start.
    programs = divide_up(H, units) * divide_up(work.B, rows) * work.D
    if facts.cooperative and programs > facts.multiprocessors:
        return f"{programs} programs must run at once, the device has {facts.multiprocessors} multiprocessors"
    if work.dtype == torch.float32 and not work.backward:
        slice_size = 16  # has room where longer ones have, and spills less; backward spills more by it
    return Plan("grid", rows, units, warps, warps, slice_size, facts.cooperative)


def _gates(work: Work) -> int:
    return len(CELLS[work.cell].gates)


def _weight_bytes(work: Work, facts: Facts) -> int:
    """Of a weight that a program holds: of three products of TF32 two numbers."""
    return work.dtype.itemsize * (2 if precision(facts, work.dtype, work.tf32) == "tf32x3" else 1)


def _cut(engine: str, work: Work, facts: Facts, **how: int) -> Plan | str:
    """How an engine cuts a layer, by rule but for `how`; or why it cannot run it."""
    if engine == "stepwise":
        return _stepwise(work.H, **how)
    if work.dtype == torch.float64:
        return "float64 is for the stepwise engine"
    return (_resident if engine == "resident" else _grid)(work, facts, **how)


# What a table may choose among. On AMD's GPUs 8 warps leave each too few registers for weights.
_WAYS: tuple[tuple[str, dict[str, int]], ...] = (
    *(("stepwise", {"elements": elements}) for elements in (256, 512, 1024)),
    *(("resident", {"rows": rows, "warps": warps}) for rows, warps in itertools.product((16, 32), (4, 8))),
    *(("grid", {"rows": rows, "units": units}) for rows, units in itertools.product((16, 32), (16, 32))),
    ("grid", {"warps": 4}),
)


@functools.lru_cache(maxsize=1024)
def cuts(work: Work, facts: Facts) -> tuple[Plan, ...]:
    """All plans that could run a pass; those of the rules are among them."""
    found = [
        _cut(engine, work, facts, **how) for engine, how in _WAYS if facts.kind != "hip" or how.get("warps", 4) == 4
    ]
    return tuple(dict.fromkeys(plan for plan in found if isinstance(plan, Plan)))


def measured(device: torch.device) -> bool:
    """Whether the user's table for a device has anything that was measured on the CUDA backend, too."""
    return any(entry.cuda_seconds is not None for entry in table.load(facts_of(device).name)[0])


def measured_seconds(
    cell: str, dtype: torch.dtype, H: int, B: int, D: int, tf32: bool, facts: Facts, gradients: bool
) -> dict[str, float]:
    """What a layer took by "cuda" and by "triton", of which the user's table is to have both; if not, nothing.

    The forward pass; with gradients the backward pass, too, since one backend runs both. Other arguments: see `plan`.
    """
    seconds = {"cuda": 0.0, "triton": 0.0}
    for backward in (False, True) if gradients else (False,):
        work = Work(cell, dtype, tf32 and dtype == torch.float32, H, D, B, backward)
        entry = table.find_measured(facts.name, work)
        if entry is None or entry.cuda_seconds is None or entry.plan not in cuts(work, facts):
            return {}
        seconds["cuda"] += entry.cuda_seconds
        seconds["triton"] += entry.seconds
    return seconds


def plan(
    cell: str,
    dtype: torch.dtype,
    H: int,
    B: int,
    D: int,
    engine: str,
    tf32: bool,
    facts: Facts,
    backward: bool = False,
) -> Plan:
    """Chooses an engine and cuts a layer for it.

    Args:
        cell: its name.
        dtype: of x.
        H: hidden size.
        B: rows.
        D: directions.
        engine: that the caller wants, or "" for that of the user's table, or else the first of resident, grid and
            stepwise that can run.
        tf32: whether products of float32 may be TF32.
        facts: of the device.
        backward: the pass; by rule both have the same engine, by a table each its own.

    Raises:
        RuntimeError: `engine` cannot run this; the message says "cannot run: " and why.
    """
    work = Work(cell, dtype, tf32 and dtype == torch.float32, H, D, B, backward)
    tuned = table.find(facts.name, work)
    if tuned is not None and engine in ("", tuned.engine) and tuned in cuts(work, facts):
        return tuned
    resident_or_grid = () if facts.kind == "xpu" else ("resident", "grid")  # nobody has compiled these for xpu
    why = ""
    for candidate in (engine,) if engine else (*resident_or_grid, "stepwise"):
        found = _cut(candidate, work, facts)
        if isinstance(found, Plan):
            return found
        why = found
    raise RuntimeError(f"the {engine} engine cannot run: {why}")
