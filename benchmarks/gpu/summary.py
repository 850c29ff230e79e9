"""The results as Markdown and plots: `gpu.md`, `gpu_speedup.png`. Needs no GPU."""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.attention import EAGER
from benchmarks.gpu.candidates import TRITON
from benchmarks.gpu.cases import LayerCase
from benchmarks.gpu.layers import PROJECTION
from benchmarks.gpu.order import order_tables, winner
from benchmarks.gpu.plot import MODES, SHAPES, draw
from benchmarks.gpu.results import NAME
from benchmarks.gpu.targets import ESTIMATES, SOURCE, target
from benchmarks.render import milliseconds, table
from rnnkern._bench.cases import OURS, TORCH

WORST = 20
Row = dict[str, Any]

NOTE = (
    "Medians of interleaved calls, timed by events on the device, with the L2 cache overwritten before each and "
    "launches queued ahead, up to 2 ms of them; `call` is on the host, from a call to the end of its work. "
    f"`x {TORCH}` is how many times faster ours is than cuDNN, the median of paired ratios; below 1, we are slower. "
    "`us a step` is the forward less the product of the inputs with W_ih, which is timed alone, over the steps. "
    "`Triton` is ours by Triton's engines, as it chooses among them; `faster` tells which of our backends was, and how "
    "many times as fast as the other. "
    f"`aimed at` is {SOURCE}; it is no measurement. "
    "`cuDNN` says whether its kernels keep the weights on the chip for all steps (persistent) or run step by step "
    "(standard), by the names and the number of the kernels that it launched. fp32 does not allow TF32; all else does. "
    "`host-bound` names those for whose launches the GPU waited: their time is Python's and the driver's."
)


def per_step_us(row: Row, name: str) -> float | None:
    """Microseconds per step of the recurrence alone, where the projection was timed."""
    seconds = row["seconds"]
    if PROJECTION not in seconds or name not in seconds:
        return None
    return 1e6 * max(seconds[name] - seconds[PROJECTION], 0.0) / row["case"]["T"]


def cudnn_path(kernels: Row | None, steps: int) -> str:
    """Which of cuDNN's ways the kernels are, "" if that was not looked at."""
    if kernels is None or TORCH not in kernels:
        return ""
    found = kernels[TORCH]
    if any("persist" in name.lower() for name, *_ in found["top"]):
        return "persistent"
    return "standard" if found["launches"] >= steps else f"{found['launches']} kernels"


def figure(value: float | None, form: str = ".2f") -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def layer_cells(row: Row, kernels: Row | None) -> list[str]:
    """A row of a layer's table."""
    case, seconds, ratio = row["case"], row["seconds"], row["ratio"]
    aim = target(LayerCase.of(case).case)
    aimed = "" if aim is None else f"{aim.low:g}" if aim.low == aim.high else f"{aim.low:g}-{aim.high:g}"
    step = per_step_us(row, OURS)
    peaks = row.get("peak_mib", {})
    engines = [name for name in seconds if re.fullmatch(rf"{OURS} \w+ \w+", name)]
    fastest = min(engines, key=seconds.__getitem__, default="")
    return [
        f"H={case['H']}, B={case['B']}, T={case['T']}",
        milliseconds(seconds[OURS]),
        milliseconds(row["call_seconds"].get(OURS)),
        figure(ratio.get(TORCH)),
        figure(ratio.get(EAGER)),
        fastest.removeprefix(f"{OURS} "),
        milliseconds(seconds.get(TRITON)),
        *(figure(row.get("triton_ratio", {}).get(who)) for who in (TORCH, EAGER)),
        winner(row),
        figure(step),
        figure(per_step_us(row, TORCH)),
        aimed,
        figure(step / aim.high if step is not None and aim is not None else None),
        cudnn_path(kernels, case["T"]),
        " / ".join(figure(peaks.get(name), ".0f") or "?" for name in (OURS, TORCH)) if peaks else "",
        ", ".join(name for name in (OURS, TRITON, TORCH) if name in row.get("host_bound", ())),
        f"differs: {', '.join(row['disagrees'])}" if row["disagrees"] else "",
    ]


HEAD = [
    *("", f"{OURS}, ms", "call, ms", f"x {TORCH}", f"x {EAGER}", "fastest engine"),
    *("Triton, ms", f"Triton x {TORCH}", f"Triton x {EAGER}", "faster", "us a step", f"us a step, {TORCH}"),
    *("aimed at", "of that", "cuDNN", f"MiB, {OURS} / {TORCH}", "host-bound", "result"),
]


def measured(part: Row | None) -> dict[str, Row]:
    """The rows that have a time of ours."""
    rows = part["rows"] if part else {}
    return {name: row for name, row in rows.items() if OURS in row.get("seconds", {})}


