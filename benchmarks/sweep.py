"""Random shapes against torch.nn, in search of a cliff: `python -m benchmarks.sweep --help`.

A shape that seems slower than LOSS is measured again, longer, before it counts as lost. Each shape has a name that
`--only` takes back.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.environment import (
    PARTIAL,
    RESULTS,
    add_run_arguments,
    describe,
    environment,
    find_probes,
    folder_for,
    probe,
    write_json,
)
from benchmarks.render import milliseconds, table
from rnnkern.__main__ import positive
from rnnkern.__main__ import seconds as some_seconds
from rnnkern._bench.cases import CELLS, OURS, TORCH, Case, runners
from rnnkern._bench.floors import GATES
from rnnkern._bench.probes import MachineProbe, ceilings
from rnnkern._bench.timing import Comparison, compare

LOSS = 0.95
WORST = 10
COUNT, SEED = 300, 0
MAX_FLOP = 20e9


def flop(case: Case) -> float:
    """Multiply-adds times two of the matrix products; the backward's are twice the forward's."""
    directions = 2 if case.bidirectional else 1
    inputs = [case.I] + [directions * case.H] * (case.layers - 1)
    per_step = sum(2 * directions * GATES[case.cell] * case.H * (size + case.H) for size in inputs)
    return float(case.T * case.B * per_step * (3 if case.training else 1))


def random_case(generator: random.Random) -> Case:
    """A shape of at most MAX_FLOP: sizes log-uniform, half of the hidden sizes rounded to 16."""

    def log_uniform(low: int, high: int) -> int:
        return round(low * (high / low) ** generator.random())

    while True:
        H = log_uniform(8, 1024)
        case = Case(
            generator.choice(list(CELLS)),
            T=log_uniform(1, 2000),
            B=log_uniform(1, 128),
            I=generator.choice([H, log_uniform(1, 1024)]),
            H=H if generator.random() < 0.5 else max(8, round(H / 16) * 16),
            layers=generator.choice([1, 1, 1, 2]),
            bidirectional=generator.random() < 0.25,
            training=generator.random() < 0.5,
        )
        if flop(case) <= MAX_FLOP:
            return case


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Shapes, each once, the same for the same seed."""
    generator, seen = random.Random(seed), set()
    while len(seen) < count:
        case = random_case(generator)
        if case not in seen:
            seen.add(case)
            yield case


def entry_of(case: Case, result: Comparison, now: MachineProbe | None, again: bool) -> dict[str, Any]:
    """A shape's figures."""
    floor = case.floor(ceilings(now)) if now is not None else None
    return {
        "name": case.name,
        "seconds": {name: result.median(name) for name in result.samples},
        "ratio": result.ratio(TORCH, OURS),
        "ratio_quartiles": result.ratio_range(TORCH, OURS),
        "rounds": len(result.samples[OURS]),
        "efficiency": floor / result.median(OURS) if floor else None,
        "measured_again": again,
    }


def measure(case: Case, now: MachineProbe | None, seconds: float) -> dict[str, Any]:
    """A shape's figures; those of a seeming loss are taken again from new modules, in four times the rounds."""
    with torch.set_grad_enabled(case.training):
        entry = entry_of(case, compare(runners(case), seconds=seconds, min_rounds=3), now, again=False)
        if entry["ratio"] >= LOSS:
            return entry
        return entry_of(case, compare(runners(case), seconds=4 * seconds, min_rounds=12), now, again=True)


def line(entry: dict[str, Any]) -> str:
    """A shape for the terminal."""
    ours, theirs = entry["seconds"][OURS], entry["seconds"][TORCH]
    share = f", {100 * entry['efficiency']:3.0f}% of the floor" if entry["efficiency"] else ""
    note = ", measured again" if entry["measured_again"] else ""
    return f"{entry['ratio']:6.2f}x  {1e6 * ours:9.0f} us, torch {1e6 * theirs:9.0f} us{share}  {entry['name']}{note}"


