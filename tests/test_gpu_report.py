"""The GPU report without a GPU: its tables, statistics and parsers, and a dry run of its sweeps on the CPU."""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import attention, cases, commands, device, layers, machine, results, small, summary, sweep, targets
from benchmarks.gpu.results import Results
from benchmarks.runtimes import PeerUnavailable
from rnnkern import triton as kernels
from rnnkern._bench.cases import OURS, TORCH, Case
from rnnkern._bench.timing import compare
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


@pytest.mark.parametrize(
    ("cell", "H", "B", "expected"),
    [
        ("lstm", 128, 1, (0.5, 0.7)),
        ("gru", 256, 1, (0.5, 1.2)),
        ("lstm", 176, 64, (0.6, 0.6)),
        ("lstm", 176, 16, None),
        ("gru", 512, 64, (0.6, 0.8)),
        ("lstm", 2048, 8, (2.5, 2.5)),
        ("lstm", 4096, 8, None),
        ("rnn_tanh", 256, 8, None),
    ],
)
def test_targets(cell: str, H: int, B: int, expected: tuple[float, float] | None) -> None:
    found = targets.target(Case(cell, 100, B, H, H, dtype=torch.bfloat16))
    assert (found and (found.low, found.high)) == expected
    assert targets.target(Case(cell, 100, B, H, H)) is None
    assert targets.target(Case(cell, 100, B, H, H, dtype=torch.float16, training=True)) is None


def test_cudnns_path() -> None:
    def launched(name: str, count: int) -> dict[str, Any]:
        return {TORCH: {"launches": count, "top": [[name, count, 1.0]]}}

    assert summary.cudnn_path(launched("RNN_blockPersist_fp_LSTM<__half>", 5), 100) == "persistent"
    assert summary.cudnn_path(launched("LSTM_elementWise_fp", 203), 100) == "standard"
    assert summary.cudnn_path(launched("something else", 7), 100) == "7 kernels"
    assert summary.cudnn_path(None, 100) == ""


def test_step_is_what_the_projection_leaves() -> None:
    row = {"seconds": {OURS: 300e-6, TORCH: 50e-6, layers.PROJECTION: 100e-6}, "case": {"T": 100}}
    assert summary.per_step_us(row, OURS) == pytest.approx(2.0)
    assert summary.per_step_us(row, TORCH) == 0.0
    assert summary.per_step_us({"seconds": {OURS: 1.0}, "case": {"T": 100}}, OURS) is None


def test_slow_functions_have_fewer_rounds() -> None:
    result = compare(
        {"slow": lambda: 4.0, "fast": lambda: 2.0},
        seconds=0.0,
        min_rounds=5,
        sample_seconds=0.0,
        run=lambda function, calls: float(function()) * calls,  # type: ignore[arg-type]
        limits={"slow": 2},
    )
    assert result.samples == {"slow": [4.0] * 2, "fast": [2.0] * 5}
    assert result.ratio("slow", "fast") == 2.0


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


