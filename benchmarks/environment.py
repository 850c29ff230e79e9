"""Where and with what something is measured, and the folder its results go to."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import rnnkern
from rnnkern import _library
from rnnkern.__main__ import positive
from rnnkern._bench.machine import cpu_facts, cpu_name, slug
from rnnkern._bench.probes import MachineProbe, Probes, ProbesUnavailable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTIAL = ROOT / "build" / "benchmarks"


def machine() -> dict[str, Any]:
    """What identifies the hardware: results of two different machines never share a folder.

    `threads` are those that torch takes by itself: call this before torch.set_num_threads.
    """
    facts = cpu_facts()
    return {
        "cpu": cpu_name(),
        "signature": "/".join(facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def version(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def software() -> dict[str, Any]:
    """Versions, and the commit if the tree is a clone."""
    extension = _library.extension
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "rnnkern": rnnkern.__version__,
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "openvino": version("openvino"),
        "python": platform.python_version(),
        "isa": extension.get_isa() if extension is not None else None,
        "compiler": extension.build_info()["compiler"] if extension is not None else None,
    }


def environment() -> dict[str, Any]:
    """The head of every written result, taken before the measurement: the load average shows what else runs here."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"other work runs here (load average {load:.1f}): threads will wait for each other", file=sys.stderr)
    date = datetime.date.today().isoformat()
    return {"machine": machine(), "software": software(), "date": date, "load_before": load}


def describe(result: dict[str, Any]) -> str:
    """The head in words."""
    software = result["software"]
    runtimes = {"ONNX Runtime": software.get("onnxruntime"), "OpenVINO": software.get("openvino")}
    versions = [f"{name} {found}" for name, found in runtimes.items() if found]
    return ", ".join(
        [
            f"{result['machine']['cpu']}, {software['isa'] or 'eager reference'}; torch {software['torch']}",
            *versions,
            f"rnnkern {software['rnnkern']} ({software['commit']})",
            result["date"],
            f"load average before {result['load_before']:.1f}",
        ]
    )


def folder_for(where: Path, identity: dict[str, Any]) -> Path:
    """The folder of this machine under `where`: its name, numbered if another machine of that name was there first.

    Under an instruction set that RNNKERN_CPU_ISA forces, `where` is the folder of that name in it.
    """
    return own_folder(where / os.environ.get("RNNKERN_CPU_ISA", ""), slug(identity["threads"]), "report.json", identity)


def own_folder(where: Path, name: str, report: str, identity: dict[str, Any]) -> Path:
    """The folder of that name, or that name and a number, whose report is of this very machine, or that has none."""
    number = 1
    while True:
        folder = where / (name if number == 1 else f"{name}-{number}")
        written = folder / report
        if not written.exists() or json.loads(written.read_text())["machine"] == identity:
            return folder
        number += 1


def write_json(result: dict[str, Any], path: Path) -> None:
    """Writes the result, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def find_probes() -> Probes | None:
    """The probes, or None, said aloud, where they cannot be compiled."""
    try:
        return Probes()
    except ProbesUnavailable as error:
        print(f"no floors: {error}", file=sys.stderr)
        return None


def probe(probes: Probes | None) -> MachineProbe | None:
    """The ceilings at this moment, on torch's threads."""
    return probes.measure(torch.get_num_threads()) if probes is not None else None


def chosen_threads(text: str) -> list[int]:
    """A list of numbers of threads such as "2,1", for argparse."""
    return list(dict.fromkeys(positive(part) for part in text.split(",")))


def add_run_arguments(top: argparse.ArgumentParser) -> None:
    """The arguments of every program that measures on some numbers of threads and writes beside the report."""
    top.add_argument(
        "--threads", type=chosen_threads, metavar="N,...", help="torch's threads (default: its own choice)"
    )
    top.add_argument(
        "--out",
        type=Path,
        help="folder for the machines' folders (default benchmarks/results; build/benchmarks if partial)",
    )
