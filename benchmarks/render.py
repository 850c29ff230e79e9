"""The report as Markdown tables and as a block of the README; plots.py draws it."""

import json
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.environment import describe
from rnnkern._bench.cases import CELLS, OURS

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NOTHING = "No result is committed yet. `make bench` measures your machine."
KINDS = {
    "recurrence": "Recurrence",
    "low precision": "Low precision",
    "ragged": "Rows of different lengths",
    "attention": "Attention",
    "loss": "Linear layer and cross entropy",
}
MODES = {False: "forward", True: "forward and backward"}
PADDED = "rnnkern padded"
Entry = dict[str, Any]


def milliseconds(seconds: float | None) -> str:
    """Three figures, in ms."""
    if seconds is None:
        return ""
    value = 1e3 * seconds
    return f"{value:.4f}" if value < 0.1 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def workload(entry: Entry) -> str:
    """A row in words."""
    case = entry["case"]
    if entry["kind"] == "attention":
        return f"{case['score']}, B={case['B']}, Tq={case['Tq']}, Tk={case['Tk']}, D={case['D']}"
    if entry["kind"] == "loss":
        padding = f", {case['padding']:.0%} padding" if case["padding"] else ""
        dtype = "" if case["dtype"] == "torch.float32" else f", {case['dtype'].removeprefix('torch.')}"
        return f"N={case['N']}, V={case['V']}, D={case['D']}{padding}{dtype}"
    parts = [CELLS[case["cell"]] + ("Cell" if case["single_step"] else "")]
    if case["cell"] == "rnn_relu":
        parts.append("relu")
    if case["layers"] > 1:
        parts.append(f"{case['layers']} layers")
    if case["bidirectional"]:
        parts.append("bidirectional")
    if not case["single_step"]:
        parts.append(f"T={case['T']}")
    parts += [f"B={case['B']}"] + ([f"I={case['I']}"] if case["I"] != case["H"] else []) + [f"H={case['H']}"]
    if entry["kind"] == "low precision":
        parts.append(case["dtype"].removeprefix("torch."))
    if entry["kind"] == "ragged":
        parts.append("`lengths=`" if case["ragged"] == "lengths" else "PackedSequence")
    return ", ".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures. Columns without a figure are left out."""
    kept = [column for column in range(len(head)) if column == 0 or any(row[column] for row in rows)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells[column] for column in kept) + " |" for cells in lines)


def share_cost(entry: Entry) -> str:
    """What a ragged row costs, as a part of its share of the padded run's time; 1.00 is a run without waste."""
    ratio = entry["ratio"].get(PADDED)
    return f"{1 / (ratio * entry['valid_share']):.2f}" if ratio else ""


def memory(entry: Entry) -> str:
    """Peaks in MiB, ours first."""
    peaks = (entry["peak_mib"] or {}).values()
    return " / ".join("?" if peak is None else f"{peak:.1f}" for peak in peaks)


def entries_table(entries: list[Entry], with_memory: bool) -> str:
    """One row per entry: our time, how many times faster we are than each peer, our part of the floor's speed."""
    peers = list(dict.fromkeys(peer for entry in entries for peer in entry["ratio"]))
    measured = next((list(entry["peak_mib"]) for entry in entries if entry["peak_mib"]), [])
    head = ["", f"{OURS}, ms", *(f"x {peer}" for peer in peers), "of the floor", "of its share"]
    head.append(f"MiB, {' / '.join(measured)}")
    rows = []
    for entry in entries:
        ours, floor = entry["seconds"][OURS], entry["floor_seconds"]
        rows.append(
            [
                workload(entry),
                milliseconds(ours),
                *(f"{entry['ratio'][peer]:.2f}" if peer in entry["ratio"] else "" for peer in peers),
                f"{100 * floor / ours:.0f}%" if floor else "",
                share_cost(entry),
                memory(entry) if with_memory else "",
            ]
        )
    return table(head, rows)


def section_tables(section: dict[str, Any], with_memory: bool) -> list[str]:
    """A section's tables, each under a line that says what it holds."""
    parts = []
    for kind, title in KINDS.items():
        for training, mode in MODES.items():
            chosen = [e for e in section["rows"] if e["kind"] == kind and e["case"]["training"] == training]
            if chosen:
                parts += [f"**{title}, {mode}, {threads(section)}**", entries_table(chosen, with_memory)]
    return parts


def threads(section: dict[str, Any]) -> str:
    """The number of threads in words."""
    return f"{section['threads']} thread" + ("s" if section["threads"] > 1 else "")


def probes(section: dict[str, Any]) -> str:
    """What the machine could do."""
    before, after = section["probes"]["before"], section["probes"]["after"]
    if not (before and after):
        return "Not probed: no floors."
    text = f"Probes before / after: FMA {before['fma_gflops']:.0f} / {after['fma_gflops']:.0f} GFLOP/s"
    if section["threads"] > 1:
        text += f" ({before['fma_gflops_1']:.0f} / {after['fma_gflops_1']:.0f} on one thread)"
        text += f", ping-pong {before['ping_pong_ns']:.0f} / {after['ping_pong_ns']:.0f} ns there and back"
    return f"{text}."


NOTE = (
    "Float32 unless said, medians of interleaved runs in one process. `x peer` is how many times faster we are than "
    "the peer, the median of the paired ratios; below 1, we are slower. ONNX Runtime and OpenVINO run with as many "
    "threads as torch, on bound inputs and outputs. `of the floor` is the speed we reach as a part of the machine's "
    "limit (`rnnkern/_bench/floors.py`). `of its share` is our time over (valid steps / padded steps) x our padded "
    "time: 1.00 wastes nothing; torch.nn gets the same rows as a PackedSequence. In rows of int8 our weights are int8; "
    "torch.nn is in float32 there, and torch int8 is its dynamic quantization. Of the loss, `torch chunked` is "
    "torch.nn.functional.linear_cross_entropy with its default options."
)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    parts = [f"# {report['machine']['cpu']}", f"{describe(report)}.", NOTE]
    for section in report["sections"]:
        parts += [f"## {threads(section)}", probes(section), *section_tables(section, with_memory=True)]
    return "\n\n".join(parts) + "\n"


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes report.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(report))
    plots.draw(report, folder)


def readme_block(results: Path) -> str:
    """What stands between the markers: every committed machine's first section, and links to all the rest."""
    parts = []
    for written in sorted(results.glob("*/report.json")):
        report = json.loads(written.read_text())
        folder = f"benchmarks/results/{written.parent.name}"
        first, *others = report["sections"]
        parts += [f"**{describe(report)}.** {probes(first)}", *section_tables(first, with_memory=False)]
        more = "".join(f", {threads(section)}" for section in others)
        links = [f"[Full report]({folder}/report.md) (with memory{more})"]
        names = {"streaming.md": "calls of one step, in a loop and every 10 ms", "sweep.md": "random shapes"}
        links += [f"[{title}]({folder}/{name})" for name, title in names.items() if (written.parent / name).exists()]
        parts.append(", ".join(links) + ".")
    return "\n\n".join([*parts, NOTE] if parts else [NOTHING])


def update_readme(readme: Path, results: Path) -> None:
    """Puts the committed results between the markers."""
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{readme.name} lacks the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{readme_block(results)}\n{END}{after}")