class HostClock:
    """In the place of events, which need a GPU."""

    def __init__(self) -> None:
        self.launching: dict[Any, list[float]] = {}

    def __call__(self, function: Any, calls: int) -> float:
        function()
        self.launching.setdefault(function, []).append(1e-6)
        return 1e-3

    launching_seconds = device.DeviceClock.launching_seconds
    host_bound = device.DeviceClock.host_bound


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Results:
    """The sweeps run on the CPU; what asks the GPU is told something."""
    for module in (layers, attention):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for name, value in {
        "synchronize": None,
        "empty_cache": None,
        "memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 << 20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(layers, "backward_plan", lambda row: "grid")
    monkeypatch.setattr(layers, "TRITON_ENGINES", ("stepwise",))  # interpreted, all of them take long
    facts = {"gpu": "Some GPU", "capability": "9.0", "multiprocessors": 1, "memory_gib": 1, "l2_mib": 1.0}
    monkeypatch.setattr(results, "identity", lambda: facts)
    return Results.of_this_gpu(tmp_path)


def measured(rows: list[sweep.Row], on: Results, part: str, line: Any, **options: Any) -> int:
    return sweep.run(on, part, rows, line, **{"seconds": 60.0, "again": False, **options})


def layer_row(name: str) -> cases.LayerCase:
    case = Case.parse(name.replace("-tf32", ""))
    dtype = "tf32" if "tf32" in name else {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype]
    layers = "stack" if case.bidirectional else "two" if case.layers == 2 else "plain"
    return cases.LayerCase(case, dtype, "packed" if case.ragged else layers, 0)


def test_dry_run_of_layers(on_the_cpu: Results, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "lstm-T2-B2-H8-eval",
        "gru-T2-B2-H8-tf32-train",
        "lstm-T2-B2-H8-packed-eval",
        "rnn_tanh-T2-B2-H8-L2-bidirectional-bfloat16-train",
        "gru-T2-B2-H8-L2-eval",
    ]
    chosen = [layer_row(name) for name in names]
    assert [row.name for row in chosen] == names
    rows = [sweep.Row(row.name, lambda row=row: layers.measure(row, HostClock(), 0.0)) for row in chosen]
    broken = sweep.Row("broken", lambda: (_ for _ in ()).throw(RuntimeError("no memory\nat all")))
    assert measured([*rows, broken], on_the_cpu, "layers", layers.line) == 1
    assert "5 of" not in capsys.readouterr().out.splitlines()[0]
    written = json.loads(on_the_cpu.path.read_text())
    found = written["parts"]["layers"]["rows"]
    assert list(found) == [*names, "broken"]
    assert found["broken"]["failed"] == "no memory"
    for name in names:
        row = found[name]
        assert not row["disagrees"]
        assert row["ratio"][TORCH] == 1.0
        assert row["rounds"] == 5
        assert row["launching_seconds"][OURS] == 1e-6
        assert f"{OURS} stepwise" in row["refused"]  # there is no GPU
        assert row["peak_mib"][OURS] == 3
        assert (layers.PROJECTION in row["seconds"]) == ("eval" in name and "L2" not in name)
        assert set(row["first_call_seconds"]) == set(row["seconds"])
        if kernels.available:
            assert {layers.TRITON, f"{layers.TRITON} stepwise"} <= set(row["seconds"])
            assert row["triton_ratio"] == {TORCH: 1.0, layers.EAGER: 1.0, OURS: 1.0}
            assert "triton" in row["triton_choice"]
        else:
            assert "Triton" in row["refused"][layers.TRITON]
    # What was measured with these sources is not measured again, unless that is asked for.
    assert measured(rows, on_the_cpu, "layers", layers.line) == 0
    assert "0 of 5 rows" in capsys.readouterr().out
    assert measured(rows[:1], on_the_cpu, "layers", layers.line, again=True) == 0
    assert measured(rows, on_the_cpu, "layers", layers.line, seconds=-1.0, again=True) == 1
    assert "5 rows are left" in capsys.readouterr().out
    text = summary.markdown(json.loads(on_the_cpu.path.read_text()))
    assert "**lstm, fp32, one layer, forward**" in text
    assert "| H=8, B=2, T=2 | 1 |" in text
    assert "| `broken` | no memory |" in text


def test_rows_that_wait_for_the_host() -> None:
    ahead = device.WAIT_AT_MOST
    for seconds, launching, waits in (
        (50e-6, 100e-6, False),  # queued ahead, all of it
        (50e-6, 1.9e-3, False),
        (3e-3, ahead + 3e-3, True),  # ended with the last launch
        (3.2e-3, ahead + 3e-3, True),
        (4e-3, ahead + 3e-3, False),  # behind the host at the end
        (9e-3, ahead + 3e-3, False),
    ):
        assert device.host_bound(seconds, launching) == waits, (seconds, launching)


def test_a_call_that_launched_late_once_does_not_wait_for_the_host() -> None:
    clock = HostClock()
    names: list[Any] = ["once", "mostly"]
    clock.launching = {"once": [1e-4, 1e-4, 1.0], "mostly": [1.0, 1.0, 1e-4]}
    assert clock.host_bound({name: 5e-5 for name in names}, {name: name for name in names}) == ["mostly"]  # type: ignore[arg-type]


def test_rows_that_wait_for_the_host_are_marked(on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HostClock()
    monkeypatch.setattr(HostClock, "host_bound", lambda *_: [OURS])
    row = layer_row("lstm-T2-B2-H8-eval")
    measured([sweep.Row(row.name, lambda: layers.measure(row, clock, 0.0))], on_the_cpu, "layers", layers.line)  # type: ignore[arg-type]
    written = json.loads(on_the_cpu.path.read_text())
    assert written["parts"]["layers"]["rows"][row.name]["host_bound"] == [OURS]
    assert f"{OURS} 1000 (host), " in layers.line(row.name, written["parts"]["layers"]["rows"][row.name])
    line = next(line for line in summary.markdown(written).splitlines() if line.startswith("| H=8"))
    assert f" | {OURS} |" in line


def test_results_that_differ_are_told(on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    row, build = layer_row("lstm-T2-B2-H8-eval"), layers.candidates

    def wrong(row: cases.LayerCase) -> dict[str, Any]:
        found = build(row)
        return {**found, OURS: lambda run=found[OURS]: run() + 1}

    monkeypatch.setattr(layers, "candidates", wrong)
    found = layers.measure(row, HostClock(), 0.0)  # type: ignore[arg-type]
    assert OURS in found["disagrees"]
    assert layers.EAGER not in found["disagrees"]


def test_older_rows_are_measured_again(on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [sweep.Row(name, lambda: {"failed": "x"}) for name in "ab"]
    measured(rows, on_the_cpu, "layers", layers.line)
    monkeypatch.setattr(results, "head", lambda: {**machine.head(), "source": "another"})
    measured(rows[:1], on_the_cpu, "layers", layers.line)
    kept = on_the_cpu.content["parts"]["layers"]
    assert [row["run"] for row in kept["rows"].values()] == [1, 0]
    measured(rows[1:], on_the_cpu, "layers", layers.line)
    assert len(kept["runs"]) == 2  # the oldest has no row left
    assert [kept["runs"][row["run"]]["source"] for row in kept["rows"].values()] == ["another"] * 2


def test_broken_gpu_is_told_and_passed_over(on_the_cpu: Results) -> None:
    def break_it() -> dict[str, Any]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    rows = [sweep.Row("bad", break_it), sweep.Row("good", lambda: {"failed": "no"})]
    with pytest.raises(machine.CannotRun, match="bad broke the GPU's context"):
        measured(rows, on_the_cpu, "layers", layers.line)
    assert measured(rows, on_the_cpu, "layers", layers.line) == 1
    assert set(json.loads(on_the_cpu.path.read_text())["parts"]["layers"]["rows"]) == {"bad", "good"}


def test_dry_run_of_attention(on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PeerUnavailable("no compiler")

    monkeypatch.setattr(attention.AttentionCase, "_compiled", refuse)
    chosen = [attention.AttentionCase(score, 2, 3, 4, 8, training=True) for score in attention.SCORES]
    rows = [sweep.Row(case.name, lambda case=case: attention.measure(case, HostClock(), 0.0)) for case in chosen]
    assert measured(rows, on_the_cpu, "attention", attention.line) == 0
    text = summary.markdown(on_the_cpu.content)
    assert "| `additive-B2-Tq3-Tk4-D8-train` | 1 |" in text
    assert "Left out: torch.compile: no compiler." in text
    assert {case.dtype for case in attention.all_cases()} == set(attention.DTYPES)


def test_summary_of_everything(on_the_cpu: Results, tmp_path: Path) -> None:
    content = on_the_cpu.content
    on_the_cpu.begin("tests").add("pytest -m cuda", {"status": 1, "counts": {"failed": 1}, "failed": ["test_x"]})
    on_the_cpu.begin("sanitize").add("racecheck", {"status": 9, "errors": 1, "first": ["Race"]})
    timed = {"unit": "ns", "value": 401.0, "low": 400.0, "high": 410.0}
    on_the_cpu.begin("latencies").add("flag through L2, one way", timed)
    row = layer_row("lstm-T100-B16-H256-bfloat16-eval")
    seconds = {OURS: 200e-6, TORCH: 600e-6, layers.PROJECTION: 100e-6, f"{OURS} stepwise": 900e-6}
    seconds |= {layers.TRITON: 300e-6, f"{layers.TRITON} grid": 310e-6}
    ratios = {"ratio": {TORCH: 0.5}, "triton_ratio": {TORCH: 2.0}}
    figures = {"seconds": seconds, "call_seconds": {OURS: 300e-6}, **ratios, "peak_mib": {OURS: 1.0}}
    on_the_cpu.begin("layers").add(row.name, {"case": row.facts(), "refused": {}, "disagrees": {}, **figures})
    kernels = {"case": row.facts(), TORCH: {"launches": 305, "top": [["LSTM_elementWise_fp", 100, 250.0]]}}
    on_the_cpu.begin("kernels").add(row.name, kernels)
    on_the_cpu.save()
    assert json.loads(on_the_cpu.path.read_text()) == results.rounded(content)
    text = summary.markdown(content)
    assert "| compute-sanitizer racecheck | 1 errors | Race |" in text
    assert "| flag through L2, one way | 401 ns | 400-410 | 400 |" in text
    assert "1 slower than cuDNN" in text
    line = next(line for line in text.splitlines() if line.startswith("| H=256, B=16, T=100 |"))
    assert line.startswith("| H=256, B=16, T=100 | 0.2 | 0.3 | 0.50 | triton grid | 0.3 | 2.00 | 1.00 | 5.00 |")
    assert line.endswith("| 0.6-0.8 | 1.25 | standard | 1 / ? |")
    summary.write(on_the_cpu.path.parent)
    assert (on_the_cpu.path.parent / "gpu.md").read_text() == text


@pytest.mark.parametrize("name", targets.ESTIMATES)
def test_estimates_are_of_latencies_that_are_measured(name: str) -> None:
    text = Path(commands.__file__).with_name("latencies.cu").read_text()
    assert name.split(",")[0] in text


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
