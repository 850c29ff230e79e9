"""`python -m rnnkern info`, `bench` and `tune`: what this installation is, how fast it is here, and how it could be."""

import argparse
import functools
import itertools
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import rnnkern
from rnnkern import _library, triton
from rnnkern._bench.cases import OURS, TORCH, Case, runners
from rnnkern._bench.machine import cpu_name
from rnnkern._bench.probes import Probes, ProbesUnavailable, ceilings
from rnnkern._bench.timing import compare
from rnnkern.ops import _dispatch
from rnnkern.triton import probe

CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh", "rnn_relu": "rnn_relu"}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def positive(text: str) -> int:
    """A whole number of at least one, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def seconds(text: str) -> float:
    """A positive number of seconds, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def device(text: str) -> torch.device:
    """A device of torch, for argparse."""
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m rnnkern", description="Fused recurrent and attention kernels for PyTorch."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="{info,bench,tune}")
    commands.add_parser("info", help="print versions, instruction set, backends, threads and build")
    bench = commands.add_parser(
        "bench",
        help="compare with torch.nn on this machine",
        description="Runs one workload on rnnkern and on torch.nn in turns; prints medians, the median of the paired "
        "ratios with its quartiles, and how near the machine's floor we come (measuring that needs a C++ compiler).",
    )
    bench.add_argument("cell", choices=CELLS, help="what to run: %(choices)s (rnn is the tanh one)", metavar="CELL")
    bench.add_argument("--T", type=positive, default=100, metavar="N", help="time steps (default %(default)s)")
    bench.add_argument("--B", type=positive, default=32, metavar="N", help="batch (default %(default)s)")
    bench.add_argument("--H", type=positive, default=256, metavar="N", help="hidden size (default %(default)s)")
    bench.add_argument("--I", type=positive, metavar="N", help="input size (default: H)")
    bench.add_argument("--layers", type=positive, default=1, metavar="N", help="stacked layers (default %(default)s)")
    bench.add_argument("--bidirectional", action="store_true", help="both directions")
    bench.add_argument("--train", action="store_true", help="forward and backward (default: forward, no gradients)")
    bench.add_argument("--dtype", choices=DTYPES, default="float32", help="(default %(default)s)")
    bench.add_argument("--threads", type=positive, metavar="N", help="torch's threads (default: torch's own choice)")
    bench.add_argument("--backend", choices=("cpu", "eager"), help="force a backend of rnnkern")
    bench.add_argument(
        "--seconds", type=seconds, default=3.0, metavar="S", help="time to spend measuring (default %(default)s)"
    )
    add_tune(commands)
    return top


def add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `tune`."""
    tune = commands.add_parser(
        "tune",
        help="measure the plans of Triton's engines on this GPU, and use the fastest from then on",
        description="Runs layers of every given cell, dtype, hidden size and batch by every plan that Triton's engines "
        "have for them, forward and backward, and writes the fastest to a table of yours, which goes before the rules "
        "of the library from the next process on. A batch is also for smaller ones, down to half of it. Compiling "
        "takes some seconds for each plan the first time.",
    )
    for option, known, default, words in (
        ("cell", list(CELLS), ["lstm", "gru"], "rnn is the tanh one; "),
        ("dtype", [*DTYPES, "tf32"], ["bfloat16"], "tf32 is float32 whose products may be TF32; "),
    ):
        listed = f"of %(choices)s ({words}default {' '.join(default)})"
        tune.add_argument(f"--{option}", nargs="+", choices=known, default=default, metavar="NAME", help=listed)
    for option, sizes, words in (("H", [256, 512, 1024], "hidden sizes"), ("B", [1, 16, 64], "batches")):
        listed = f"{words} (default {' '.join(map(str, sizes))})"
        tune.add_argument(f"--{option}", nargs="+", type=positive, default=sizes, metavar="N", help=listed)
    tune.add_argument("--T", type=positive, default=100, metavar="N", help="time steps (default %(default)s)")
    tune.add_argument("--bidirectional", action="store_true", help="layers of both directions")
    tune.add_argument("--device", type=device, metavar="NAME", help="such as cuda:1 (default: the current GPU)")
    tune.add_argument(
        "--seconds", type=seconds, default=1.0, metavar="S", help="time to spend on each pass (default %(default)s)"
    )
    tune.add_argument("--table", type=Path, metavar="FILE", help="the table (default: the one that is read)")


def info() -> None:
    """Prints what is installed and what will run."""
    rows = {
        "rnnkern": f"{rnnkern.__version__} ({os.path.dirname(rnnkern.__file__)})",
        "torch": torch.__version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
    }
    extension = _library.extension
    if extension is None:
        rows["isa"] = "none: the compiled kernels are not loaded"
        rows["build"] = _library.reason
    else:
        rows["isa"] = f"{extension.get_isa()} (supported: {', '.join(extension.supported_isas())}; set RNNKERN_CPU_ISA)"
        rows["build"] = ", ".join(f"{key} {value}" for key, value in extension.build_info().items() if value != "")
    for name in _dispatch.BACKENDS:
        why = _dispatch.absence(name)
        rows[f"backend {name}"] = f"no: {why}" if why else "yes"
    if triton.version:
        from rnnkern.triton.tune import kernel_cache

        rows["triton"] = f"{triton.version}, keeps compiled kernels in {kernel_cache()} (TRITON_CACHE_DIR)"
        rows["triton plans"] = plans_line()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def gpu() -> torch.device | None:
    """Where Triton's kernels run unless a device is named: the current GPU, or the CPU where Triton interprets."""
    if triton.interprets():
        return torch.device("cpu")
    kind = next((kind for kind in ("cuda", "xpu") if torch.get_device_module(kind).is_available()), None)
    return None if kind is None else torch.device(kind, torch.get_device_module(kind).current_device())


