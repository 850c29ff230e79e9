"""What is packed: the wheel holds the library and no sources, the source distribution holds what builds it."""

import fcntl
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rnnkern import triton as kernels

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree")


@contextmanager
def alone() -> Iterator[None]:
    """The lock that make takes: other processes of pytest, too, build in the tree."""
    with (ROOT / "Makefile").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_wheel(folder: Path, **environment: str) -> Path:
    """Built from the tree without network; what CMake built before is used again."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    with alone():
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr[-3000:]
    (found,) = folder.glob("rnnkern-*.whl")
    return found


def run_unpacked(wheel: Path, folder: Path, code: str, **environment: str) -> str:
    """Unpacks the wheel into the folder, runs the program there on it, and returns what it printed."""
    zipfile.ZipFile(wheel).extractall(folder)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    binaries = {name for name in packed if name.endswith(".so")}
    assert "rnnkern/librnnkern.so" in binaries
    assert [name.split(".")[0] for name in sorted(binaries - {"rnnkern/librnnkern.so"})] == ["rnnkern/_C"]
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "rnnkern").rglob("*.py")}
    assert packed - binaries == tracked | {
        "rnnkern/py.typed",
        "rnnkern/_bench/probes.cpp",
        "rnnkern/triton/resources.json",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_from_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    code = "import rnnkern, torch; from rnnkern import _library; assert _library.available, _library.reason; "
    code += "print(rnnkern.__file__); rnnkern.nn.LSTM(3, 4)(torch.ones(2, 1, 3))"
    assert run_unpacked(wheel, tmp_path, code).strip() == str(tmp_path / "rnnkern" / "__init__.py")


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a compiler that is not there, and none of the tools."""
    return build_wheel(tmp_path_factory.mktemp("pure"), RNNKERN_EXTENSION="0", CXX="no-such-compiler")


def test_wheel_without_the_extension_is_python_alone(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(pure_wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".cpp")) and "_bench" not in name]
    code = """
import warnings, torch, rnnkern
from rnnkern import _library
assert _library.missing["cpu"] == "rnnkern was installed without compiled kernels (RNNKERN_EXTENSION=0)"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    (note,) = rnnkern.explain(rnnkern.nn.GRU(3, 4), torch.ones(2, 1, 3)).layers
assert note.backend == "eager" and [str(w.message) for w in told if "RNNKERN_EXTENSION=0" in str(w.message)], told
print(rnnkern.__file__)
"""
    assert run_unpacked(pure_wheel, tmp_path, code).strip() == str(tmp_path / "rnnkern" / "__init__.py")


_why = kernels.reason or kernels.interpreter_reason


@pytest.mark.skipif(bool(_why), reason=_why)
def test_triton_runs_without_the_extension(pure_wheel: Path, tmp_path: Path) -> None:
    code = """
import torch, rnnkern
layer, x = rnnkern.nn.LSTM(3, 4), torch.randn(3, 2, 3)
with rnnkern.backend("eager"):
    expected = layer(x)[0]
with rnnkern.backend("triton"):
    y = layer(x)[0]
    y.sum().backward()
torch.testing.assert_close(y, expected)
assert all(parameter.grad is not None for parameter in layer.parameters())
"""
    run_unpacked(pure_wheel, tmp_path, code, TRITON_INTERPRET="1")


def test_source_distribution_builds_the_rest(tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    with alone():
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "rnnkern/__init__.py"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("build/", ".venv"))}


def test_makefile_installs_what_the_build_requires() -> None:
    required = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    tools = re.search(r"^BUILD_TOOLS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert required is not None
    assert tools is not None
    assert re.findall(r'"(.*?)"', tools[1]) == re.findall(r'"(.*?)"', required[1])


def test_one_version() -> None:
    import rnnkern

    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert rnnkern.__version__ == declared[1]
