"""The gate on what CUDA kernels need: csrc/cuda/resources.py."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "resources.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not run from a source tree")

LOG = """
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 1 barriers, 1024 bytes smem, 560 bytes cmem[0]
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 560 bytes cmem[0]
ptxas info    : Function properties for called
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


@pytest.fixture(scope="module")
def resources() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))  # leaves no bytecode among the sources


def test_reads_what_ptxas_says(resources: SimpleNamespace) -> None:
    assert resources.parse(LOG) == {
        ("first", "sm_80"): (26, 1024, 0, 0),
        ("first", "sm_90a"): (255, 0, 16, 20),
        ("called", "sm_90a"): (0, 0, 32, 0),
    }


def test_names_are_short(resources: SimpleNamespace) -> None:
    mangled = "_ZN7rnnkern4cuda9next_stepINS_4LstmE6__halffEEvNS0_11StepForwardIT0_T1_EE"
    assert resources.shorten([mangled]) == ["next_step<Lstm, F16, float>"]


def kernel_log(name: str, arch: str, registers: int, stack: int = 0) -> str:
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{arch}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {stack} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 560 bytes cmem[0]\n"
    )


def test_merges_what_several_objects_hold(resources: SimpleNamespace) -> None:
    common = kernel_log("common", "sm_80", 40)
    merged = resources.merge([("a", common + kernel_log("first", "sm_80", 50)), ("b", common)])
    assert merged == {"common": {"sm_80": (40, 0, 0, 0)}, "first": {"sm_80": (50, 0, 0, 0)}}
    for registers in (48, 32):  # more, or fewer
        logs = [("a", common), ("b", kernel_log("common", "sm_80", registers)), ("c", common)]
        with pytest.raises(resources.DifferentCode, match=r"common on sm_80: .* in a, .* in b"):
            resources.merge(logs)


def test_two_kernels_of_one_name_are_found(resources: SimpleNamespace) -> None:
    mangled = ("_ZN7rnnkern4cuda4stepEv", "_ZN7rnnkern4stepEv")  # of namespaces that names are rid of
    with pytest.raises(resources.DifferentCode, match="two kernels are called step"):
        resources.merge([(name, kernel_log(name, "sm_80", 40)) for name in mangled])


def test_finds_regressions(resources: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "resources.json"
    before = {"same": {"sm_80": resources.Resources(40, 0, 0, 0)}}
    resources.save(before, "13.0", file)
    baseline = json.loads(file.read_text())

    def found(nvcc: str, *numbers: int, name: str = "same") -> list[str]:
        return resources.regressions({name: {"sm_80": resources.Resources(*numbers)}}, nvcc, baseline)

    assert found("13.0", 40, 0, 0, 0) == found("13.0", 48, 99, 0, 0) == found("13.1", 200, 0, 0, 0) == []
    assert found("13.0", 49, 0, 0, 0) == ["same on sm_80: 49 registers, 40 before"]
    assert found("13.1", 40, 0, 8, 0) == ["same on sm_80: a stack frame of 8 bytes, 0 before"]
    assert found("13.1", 40, 0, 0, 4) == ["same on sm_80: spills 4 bytes"]
    assert found("13.0", 40, 0, 0, 0, name="other") == ["same: gone", "other on sm_80: new"]


def test_stack_frames_do_not_grow(resources: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "resources.json"
    resources.save({"same": {"sm_80": resources.Resources(40, 0, 16, 0)}}, "13.0", file)
    baseline = json.loads(file.read_text())
    for stack, expected in ((8, []), (16, []), (24, ["same on sm_80: a stack frame of 24 bytes, 16 before"])):
        kernels = {"same": {"sm_80": resources.Resources(40, 0, stack, 0)}}
        assert resources.regressions(kernels, "13.0", baseline) == expected


def test_architectures_do_not_vanish(resources: SimpleNamespace, tmp_path: Path) -> None:
    file, same = tmp_path / "resources.json", resources.Resources(40, 0, 0, 0)
    resources.save({name: {"sm_80": same, "sm_90a": same} for name in ("one", "two")}, "13.0", file)
    kernels = {"one": {"sm_80": same, "sm_90a": same}, "two": {"sm_80": same, "sm_100": same}}
    wrong = resources.regressions(kernels, "13.0", json.loads(file.read_text()))
    assert wrong == ["two on sm_90a: gone", "two on sm_100: new"]