def layer_tables(parts: Row) -> Iterator[str]:
    """A table for each cell, dtype, shape and mode."""
    rows, kernels = measured(parts.get("layers")), parts.get("kernels", {}).get("rows", {})
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        groups.setdefault(tuple(row["case"][fact] for fact in ("cell", "dtype", "shape", "mode")), []).append(name)
    for (cell, dtype, shape, mode), names in sorted(groups.items()):
        yield f"**{cell}, {dtype}, {SHAPES[shape]}, {MODES[mode]}**"
        names.sort(key=lambda name: [rows[name]["case"][fact] for fact in ("H", "T", "B")])
        yield table(HEAD, [layer_cells(rows[name], kernels.get(name)) for name in names])


def worst(parts: Row) -> Iterator[str]:
    """Where cuDNN is faster."""
    rows, kernels = measured(parts.get("layers")), parts.get("kernels", {}).get("rows", {})
    ratios = {name: row["ratio"][TORCH] for name, row in rows.items() if TORCH in row["ratio"]}
    lost = sorted((name for name, ratio in ratios.items() if ratio < 1), key=ratios.__getitem__)
    if ratios:
        ordered = sorted(ratios.values())
        yield (
            f"{len(ratios)} layers: {len(lost)} slower than cuDNN; "
            f"median {ordered[len(ordered) // 2]:.2f} times as fast, from {ordered[0]:.2f} to {ordered[-1]:.2f}."
        )
    if lost:
        head = ["the worst", f"x {TORCH}", "cuDNN"]
        paths = [cudnn_path(kernels.get(name), rows[name]["case"]["T"]) for name in lost[:WORST]]
        yield table(head, [[f"`{name}`", f"{ratios[name]:.2f}", path] for name, path in zip(lost, paths)])


def latency_table(parts: Row) -> Iterator[str]:
    """Latencies and rates, beside what they had been taken to be."""
    if "latencies" not in parts:
        return
    rows = []
    for name, row in parts["latencies"]["rows"].items():
        low, high = ESTIMATES.get(name, (None, None))
        estimate = "" if low is None else f"{low}" if low == high else f"{low}-{high}"
        value = f"{row['value']:.4g} {row['unit']}" if "value" in row else row["skipped"]
        spread = f"{row['low']:.4g}-{row['high']:.4g}" if "value" in row else ""
        rows.append([name, value, spread, estimate])
    yield "## Latencies and rates"
    yield table(["", "measured", "quartiles", "assumed before, ns"], rows)


def functional_table(parts: Row, part: str, title: str) -> Iterator[str]:
    """Attention, or the loss, against every peer: milliseconds, and MiB at the peak."""
    rows = parts.get(part, {"rows": {}})["rows"]
    refused = [(who, why) for row in rows.values() for who, why in row.get("refused", {}).items()]
    rows = {name: row for name, row in rows.items() if row.get("seconds")}
    if not rows:
        return
    yield title
    names = list(dict.fromkeys(who for row in rows.values() for who in row["seconds"]))

    def cell(row: Row, who: str) -> str:
        if who not in row["seconds"]:
            return ""
        host = " (host)" * (who in row["host_bound"])
        return f"{milliseconds(row['seconds'][who])}{host} / {row['peak_mib'][who]:.0f}"

    won = {name: winner(row) for name, row in rows.items()}
    compared = any(won.values())
    cells = [
        [f"`{name}`", *(cell(row, who) for who in names), *([won[name]] if compared else [])]
        for name, row in rows.items()
    ]
    yield table(["ms / MiB", *names, *(["faster"] if compared else [])], cells)
    if any(row["host_bound"] for row in rows.values()):
        yield "(host): the GPU waited for launches."
    if refused:
        yield "Left out: " + "; ".join(f"{who}: {why}" for who, why in sorted(set(refused))) + "."


def first_call_table(parts: Row) -> Iterator[str]:
    """Seconds of first calls for which Triton compiled all kernels, and of those for which it had all on disk."""
    groups: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for part in ("layers", "attention", "loss"):
        for row in parts.get(part, {"rows": {}})["rows"].values():
            for who, kernels in row.get("first_call_kernels", {}).items():
                if who.startswith(OURS) and 0 in kernels.values():
                    how = "cached" if kernels["cached"] else "compiled"
                    group = groups.setdefault((part, who), {"compiled": [], "cached": []})
                    group[how].append((kernels[how], row["first_call_seconds"][who]))
    if not groups:
        return

    def cells(found: list[tuple[int, float]]) -> list[str]:
        if not found:
            return ["0", "", "", ""]
        kernels, seconds = zip(*found)
        times = f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"
        return [str(len(found)), f"{min(kernels)}-{max(kernels)}", *times]

    yield "## First calls by Triton"
    yield (
        "Seconds until a row's first call had ended, where Triton compiled every kernel that the call loaded, and "
        "where all were in its cache on disk. Kernels that an earlier row had loaded are not counted."
    )
    each = ["kernels", "s, median", "s, most"]
    head = ["", "compiled: calls", *each, "on disk: calls", *each]
    lines = [
        [f"{part}: {who}", *cells(of["compiled"]), *cells(of["cached"])] for (part, who), of in sorted(groups.items())
    ]
    yield table(head, lines)