def plans_line() -> str:
    """Which table of plans holds here."""
    from rnnkern.triton import config, table

    where = gpu()
    if where is None:
        return "by rule (no GPU)"
    name = config.facts_of(where).name
    found, why = table.load(name)
    if why:
        return f"by rule; the table is ignored: {why}"
    return f"{len(found)} of {table.path_of(name)}, others by rule" if len(found) else "by rule (no table)"


def in_unit(value: float) -> str:
    """Seconds, readable."""
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if value >= s), (1e-6, "us"))
    return f"{value / scale:.3g} {unit}" if value < 100 * scale else f"{value / scale:.0f} {unit}"


def bench(arguments: argparse.Namespace) -> None:
    """Measures one case and prints the comparison."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    case = Case(
        CELLS[arguments.cell],
        arguments.T,
        arguments.B,
        arguments.I or arguments.H,
        arguments.H,
        arguments.layers,
        arguments.bidirectional,
        arguments.train,
        DTYPES[arguments.dtype],
    )
    functions = runners(case)
    if arguments.backend:
        free = functions[OURS]

        def forced() -> object:
            with rnnkern.backend(arguments.backend):
                return free()

        functions[OURS] = forced
    begin = time.perf_counter()
    told = rnnkern.explain(lambda: functions[OURS]())
    first_call = time.perf_counter() - begin
    result = compare(functions, seconds=arguments.seconds)
    both = ", bidirectional" if case.bidirectional else ""
    mode = "forward and backward" if case.training else "forward"
    print(
        f"{arguments.cell} T={case.T} B={case.B} I={case.I} H={case.H}, {case.layers} layer(s){both}, {arguments.dtype}"
    )
    print(f"{mode}, {torch.get_num_threads()} thread(s), {cpu_name()}, {len(result.samples[OURS])} rounds")
    backends = ", ".join(sorted({note.backend for note in told.layers}))
    print(f"  {OURS:<10} {in_unit(result.median(OURS)):>9}  backend {backends}" + (f", {told.isa}" if told.isa else ""))
    print(f"  {'first call':<10} {in_unit(first_call):>9}")
    low, high = result.ratio_range(TORCH, OURS)
    ratio = f"{result.ratio(TORCH, OURS):.2f} times as fast ({low:.2f} to {high:.2f})"
    print(f"  {TORCH:<10} {in_unit(result.median(TORCH)):>9}  rnnkern is {ratio}")
    print(f"  {'floor':<10} {floor_line(case, result.median(OURS))}")


def floor_line(case: Case, ours: float) -> str:
    """The floor of the case here, and how near to it `ours` comes."""
    try:
        floor = case.floor(ceilings(Probes().measure(torch.get_num_threads())))
    except ProbesUnavailable as error:
        return f"unknown: {error}"
    if floor is None:
        return "unknown: the formula is for float32"
    return f"{in_unit(floor):>9}  rnnkern runs at {100 * floor / ours:.0f}% of the floor's speed"


def tune(arguments: argparse.Namespace) -> None:
    """Measures plans of Triton's engines and writes the table.

    Raises:
        rnnkern.BackendUnavailable: Triton's kernels run nowhere here.
        OSError: the table cannot be read or written.
        ValueError: the file is no table.
    """
    if why := _dispatch.absence("triton"):
        raise rnnkern.BackendUnavailable(why)
    from rnnkern.triton import config, table, tune

    where = arguments.device or gpu()
    assert where is not None  # or the backend would be absent
    if where.type in ("cuda", "xpu") and (where.index or 0) >= torch.get_device_module(where).device_count():
        raise rnnkern.BackendUnavailable(f"torch {torch.__version__} finds no {where}")
    if why := probe.refusal(where):
        raise rnnkern.BackendUnavailable(why)
    name = config.facts_of(where).name
    path = arguments.table or table.path_of(name) or table.default_path(name)
    dtypes = {**{name: (dtype, False) for name, dtype in DTYPES.items()}, "tf32": (torch.float32, True)}
    works = [
        table.Work(CELLS[cell], *dtypes[dtype], H, 2 if arguments.bidirectional else 1, B, backward)
        for cell, dtype, H, B, backward in itertools.product(
            arguments.cell, arguments.dtype, arguments.H, arguments.B, (False, True)
        )
    ]
    measure = functools.partial(tune.median_seconds, seconds=arguments.seconds)
    cuda = where.type == "cuda" and not _library.missing_on(where)["cuda"]
    tune.tune(works, arguments.T, where, path, measure, cuda=cuda)
    if path != table.path_of(name):
        print(f"read from the next process on if {table.VARIABLE}={path} is set")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        if _library.extension is not None:
            _library.extension.get_isa()
    except RuntimeError as error:  # RNNKERN_CPU_ISA names none
        print(f"python -m rnnkern: error: RNNKERN_CPU_ISA: {error}", file=sys.stderr)
        return 2
    if arguments.command == "info":
        info()
        return 0
    try:
        {"bench": bench, "tune": tune}[arguments.command](arguments)
    except (rnnkern.BackendUnavailable, OSError, ValueError) as error:
        print(f"python -m rnnkern {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
