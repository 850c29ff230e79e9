"""The report as plots: speedup.png, every peer of every row, and floor.png, our part of the floor's speed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rnnkern._bench.cases import OURS

MODES = {"eval": "forward", "train": "forward and backward"}
Point = tuple[str, str, str, float]  # row without its mode, mode, series, value


def draw(report: dict[str, Any], folder: Path) -> None:
    """Draws the first section's ratios and every section's floors."""
    first, machine = report["sections"][0], report["machine"]["cpu"]
    threads = f"{machine}, {first['threads']} threads"
    _dots(list(_speedups(first)), f"times faster than the peer ({threads})", folder / "speedup.png", log=True)
    _dots(list(_shares(report)), f"% of the floor's speed ({machine})", folder / "floor.png", log=False)


def _speedups(section: dict[str, Any]) -> Iterable[Point]:
    for row in section["rows"]:
        stem, mode = row["name"].rsplit("-", 1)
        for peer, ratio in row["ratio"].items():
            yield stem, mode, peer, ratio


def _shares(report: dict[str, Any]) -> Iterable[Point]:
    for section in report["sections"]:
        series = f"{section['threads']} thread(s)"
        for row in section["rows"]:
            if row["floor_seconds"]:
                stem, mode = row["name"].rsplit("-", 1)
                yield stem, mode, series, 100 * row["floor_seconds"] / row["seconds"][OURS]


def _dots(points: list[Point], title: str, file: Path, log: bool) -> None:
    """A line for each row, a panel for each mode, a colour for each series."""
    if not points:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stems = list(dict.fromkeys(stem for stem, *_ in points))
    names = list(dict.fromkeys(series for _, _, series, _ in points))
    figure, panels = plt.subplots(1, 2, figsize=(13, 1.5 + 0.17 * len(stems)), sharey=True)
    for axes, (mode, words) in zip(panels, MODES.items()):
        for number, name in enumerate(names):
            here = [(value, stems.index(stem)) for stem, of, series, value in points if (of, series) == (mode, name)]
            axes.scatter([x for x, _ in here], [y for _, y in here], s=18, color=f"C{number}", label=name, zorder=2)
        axes.set_xscale("log" if log else "linear")
        axes.axvline(1 if log else 100, color="black", linewidth=1)
        axes.grid(axis="y", linewidth=0.3)
        axes.set_title(words, fontsize=9)
        axes.set_xlabel(title, fontsize=8)
    panels[0].set_yticks(range(len(stems)), stems, fontsize=6)
    panels[0].set_ylim(len(stems) - 0.5, -0.5)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