def check_table(parts: Row) -> Iterator[str]:
    """What the tests and compute-sanitizer said."""
    rows = []
    for name, row in parts.get("tests", {"rows": {}})["rows"].items():
        counts = ", ".join(f"{number} {outcome}" for outcome, number in row["counts"].items())
        rows.append([name, counts or f"exit status {row['status']}", ", ".join(row["failed"][:5])])
    for name, row in parts.get("sanitize", {"rows": {}})["rows"].items():
        if "skipped" in row:
            rows.append([f"compute-sanitizer {name}", "skipped", row["skipped"]])
            continue
        found = "did not end" if row["errors"] is None else f"{row['errors']} errors"
        rows.append([f"compute-sanitizer {name}", found, "; ".join(row["first"])])
    if rows:
        yield "## Checks"
        yield table(["", "", "first"], rows)


def faults(row: Row, may_refuse: bool) -> list[str]:
    """What is wrong with a row; ours may refuse attention, and not a layer."""
    found = [row["failed"]] if "failed" in row else []
    if not may_refuse and OURS in row.get("refused", {}):
        found.append(row["refused"][OURS])
    return found + [f"{who}: {why}" for what in ("broken", "disagrees") for who, why in row.get(what, {}).items()]


def fault_table(parts: Row) -> Iterator[str]:
    """What failed, was refused or differs."""
    wrong = {
        name: "; ".join(found)
        for part in ("layers", "attention", "loss")
        for name, row in parts.get(part, {"rows": {}})["rows"].items()
        if (found := faults(row, may_refuse=part != "layers"))
    }
    if wrong:
        yield table(["failed, refused or different", "what"], [[f"`{name}`", what] for name, what in wrong.items()])


def describe(content: Row) -> str:
    """The GPU, and the circumstances of the last run of each part."""
    machine = content["machine"]
    lines = [
        f"{machine['gpu']}, capability {machine['capability']}, {machine['multiprocessors']} multiprocessors, "
        f"{machine['memory_gib']} GiB, {machine['l2_mib']:.0f} MiB of L2 cache."
    ]
    for name, part in content["parts"].items():
        run = part["runs"][-1]
        software, states = run["software"], [run["state_before"], *run.get("states", []), run.get("state_after")]
        clocks = [state["clocks.sm"] for state in states if state and "clocks.sm" in state]
        heat = [state["temperature.gpu"] for state in states if state and "temperature.gpu" in state]
        around = f"; SM clock {min(clocks, key=float)} to {max(clocks, key=float)} MHz" if clocks else ""
        around += f", {min(heat, key=float)} to {max(heat, key=float)} degrees Celsius" if heat else ""
        lines.append(
            f"- {name}: {len(part['rows'])} rows, {run['date']}, rnnkern {software['commit'] or run['source']}, torch "
            f"{software['torch']}, cuDNN {software['cudnn']}, Triton {software['triton']}, driver "
            f"{software['driver']}{around}"
        )
    return "\n".join(lines)


def markdown(content: Row) -> str:
    """The whole summary."""
    parts = content["parts"]
    found = [f"# {content['machine']['gpu']}", describe(content), *check_table(parts)]
    found += [*fault_table(parts), *latency_table(parts)]
    if measured(parts.get("layers")):
        found += ["## Recurrent layers", NOTE, *worst(parts), *layer_tables(parts)]
    found += functional_table(parts, "attention", "## Attention")
    found += functional_table(parts, "loss", "## Linear layer and cross entropy")
    return "\n\n".join([*found, *order_tables(parts), *first_call_table(parts)]) + "\n"


def write(folder: Path) -> None:
    """Writes gpu.md and gpu_speedup.png beside the results of a folder."""
    content = json.loads((folder / NAME).read_text())
    text = markdown(content)
    (folder / "gpu.md").write_text(text)
    layers = list(measured(content["parts"].get("layers")).values())
    draw(content["machine"]["gpu"], layers, folder / "gpu_speedup.png")
    print("\n".join(text.split("\n## Recurrent layers")[0].splitlines()[-80:]))
    print(*worst(content["parts"]), *order_tables(content["parts"]), sep="\n")
    print(f"written to {folder}")