def run(cases: Sequence[Case], seconds: float, budget: float) -> dict[str, Any]:
    """Measures shapes on torch's threads until the budget is spent, printing as it goes."""
    now = probe(find_probes())
    start = time.perf_counter()
    entries: list[dict[str, Any]] = []
    for case in cases:
        if entries and time.perf_counter() - start > budget:
            print(f"the time is spent after {len(entries)} of {len(cases)} shapes", file=sys.stderr)
            break
        entries.append(measure(case, now, seconds))
        print(f"[{len(entries)}/{len(cases)}] {line(entries[-1])}", flush=True)
    entries.sort(key=lambda entry: entry["ratio"])
    return {"threads": torch.get_num_threads(), "shapes": entries}


def lost(section: dict[str, Any]) -> list[dict[str, Any]]:
    """The shapes where we are slower than LOSS allows."""
    return [entry for entry in section["shapes"] if entry["ratio"] < LOSS]


def verdict(section: dict[str, Any]) -> str:
    """The sweep in a sentence."""
    ratios = [entry["ratio"] for entry in section["shapes"]]
    middle = ratios[len(ratios) // 2]
    return (
        f"{len(ratios)} shapes on {section['threads']} thread(s): {len(lost(section))} below {LOSS} of torch.nn's "
        f"speed, {sum(ratio < 1 for ratio in ratios)} below 1; median {middle:.2f} times as fast"
    )


def markdown(result: dict[str, Any]) -> str:
    """The worst shapes of each number of threads."""
    parts = ["# Random shapes", f"{describe(result)}. Shapes of `python -m benchmarks.sweep --seed {result['seed']}`."]
    for section in result["sections"]:
        rows = [
            [
                f"`{entry['name']}`",
                milliseconds(entry["seconds"][OURS]),
                milliseconds(entry["seconds"][TORCH]),
                f"{entry['ratio']:.2f}",
                f"{100 * entry['efficiency']:.0f}%" if entry["efficiency"] else "",
            ]
            for entry in section["shapes"][:WORST]
        ]
        head = ["the worst", f"{OURS}, ms", f"{TORCH}, ms", f"x {TORCH}", "of the floor"]
        parts += [f"{verdict(section)}.", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    top.add_argument("--count", type=positive, default=COUNT, metavar="N", help="shapes (default %(default)s)")
    top.add_argument("--seed", type=int, default=SEED, metavar="N", help="which shapes (default %(default)s)")
    top.add_argument("--only", action="append", metavar="NAME", help="this shape and no random one; may be repeated")
    top.add_argument(
        "--each", type=some_seconds, default=0.3, metavar="S", help="time for a shape (default %(default)s)"
    )
    top.add_argument(
        "--seconds", type=some_seconds, default=600, metavar="S", help="time for all, each time (default 600)"
    )
    add_run_arguments(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if a shape is lost."""
    arguments = parser().parse_args(argv)
    try:
        cases = [Case.parse(name) for name in arguments.only or []]
    except ValueError as error:
        print(f"python -m benchmarks.sweep: error: {error}", file=sys.stderr)
        return 2
    cases = cases or list(random_cases(arguments.count, arguments.seed))
    head = environment()
    own = head["machine"]["threads"]
    sections = []
    for threads in arguments.threads or [own]:
        torch.set_num_threads(threads)
        sections.append(run(cases, arguments.each, arguments.seconds))
    torch.set_num_threads(own)
    result = {**head, "seed": arguments.seed, "sections": sections}
    complete = not arguments.only and all(len(section["shapes"]) >= COUNT for section in sections)
    folder = folder_for(arguments.out or (RESULTS if complete else PARTIAL), head["machine"])
    write_json(result, folder / "sweep.json")
    (folder / "sweep.md").write_text(markdown(result))
    for section in sections:
        print(f"{verdict(section)}; the worst:")
        print("\n".join(line(entry) for entry in section["shapes"][:WORST]))
    print(f"written to {folder}")
    return 1 if any(lost(section) for section in sections) else 0


if __name__ == "__main__":
    sys.exit(main())
