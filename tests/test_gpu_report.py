"""The GPU report's commands without a GPU: what its parts list and run, and how it reads what programs say."""

import argparse
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import cases, commands, machine, small
from tests.helpers import needs_emulator

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at step_kernel(Arguments)+0x1a0
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f0000000200 is out of bounds
=========
lstm | stepwise
========= Invalid __global__ read of size 4 bytes
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at step+0x150 in step.cu:12
=========     and Read access at step+0x230 in step.cu:15 [960 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "errors", "first"),
    [
        (MEMCHECK, 2, ["Invalid __global__ read of size 4 bytes"]),
        (RACECHECK, 1, ["Error: Race reported between Write access at step+0x150 in step.cu:12"]),
        ("========= COMPUTE-SANITIZER\nlstm\n========= ERROR SUMMARY: 0 errors\n", 0, []),
        ("========= COMPUTE-SANITIZER\n", None, []),  # it ended before it could count
    ],
    ids=["memcheck", "racecheck", "clean", "killed"],
)
def test_what_compute_sanitizer_says(output: str, errors: int | None, first: list[str]) -> None:
    assert commands.sanitizer_report(output) == {"errors": errors, "first": first}


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("  --kernel-name {key=value}\n  --kernel-name-exclude {key=value}", ["--kernel-name", "kns=rnnkern"]),
        ("  --kernel-regex {key=value}\n  --kernel-regex-exclude", ["--kernel-regex", "kns=rnnkern"]),
        ("  --kernel-name-exclude {key=value}", []),
        ("", []),
    ],
)
def test_option_that_names_our_kernels(text: str, option: list[str]) -> None:
    assert commands.only_ours(text) == option


def test_what_pytest_says() -> None:
    output = "FAILED tests/test_a.py::test_b[x] - assert 1 == 2\n==== 1 failed, 12 passed, 3 deselected in 4.50s ====\n"
    found = commands.test_counts(output)
    assert found == {"counts": {"failed": 1, "passed": 12, "deselected": 3}, "failed": ["tests/test_a.py::test_b[x]"]}
    assert commands.test_counts("Segmentation fault") == {"counts": {}, "failed": []}
    long = "=== 12 passed in 75.10s (0:01:15) ===\n"
    assert commands.test_counts(long)["counts"] == {"passed": 12}


def test_latencies_are_read() -> None:
    lines = [
        '{"name": "a, 2 blocks", "unit": "ns", "value": 1.5, "low": 1, "high": 2}',
        '{"name": "b", "skipped": "x"}',
    ]
    assert commands.parse_latencies("\n".join(["noise", *lines])) == {
        "a, 2 blocks": {"unit": "ns", "value": 1.5, "low": 1, "high": 2},
        "b": {"skipped": "x"},
    }


def test_a_program_that_does_not_end_is_ended() -> None:
    status, output = commands.stream(["sh", "-c", "echo begun; sleep 60 & wait"], seconds=0.5)
    assert status != 0
    assert output.startswith("begun\n")
    assert output.endswith("no end after 0 s\n")


def test_sweep_is_that_of_the_issue_and_begins_with_its_core() -> None:
    rows = list(cases.all_cases())
    assert len({row.name for row in rows}) == len(rows) == 3 * 4 * 9 * 5 * 2 * 4 * 2
    tiers = [row.tier for row in rows]
    assert tiers == sorted(tiers)
    assert rows[0].name == "lstm-T100-B1-H128-bfloat16-eval"
    assert {row.tf32 for row in rows if row.dtype in ("bf16", "fp16", "tf32")} == {True}
    assert not any(row.tf32 for row in rows if row.dtype == "fp32")
    assert [cases.LayerCase.of(row.facts()) for row in rows[::97]] == rows[::97]


def choose(*words: str) -> list[cases.LayerCase]:
    parser = argparse.ArgumentParser()
    cases.add_arguments(parser)
    return cases.chosen(parser.parse_args(words))


def test_options_choose_cases() -> None:
    found = choose(
        "--cells", "gru,rnn_tanh", "--dtypes", "tf32", "--hidden", "176", "--batch", "1,8", "--steps", "1000"
    )
    assert len(found) == 2 * 2 * 4 * 2
    assert found[0].name == "gru-T1000-B1-H176-tf32-eval"
    assert {row.shape for row in choose("--shapes", "stack", "--modes", "train", "--tier", "1")} == {"stack"}
    with pytest.raises(SystemExit):
        choose("--hidden", "100")


def test_names_of_folders_and_sources(tmp_path: Path) -> None:
    assert machine.folder_name("NVIDIA H200") == "nvidia-h200"
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("a")
    before = machine.source_hash(tmp_path)
    assert machine.source_hash(tmp_path) == before
    (tmp_path / "csrc" / "kernel.cu").write_text("b")
    assert machine.source_hash(tmp_path) != before


def test_nvidia_smi_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    said = SimpleNamespace(returncode=0, stdout="1980, 3201, 41, 120.5, 99, 0x0000000000000000\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    assert machine.state() == dict(zip(machine.STATE, ("1980", "3201", "41", "120.5", "99", "0x0000000000000000")))
    said.returncode = 6
    assert machine.state() is None


@NO_GPU
@pytest.mark.parametrize("part", [part for part in program.PARTS if part != "summary"])
def test_without_a_gpu_a_line_says_so(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--part", part]) == 2
    said = capsys.readouterr().err
    assert said == f"{part}: no GPU: torch {torch.__version__} finds none\n"


def test_without_results_a_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--part", "summary", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--part", "layers", "--list", "--tier", "0", "--only", "lstm"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 5 * 3 * 2
    assert program.main(["--part", "attention", "--list"]) == 0
    assert "additive-B64-Tq50-Tk1000-D512-bfloat16-eval" in capsys.readouterr().out


def test_latencies_exchange_what_they_should(tmp_path: Path) -> None:
    """On the emulator, since a kernel that waits for ever would cost a GPU's loan."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    target, folder = tmp_path / "latencies", ROOT / "benchmarks" / "gpu"
    sources = [folder / "test_latencies.cpp", ROOT / "csrc" / "emulator" / "emulator.cpp"]
    flags = ["-std=gnu++17", "-O1", "-DRNNKERN_EMULATED", f"-I{ROOT / 'csrc'}", f"-I{folder.parent}"]
    subprocess.run([compiler, *flags, "-o", target, *sources], check=True)
    subprocess.run([target], check=True)


@needs_emulator
def test_what_is_sanitized_runs() -> None:
    small.run_steps("cuda-emulated", "cpu", torch.bfloat16)
    small.run_stacks("cuda-emulated", "cpu", torch.bfloat16)
    small.run_attention("cuda-emulated", "cpu", torch.bfloat16)
