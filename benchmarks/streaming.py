"""One step per call, B=1, in a tight loop and every 10 ms: `python -m benchmarks.streaming --help`.

A stream of audio frames calls every 10 ms. Its thread sleeps in between (`asleep`) and finds cool caches, a slow clock
and worker threads asleep; or it is busy with something else (`awake`), so that the workers alone have gone to sleep.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import (
    PARTIAL,
    RESULTS,
    add_run_arguments,
    describe,
    environment,
    folder_for,
    write_json,
)
from benchmarks.onnx_model import onnx_model
from benchmarks.peers import PeerDisagrees
from benchmarks.render import table
from benchmarks.runtimes import BoundSession, PeerUnavailable, onnxruntime_session
from rnnkern.__main__ import positive
from rnnkern.__main__ import seconds as some_seconds
from rnnkern._bench.cases import CELLS, OURS, TORCH, Case, first_tensor, modules

HIDDEN = (64, 128, 256, 512)
KINDS = ("gru", "lstm", "gru-cell", "lstm-cell")
STEP, IN_PLACE, RUNTIME = "rnnkern step", "rnnkern step in place", "ONNX Runtime"
PERIOD = 0.01
CALLS, BLOCK = 150, 50
WARM = 0.05  # seconds of calls before a measurement
TIGHT, ASLEEP, AWAKE = "tight", "asleep", "awake"
HEAD = (
    "",
    "",
    *(f"{mode}: {what}" for mode in (TIGHT, ASLEEP, AWAKE) for what in ("median, us", "p99")),
    *(f"p99, {mode} / {TIGHT}" for mode in (ASLEEP, AWAKE)),
    f"{TIGHT} median / ours",
)
State = Any  # h, or the pair h, c
Call = Callable[[], State]


def carrying(step: Callable[[Tensor, State], State], x: Tensor, state: State) -> Call:
    """A function that makes one step from where the last one came, and returns the new state."""

    def call() -> State:
        nonlocal state
        state = step(x, state)
        return state

    return call


def in_place(module: nn.Module, x: Tensor, state: State, out: Tensor | None) -> Call:
    """`step` where each new state replaces the last one in its memory, and `out`, if there is one, takes the output."""
    step: Any = module.step
    options = {} if out is None else {"out": out}

    def call() -> State:
        step(x, state, inplace=True, **options)
        return state

    return call


def first_state(case: Case, shape: tuple[int, ...]) -> State:
    """Zeros in the form that the module takes."""
    h = torch.zeros(shape)
    return (h, torch.zeros(shape)) if case.cell == "lstm" else h


def runtime_runner(case: Case, module: nn.RNNBase) -> Call:
    """ONNX Runtime on bound inputs and outputs: two sets of states, each in turn the input and the output.

    Raises:
        PeerUnavailable: onnx or onnxruntime is not installed.
    """
    try:
        session = onnxruntime_session(onnx_model(module, 1, 1, states=True))
    except ImportError as error:
        raise PeerUnavailable(str(error)) from None
    x, y = case.input(), torch.empty(1, 1, case.H)
    sets = [[torch.zeros(1, 1, case.H) for _ in session.get_inputs()[1:]] for _ in range(2)]
    there = BoundSession(session, [x, *sets[0]], [y, *sets[1]])
    back = BoundSession(session, [x, *sets[1]], [y, *sets[0]])
    turns = itertools.cycle([there, back])
    return lambda: next(turns)()  # y, which is h


def streams(case: Case) -> dict[str, Call]:
    """What makes one step of the case, ours first; without what is not there."""
    of = modules(case)
    x = case.input()
    shape = (1, case.H) if case.single_step else (1, 1, case.H)

    def called(function: Callable[..., Any]) -> Callable[[Tensor, State], State]:
        if case.single_step:
            return function
        return lambda x, state: function(x, state)[1]

    ours: Any = of[OURS]
    frame, out = x.reshape(1, case.I), None if case.single_step else torch.empty(1, case.H)
    found = {
        OURS: carrying(called(ours), x, first_state(case, shape)),
        STEP: carrying(called(ours.step), frame, first_state(case, shape)),
        IN_PLACE: in_place(ours, frame, first_state(case, shape), out),
    }
    found[TORCH] = carrying(called(of[TORCH]), x, first_state(case, shape))
    if not case.single_step:
        try:
            found[RUNTIME] = runtime_runner(case, of[TORCH])  # type: ignore[arg-type]
        except PeerUnavailable as error:
            print(f"{RUNTIME} is left out: {error}", file=sys.stderr)
    return found


def check_agreement(calls: Mapping[str, Call]) -> None:
    """Makes a few steps with each and compares the states.

    Raises:
        PeerDisagrees: they differ.
    """
    for _ in range(3):
        states = {name: first_tensor(call()).flatten() for name, call in calls.items()}
    for name, state in states.items():
        if not torch.allclose(state, states[OURS], rtol=0, atol=1e-4):
            raise PeerDisagrees(f"{name} differs from {OURS} by {(state - states[OURS]).abs().max():.1e}")


def times(call: Call, calls: int, period: float, mode: str) -> list[float]:
    """Seconds of each call: one right after the other (TIGHT), or one in each period."""
    taken = []
    due = time.perf_counter()
    for _ in range(calls):
        due += period
        if mode == ASLEEP:
            time.sleep(max(0.0, due - time.perf_counter()))
        while mode == AWAKE and time.perf_counter() < due:
            pass
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def measure(calls: Mapping[str, Call], count: int, period: float) -> dict[str, dict[str, Any]]:
    """Median and 99th percentile of each implementation in each mode, measured in blocks in turn."""
    taken: dict[str, dict[str, list[float]]] = {name: {TIGHT: [], ASLEEP: [], AWAKE: []} for name in calls}
    for _ in range(0, count, BLOCK):
        for name, call in calls.items():
            time.sleep(period)  # the threads of the one before come to rest
            warm_until = time.perf_counter() + WARM
            while time.perf_counter() < warm_until:  # and these start
                call()
            for mode, values in taken[name].items():
                values += times(call, 10 * BLOCK if mode == TIGHT else BLOCK, period, mode)
    return {
        name: {
            mode: {"median": statistics.median(values), "p99": percentile(values, 99), "calls": len(values)}
            for mode, values in modes.items()
        }
        for name, modes in taken.items()
    }


def row(kind: str, H: int, calls: int, period: float) -> dict[str, Any]:
    """One size of one module."""
    cell, _, single = kind.partition("-")
    case = Case(cell, 1, 1, H, H, single_step=bool(single))
    with torch.no_grad():
        found = streams(case)
        check_agreement(found)
        measured = measure(found, calls, period)
    return {"kind": kind, "H": H, "measured": measured}


def figures(entry: dict[str, Any]) -> list[list[str]]:
    """A row's lines: times in us, what a rare slow call costs more when it is paced, and times faster than the peer."""
    cell, _, single = entry["kind"].partition("-")
    ours = entry["measured"][OURS]
    return [
        [
            f"{CELLS[cell]}{'Cell' if single else ''}, H={entry['H']}",
            name,
            *(f"{1e6 * mode[what]:.1f}" for mode in modes.values() for what in ("median", "p99")),
            *(f"{modes[mode]['p99'] / modes[TIGHT]['p99']:.2f}" for mode in (ASLEEP, AWAKE)),
            f"{modes[TIGHT]['median'] / ours[TIGHT]['median']:.2f}",
        ]
        for name, modes in entry["measured"].items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """The table of each number of threads."""
    note = (
        "Microseconds of one step per call, B=1, input size = H, no gradients, the state carried from call to call: in "
        f"a loop (`{TIGHT}`) and every {1e3 * result['period']:g} ms, where the thread sleeps in between (`{ASLEEP}`) "
        f"or is busy with something else (`{AWAKE}`). {RUNTIME} runs on bound inputs and outputs. `{OURS}` is the call "
        "of a module."
    )
    parts = ["# Calls of one step", f"{describe(result)}.", note]
    for section in result["sections"]:
        lines = [line for entry in section["rows"] for line in figures(entry)]
        threads = f"{section['threads']} thread" + ("s" if section["threads"] > 1 else "")
        parts += [f"## {threads}", table(list(HEAD), lines)]
    return "\n\n".join(parts) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.split("\n")[0])
    top.add_argument("--only", choices=KINDS, action="append", help="this module alone; may be repeated")
    top.add_argument("--H", type=positive, action="append", metavar="N", help=f"this size alone (default {HIDDEN})")
    top.add_argument(
        "--calls",
        type=positive,
        default=CALLS,
        metavar="N",
        help=f"calls every period, by {BLOCK} (default %(default)s)",
    )
    top.add_argument(
        "--period", type=some_seconds, default=PERIOD, metavar="S", help="between calls (default %(default)s)"
    )
    add_run_arguments(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    head = environment()
    own = head["machine"]["threads"]
    sections = []
    print("  ".join(HEAD))
    for threads in arguments.threads or [own]:
        torch.set_num_threads(threads)
        section: dict[str, Any] = {"threads": threads, "rows": []}
        for kind in arguments.only or KINDS:
            for H in arguments.H or HIDDEN:
                section["rows"].append(row(kind, H, arguments.calls, arguments.period))
                print("\n".join("  ".join(line) for line in figures(section["rows"][-1])), flush=True)
        sections.append(section)
    torch.set_num_threads(own)
    result = {**head, "period": arguments.period, "sections": sections}
    partial = arguments.only or arguments.H or arguments.calls < CALLS or arguments.period != PERIOD
    folder = folder_for(arguments.out or (PARTIAL if partial else RESULTS), head["machine"])
    write_json(result, folder / "streaming.json")
    (folder / "streaming.md").write_text(markdown(result))
    print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
