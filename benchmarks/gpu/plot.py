"""The ratios of all layers over their hidden sizes, as a picture."""

from pathlib import Path
from typing import Any

from rnnkern._bench.cases import TORCH

MODES = {"eval": "forward", "train": "forward and backward"}
SHAPES = {
    "plain": "one layer",
    "stack": "two layers, bidirectional",
    "two": "two layers",
    "packed": "packed sequences",
}


def draw(machine: str, rows: list[dict[str, Any]], file: Path) -> bool:
    """Plots every layer's ratio to cuDNN over H, a panel for each cell and mode; whether there was anything to plot."""
    rows = [row for row in rows if TORCH in row["ratio"]]
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return False
    if not rows:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = list(dict.fromkeys(row["case"]["cell"] for row in rows))
    figures, panels = plt.subplots(len(cells), len(MODES), figsize=(12, 3.2 * len(cells)), squeeze=False)
    dtypes = list(dict.fromkeys(row["case"]["dtype"] for row in rows))
    markers = dict(zip(SHAPES, "osv^"))
    for line, cell in zip(panels, cells):
        for axes, (mode, words) in zip(line, MODES.items()):
            for row in rows:
                case = row["case"]
                if (case["cell"], case["mode"]) == (cell, mode):
                    colour = f"C{dtypes.index(case['dtype'])}"
                    axes.scatter(case["H"], row["ratio"][TORCH], s=14, color=colour, marker=markers[case["shape"]])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.axhline(1, color="black", linewidth=1)
            axes.set_title(f"{cell}, {words}", fontsize=9)
            axes.set_ylabel(f"x {TORCH}", fontsize=8)
            axes.set_xlabel("H", fontsize=8)
    first = panels[0][0]
    for number, dtype in enumerate(dtypes):
        first.scatter([], [], color=f"C{number}", s=14, label=dtype)
    for shape, marker in markers.items():
        first.scatter([], [], color="grey", marker=marker, s=14, label=SHAPES[shape])
    first.legend(fontsize=7)
    figures.suptitle(machine, fontsize=10)
    figures.tight_layout()
    figures.savefig(file, dpi=110)
    plt.close(figures)
    return True
