"""The GPU report's commands without a GPU: what its parts list and run, and how it reads what programs say."""

import argparse
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import cases, commands, machine, small
from benchmarks.gpu.results import Results
from rnnkern import triton as kernels
from tests.helpers import needs_emulator

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
PACKED = {"ragged": "packed"}
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
        ("  --kernel-name {key=value}\n  --kernel-name-exclude {key=value}", "--kernel-name"),
        ("  --kernel-regex {key=value}\n  --kernel-regex-exclude", "--kernel-regex"),
        ("  --kernel-name-exclude {key=value}", ""),
        ("", ""),
    ],
)
def test_option_that_names_our_kernels(text: str, option: str) -> None:
    assert commands.only_ours(text, "cuda") == ([option, "kns=rnnkern"] if option else [])
    found = commands.only_ours(text, "triton")
    assert found[::2] == [option] * (len(found) // 2)
    assert found[1::2] == ([f"kne={name}" for name in small.triton_kernels()] if option else [])


def test_all_kernels_of_triton_are_named() -> None:
    if not kernels.available:
        pytest.skip(kernels.reason)
    from rnnkern.triton import compile

    of = (compile.launches_of(case, compile.TARGETS["sm_90"]) for case in compile.cases())
    assert {launch.kernel.fn.__name__ for launches in of for launch in launches.values()} == set(small.triton_kernels())


def test_sanitizer_runs_each_tool_over_each_backend(on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def stream(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
        assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        ran.append(command)
        return (9, RACECHECK) if "racecheck" in command else (0, "========= ERROR SUMMARY: 0 errors\n")

    said = SimpleNamespace(stdout="  --kernel-name {key=value}")
    monkeypatch.setattr(commands, "stream", stream)
    monkeypatch.setattr(commands, "need_engines", lambda: None)
    monkeypatch.setattr(commands, "need_program", lambda name: name)
    monkeypatch.setattr(commands.subprocess, "run", lambda *_, **__: said)
    monkeypatch.setattr(small, "missing", lambda backend: "")
    rows = commands.sanitized(("memcheck", "racecheck"))
    assert rows == ["memcheck cuda", "memcheck triton", "racecheck cuda", "racecheck triton"]
    assert commands.sanitized(("memcheck", "racecheck"), "triton") == rows[1::2]
    assert commands.sanitize(on_the_cpu, 100.0, rows[:2]) == 0
    assert commands.sanitize(on_the_cpu, 100.0, rows[2:]) == 1
    assert [command[2] for command in ran] == ["memcheck", "memcheck", "racecheck", "racecheck"]
    for command, backend in zip(ran, ["cuda", "triton"] * 2):
        assert command[-2:] == ["benchmarks.gpu.small", backend]
        assert ("kne=softmax_rows" in command) == (backend == "triton")
        assert ("kns=rnnkern" in command) == (backend == "cuda")
    found = on_the_cpu.content["parts"]["sanitize"]["rows"]
    assert [found[name]["errors"] for name in rows] == [0, 0, 1, 1]
    monkeypatch.setattr(small, "missing", lambda backend: "no kernels" if backend == "cuda" else "")
    assert commands.sanitize(on_the_cpu, 100.0, rows[:1]) == 0
    assert found["memcheck cuda"]["skipped"] == "no kernels"
    assert commands.sanitize(on_the_cpu, 29.0, rows[1:]) == 1  # the time is spent
    assert len(ran) == 4


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
    status, output = commands.stream(["sh", "-c", "echo begun; sleep 60 & wait"], seconds=3)
    assert status != 0
    assert output.startswith("begun\n")
    assert output.endswith("no end after 3 s\n")


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


def test_parts_refuse_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "need_gpu", lambda: None)
    monkeypatch.setattr(kernels, "available", True)
    monkeypatch.setattr(kernels, "reason", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(machine.CannotRun, match="TRITON_INTERPRET"):
        machine.need_engines()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    machine.need_engines()


def test_tests_run_in_parallel_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: name)
    assert commands.in_parallel() == ["-n", "8"]
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    assert commands.in_parallel() == []


def test_without_results_a_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--part", "summary", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--part", "layers", "--list", "--tier", "0", "--only", "lstm"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 5 * 3 * 2
    assert program.main(["--part", "attention", "--list"]) == 0
    assert "additive-B64-Tq50-Tk1000-D512-bfloat16-eval" in capsys.readouterr().out
    assert program.main(["--part", "loss", "--list", "--only", "bfloat16-train"]) == 0
    assert "loss-N8192-V128000-D1024-bfloat16-train" in capsys.readouterr().out
    assert program.main(["--part", "sanitize", "--list", "--tools", "racecheck"]) == 0
    assert capsys.readouterr().out == "racecheck cuda\nracecheck triton\n"


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


@pytest.mark.usefixtures("on_the_cpu")
def test_what_is_sanitized_of_triton_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Interpreted, which takes long: less of it, and not in bfloat16."""
    if why := kernels.missing_on("cpu"):
        pytest.skip(why)
    monkeypatch.setattr(small, "DTYPES", (torch.float32,))
    monkeypatch.setattr(small, "CELLS", ("lstm",))
    monkeypatch.setattr(small, "ATTENTION", ((1, 5, 17, 9), (6, 7, 17, 9)))
    monkeypatch.setattr(small, "VOCABULARIES", (48,))
    monkeypatch.setitem(small.SIZES, "triton", ((2, 3, 5, 20, {"bidirectional": True}), (2, 18, 4, 20, PACKED)))
    assert small.run_all("triton")
    said = capsys.readouterr().out
    assert said.count(" | automatic | stepwise | resident | grid\n") == 4  # two sizes, with and without TF32


def test_small_sizes_of_triton_fit_every_engine() -> None:
    """Of a GPU of Hopper's or later; others refuse some, and may."""
    from rnnkern.triton import config

    facts = config.Facts("cuda", 132, 232448)
    for case in small.layer_cases("triton"):
        D = 2 if case.bidirectional else 1
        for engine in small.BACKENDS["triton"]:
            config.plan(case.cell, case.dtype, case.H, case.B, D, engine, False, facts)
