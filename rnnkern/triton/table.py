"""The user's own table of plans, which `python -m rnnkern tune` measures and writes, and which config.py prefers.

It also has what the CUDA backend took for the same, by which rnnkern/ops/_dispatch.py prefers one of the two.

A JSON file for each GPU, by its name. A table counts for that GPU and for the versions of Triton and rnnkern that it
was measured with; another one is ignored with a warning, and so is what cannot be read. It lies with the user's
configuration and not in a cache: another engine rounds otherwise, so that emptying caches would change results.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from rnnkern import triton

VARIABLE = "RNNKERN_TRITON_TABLE"  # names the file; empty: no table is read
FORMAT = 2
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


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


class Work(NamedTuple):
    """A pass of a layer of one cell."""

    cell: str
    dtype: torch.dtype  # of x
    tf32: bool  # whether products of float32 may be TF32; False for other dtypes
    H: int
    D: int  # directions
    B: int  # rows
    backward: bool

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        both = ", bidirectional" if self.D == 2 else ""
        return f"{self.cell} {kind} H={self.H} B={self.B}{both} {'backward' if self.backward else 'forward'}"


class Entry(NamedTuple):
    """The plan that was fastest, and what was measured of it."""

    plan: Plan
    seconds: float
    default_seconds: float | None  # of the plan without a table; None: that one failed
    first_call_seconds: float  # with what had to be compiled, or read from Triton's cache
    cuda_seconds: float | None = None  # of the CUDA backend; None: it was not measured


Entries = dict[Work, Entry]


class Unusable(ValueError):
    """A file is no table of plans; the message says why."""


class Foreign(Unusable):
    """A table was measured on another GPU, or with other versions."""


def header(device: str) -> dict[str, Any]:
    """What a table must say of itself to count for a GPU of this name."""
    from rnnkern import __version__

    return {"format": FORMAT, "device": device, "triton": triton.version, "rnnkern": __version__}


def default_path(device: str) -> Path:
    """Below $XDG_CONFIG_HOME, or ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    return folder / "rnnkern" / "triton" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def path_of(device: str) -> Path | None:
    """The file that is read for a GPU; None: the user wants none."""
    named = os.environ.get(VARIABLE)
    return default_path(device) if named is None else Path(named) if named else None


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _entry(line: dict[str, Any]) -> tuple[Work, Entry]:
    kinds = {"engine": str, "cooperative": bool}
    plan = {name: _typed(line["plan"][name], kinds.get(name, int)) for name in Plan._fields}
    sizes = {name: _typed(line[name], int) for name in ("H", "D", "B")}
    dtype, tf32 = DTYPES[line["dtype"]], _typed(line["tf32"], bool)
    work = Work(_typed(line["cell"], str), dtype, tf32, **sizes, backward=_typed(line["backward"], bool))
    default, cuda = (None if line[name] is None else float(line[name]) for name in ("default_seconds", "cuda_seconds"))
    return work, Entry(Plan(**plan), float(line["seconds"]), default, float(line["first_call_seconds"]), cuda)


def read(path: Path, device: str) -> Entries:
    """The table in a file, for a GPU of this name.

    Raises:
        OSError: the file cannot be read.
        Foreign: it was measured on another GPU or with other versions.
        Unusable: it is no table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {name: content[name] for name in ("format", "device", "triton", "rnnkern")}
        if found["format"] == FORMAT:
            entries = dict(_entry(line) for line in content["plans"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Unusable(f"it is no table of plans ({type(error).__name__}: {str(error)[:100]})") from None
    if found != header(device):
        other = ", ".join(f"{name} {found[name]}" for name, value in header(device).items() if found[name] != value)
        raise Foreign(f"it is for {other}")
    return entries


def write(path: Path, device: str, entries: Entries) -> None:
    """Replaces the file as a whole, a line for each plan, so that nobody ever reads half of one."""

    def line(work: Work, entry: Entry) -> str:
        named = work._asdict() | {"dtype": str(work.dtype).removeprefix("torch.")} | entry._asdict()
        return json.dumps(named | {"plan": entry.plan._asdict()})

    lines = ",\n  ".join(line(work, entries[work]) for work in sorted(entries, key=str))
    head = json.dumps(header(device))[1:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(f'{{{head},\n "plans": [\n  {lines}]}}\n')
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


Value = TypeVar("Value")


class Table(Generic[Value]):
    """Plans or entries by work; of batches the least that was measured and is not smaller, up to twice as large."""

    def __init__(self, values: Mapping[Work, Value]) -> None:
        self._values: dict[Work, dict[int, Value]] = {}
        for work, value in values.items():
            self._values.setdefault(work._replace(B=0), {})[work.B] = value

    def __len__(self) -> int:
        return sum(map(len, self._values.values()))

    def __iter__(self) -> Iterator[Value]:
        return itertools.chain.from_iterable(batches.values() for batches in self._values.values())

    def find(self, work: Work) -> Value | None:
        """What counts for a pass, or None."""
        batches = self._values.get(work._replace(B=0))
        if batches is None:
            return None
        batch = min((B for B in batches if work.B <= B <= 2 * work.B), default=None)
        return None if batch is None else batches[batch]


NOTHING: Table[Any] = Table({})


@functools.cache
def load(device: str) -> tuple[Table[Entry], str]:
    """The user's table for a GPU, and what is wrong with it, of which a warning tells once."""
    try:
        path = path_of(device)
        if path is None or (VARIABLE not in os.environ and not path.exists()):
            return NOTHING, ""
        return Table(read(path, device)), ""
    except (OSError, RuntimeError, Unusable) as error:  # RuntimeError: there is no home
        why = str(error) if isinstance(error, OSError | RuntimeError) else f"{path}: {error}"
        advice = "; `python -m rnnkern tune` measures anew" if isinstance(error, Foreign) else ""
        warnings.warn(f"rnnkern ignores its table of plans for Triton: {why}{advice}", RuntimeWarning, stacklevel=2)
        return NOTHING, why


_instead: Table[Plan] | None = None


@contextlib.contextmanager
def using(table: Table[Plan]) -> Iterator[None]:
    """Another table than the user's holds meanwhile, on every device."""
    global _instead
    before, _instead = _instead, table
    try:
        yield
    finally:
        _instead = before


def find_measured(device: str, work: Work) -> Entry | None:
    """The entry of the user's table for a GPU, with what was measured; None: it has none."""
    return load(device)[0].find(work) if device else None


def find(device: str, work: Work) -> Plan | None:
    """The plan of the table that holds for a GPU; "": one of no name, which has none."""
    if _instead is not None:
        return _instead.find(work)
    entry = find_measured(device, work)
    return None if entry is None else entry.plan
