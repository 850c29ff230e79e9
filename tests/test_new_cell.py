"""A new cell costs three files, a word and a line (CONTRIBUTING.md): adds one to a copy of the tree and runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pybind11")

ROOT = Path(__file__).resolve().parents[1]
CELL = Path(__file__).parent / "new_cell"


def run(*command: str | Path, **environment: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    made = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, "PATH": path, **environment}
    )
    assert made.returncode == 0, (made.stdout + made.stderr)[-5000:]
    return made.stdout


def test_new_cell(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(ROOT / "rnnkern", tree / "rnnkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", tree)

    # What the author of a cell writes: its header, its specification, its module, a line in the table of cells ...
    shutil.copy(CELL / "mgu.h", tree / "csrc" / "cells")
    shutil.copy(CELL / "mgu.py", tree / "rnnkern" / "cells")
    shutil.copy(CELL / "module.py", tree / "mgu_module.py")
    table = tree / "rnnkern" / "cells" / "__init__.py"
    table.write_text(table.read_text() + "\nfrom rnnkern.cells.mgu import MGU\n\nCELLS[MGU.name] = MGU\n")

    # ... and a word in CMake's list; alone and portable here, since the other cells are built elsewhere.
    build = tmp_path / "build"
    run(
        *(
            "cmake",
            "-S",
            tree,
            "-B",
            build,
            "-G",
            "Ninja",
            "-DRNNKERN_CELLS=mgu",
            "-DRNNKERN_ISAS=portable",
            "-DRNNKERN_CUDA=OFF",
        ),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={tree / 'rnnkern'}"),
    )
    run("cmake", "--build", build)
    run("cmake", "--install", build)
    out = run(sys.executable, CELL / "check.py", PYTHONPATH=str(tree), RNNKERN_CPU_ISA="portable")
    assert out == "mgu agrees with its reference\n"
