"""The report as JSON, as Markdown tables, as plots, and as a block of the README."""

import json
from pathlib import Path
from typing import Any

from rnnkern._bench.cases import OURS, TORCH

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NOTHING = "No result is committed yet. `make bench` measures your machine."
TITLES = {"rnn_tanh": "RNN", "rnn_relu": "RNN, relu", "gru": "GRU", "lstm": "LSTM"}


def milliseconds(seconds: float | None) -> str:
    """Three figures, in ms."""
    if seconds is None:
        return ""
    value = 1e3 * seconds
    return f"{value:.4f}" if value < 0.1 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def workload(case: dict[str, Any]) -> str:
    """A recurrence in words."""
    if case["single_step"]:
        return f"{TITLES[case['cell']]}Cell, B={case['B']}, H={case['H']}"
    stacked = f"{case['layers']} layers, " if case["layers"] > 1 else ""
    both = "bidirectional, " if case["bidirectional"] else ""
    return f"{TITLES[case['cell']]}, {stacked}{both}T={case['T']}, B={case['B']}, H={case['H']}"


def pairs(report: dict[str, Any], kind: str) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Rows of a kind that differ in `training` alone, as (case, {"eval": row, "train": row})."""
    found: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for row in report["rows"]:
        if row["kind"] == kind:
            stem, mode = row["name"].rsplit("-", 1)
            found.setdefault(stem, (row["case"], {}))[1][mode] = row
    return list(found.values())


def cells_of(row: dict[str, Any] | None, peer: str, memory: bool) -> list[str]:
    """A row's cells: peer's time, our time, ratio, percent of the floor, and memory as ours / peer's."""
    if row is None or peer not in row["ratio"]:
        return [""] * (5 if memory else 4)
    ours, floor = row["seconds"][OURS], row["floor_seconds"]
    cells = [
        milliseconds(row["seconds"][peer]),
        milliseconds(ours),
        f"{row['ratio'][peer]:.2f}",
        f"{100 * floor / ours:.0f}%" if floor else "",
    ]
    if memory:
        peak = row["peak_mib"] or {}
        known = peak.get(OURS) is not None and peak.get(peer) is not None
        cells.append(f"{peak[OURS]:.1f} / {peak[peer]:.1f}" if known else "")
    return cells


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def recurrence_table(report: dict[str, Any], memory: bool) -> str:
    """Every recurrence against torch.nn."""
    columns = [TORCH, OURS, "times faster", "of the floor"] + (["MiB, ours / torch"] if memory else [])
    rows = [
        [workload(case), *cells_of(modes.get("eval"), TORCH, memory), *cells_of(modes.get("train"), TORCH, memory)]
        for case, modes in pairs(report, "recurrence")
    ]
    head = ["", *(f"fwd: {c}" for c in columns), *(f"fwd+bwd: {c}" for c in columns)]
    return table(head, rows)


def attention_table(report: dict[str, Any]) -> str:
    """Attention against every peer, memory included."""
    rows = []
    for case, modes in pairs(report, "attention"):
        title = f"{case['score']}, B={case['B']}, Tq={case['Tq']}, Tk={case['Tk']}, D={case['D']}"
        peers = list(next(iter(modes.values()))["ratio"])
        for peer in peers:
            cells = []
            for mode in ("eval", "train"):
                taken = cells_of(modes.get(mode), peer, memory=True)
                cells += taken[:3] + taken[4:]
            rows.append([title, peer, *cells])
    columns = ["peer", OURS, "times faster", "MiB, ours / peer"]
    head = ["", "peer", *(f"fwd: {c}" for c in columns), *(f"fwd+bwd: {c}" for c in columns)]
    return table(head, rows)


def facts(report: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    machine, software = report["machine"], report["software"]
    before, after = report["probes"]["before"], report["probes"]["after"]
    text = (
        f"{machine['cpu']}, {machine['threads']} threads, {software['isa'] or 'eager reference'}; "
        f"torch {software['torch']}, rnnkern {software['rnnkern']} ({software['commit']}), {report['date']}; "
        f"load average before {report['load_before']:.1f}."
    )
    if before and after:
        text += (
            f" Probes before / after: FMA {before['fma_gflops_1']:.0f} / {after['fma_gflops_1']:.0f} GFLOP/s on one "
            f"thread, {before['fma_gflops']:.0f} / {after['fma_gflops']:.0f} on all; "
            f"ping-pong {before['ping_pong_ns']:.0f} / {after['ping_pong_ns']:.0f} ns there and back."
        )
    return text


NOTE = (
    "Float32, times in ms, medians of interleaved runs; `times faster` is the median of the paired ratios; below 1, "
    "we are slower. `of the floor` is the speed we reach as a part of the machine's limit (`rnnkern/_bench/floors.py`)."
)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    parts = [f"# {report['machine']['cpu']}, {report['machine']['threads']} threads", facts(report), NOTE]
    if pairs(report, "recurrence"):
        parts += ["## Recurrence", recurrence_table(report, memory=bool(report["rows"][0]["peak_mib"]))]
    if pairs(report, "attention"):
        parts += ["## Attention", attention_table(report)]
    return "\n\n".join(parts) + "\n"


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes report.json, report.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(report))
    plot(report, folder)


def plot(report: dict[str, Any], folder: Path) -> None:
    """speedup.png (every peer of every row) and floor.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"eval": "tab:blue", "train": "tab:orange"}

    def bars(values: list[tuple[str, str, float]], title: str, file: str, log: bool) -> None:
        if not values:
            return
        start = 1 if log else 0  # a loss points to the left
        figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(values)))
        places = range(len(values))
        lengths = [value - start for _, _, value in values]
        axes.barh(places, lengths, left=start, color=[colours[mode] for _, mode, _ in values])
        axes.set_yticks(places, [label for label, _, _ in values], fontsize=7)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        if log:
            axes.set_xscale("log")
            axes.axvline(1, color="black", linewidth=1)
        axes.set_xlabel(title)
        axes.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()], colours)
        figure.tight_layout()
        figure.savefig(folder / file, dpi=120)
        plt.close(figure)

    speedups, shares = [], []
    for row in report["rows"]:
        mode = row["name"].rsplit("-", 1)[1]
        speedups += [(f"{row['name']} / {peer}", mode, ratio) for peer, ratio in row["ratio"].items()]
        if row["floor_seconds"]:
            shares.append((row["name"], mode, 100 * row["floor_seconds"] / row["seconds"][OURS]))
    machine = f"{report['machine']['cpu']}, {report['machine']['threads']} threads"
    bars(speedups, f"times faster than the peer ({machine})", "speedup.png", log=True)
    bars(shares, f"% of the floor's speed ({machine})", "floor.png", log=False)


def readme_block(results: Path) -> str:
    """What stands between the markers: the tables of every committed machine."""
    parts = []
    for written in sorted(results.glob("*/report.json")):
        report = json.loads(written.read_text())
        parts += [f"**{facts(report)}**", recurrence_table(report, memory=False), attention_table(report)]
        parts.append(f"[Full report](benchmarks/results/{written.parent.name}/report.md)")
    return "\n\n".join([*parts, NOTE] if parts else [NOTHING])


def update_readme(readme: Path, results: Path) -> None:
    """Puts the committed results between the markers."""
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{readme.name} lacks the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{readme_block(results)}\n{END}{after}")
