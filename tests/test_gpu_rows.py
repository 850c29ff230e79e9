"""The GPU report's sweeps without a GPU: dry runs on the CPU, and what becomes of rows that fail or are slow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention import COMPILED, EAGER, SDPA
from benchmarks.environment import ROOT
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import cases, device, functional, layers, machine, results, summary, sweep
from benchmarks.gpu.candidates import CUDA, TRITON
from benchmarks.gpu.results import Results
from benchmarks.loss import CHUNKED
from rnnkern import _library
from rnnkern import triton as kernels
from rnnkern._bench.cases import OURS, TORCH
from rnnkern._bench.timing import compare
from rnnkern.ops import linear_cross_entropy as loss_ops
from tests.gpu_dry_run import HostClock, layer_row, measured


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
        assert f"{CUDA} stepwise" in row["refused"]  # there is no GPU
        assert row["peak_mib"][OURS] == 3
        assert (layers.PROJECTION in row["seconds"]) == ("eval" in name and "L2" not in name)
        assert set(row["first_call_seconds"]) == set(row["seconds"])
        if kernels.available:
            assert {TRITON, f"{TRITON} stepwise"} <= set(row["seconds"])
            assert row["triton_ratio"] == {TORCH: 1.0, EAGER: 1.0}
            assert "triton" in row["triton_choice"]
        else:
            assert "Triton" in row["refused"][TRITON]
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
    assert EAGER not in found["disagrees"]


def test_a_candidate_that_fails_leaves_the_others(on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    row, build = layer_row("lstm-T2-B2-H8-eval"), layers.candidates

    def fail() -> object:
        raise TypeError("no such kernel\nat all")

    monkeypatch.setattr(layers, "candidates", lambda row: {**build(row), f"{TRITON} stepwise": fail})
    rows = [sweep.Row(row.name, lambda: layers.measure(row, HostClock(), 0.0))]  # type: ignore[arg-type]
    assert measured(rows, on_the_cpu, "layers", layers.line) == 1
    found = on_the_cpu.content["parts"]["layers"]["rows"][row.name]
    assert found["broken"] == {f"{TRITON} stepwise": "TypeError: no such kernel"}
    assert {OURS, TORCH} <= set(found["seconds"])
    assert f"{TRITON} stepwise: TypeError: no such kernel" in summary.markdown(on_the_cpu.content)


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


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile would take seconds."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", refuse)


def functional_rows(chosen: list[functional.Case]) -> list[sweep.Row]:
    return [sweep.Row(case.name, lambda case=case: functional.measure(case, HostClock(), 0.0)) for case in chosen]


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("Tq", [1, 3])
def test_dry_run_of_attention(Tq: int, training: bool, on_the_cpu: Results) -> None:
    chosen = [functional.AttentionCase(score, 2, Tq, 4, 8, training=training) for score in functional.SCORES]
    assert measured(functional_rows(chosen), on_the_cpu, "attention", functional.line) == 0
    found = on_the_cpu.content["parts"]["attention"]["rows"]
    for case in chosen:
        row = found[case.name]
        assert not row["disagrees"]
        assert set(row["peak_mib"]) == set(row["seconds"]) == set(row["first_call_seconds"])
        assert {EAGER} | ({SDPA} if case.score != "additive" else set()) <= set(row["seconds"])
        assert row["refused"][COMPILED] == "rows of torch.bfloat16 alone are compiled"
        assert row["refused"][CUDA].startswith("backend 'cuda' cannot run: ")  # there is no GPU
        if kernels.available:
            assert row["triton_ratio"][EAGER] == 1.0
        else:
            assert row["refused"][TRITON] == f"backend 'triton' cannot run: {kernels.missing_on('cpu')}"
        if _library.available:
            assert row["ratio"][EAGER] == 1.0
            assert "attention" in row["choice"]
        else:
            assert row["refused"][OURS].startswith("eager: ")
    text = summary.markdown(on_the_cpu.content)
    assert f"| `{chosen[0].name}` | 1 / 3 |" in text
    assert "torch.compile: rows of torch.bfloat16 alone are compiled" in text


@pytest.mark.usefixtures("nothing_compiles")
def test_attention_without_a_compiler_says_why(on_the_cpu: Results) -> None:
    case = functional.AttentionCase("additive", 2, 1, 4, 8, dtype=torch.bfloat16)
    measured(functional_rows([case]), on_the_cpu, "attention", functional.line)
    row = on_the_cpu.content["parts"]["attention"]["rows"][case.name]
    assert row["refused"][COMPILED] == "no compiler"
    assert (TRITON in row["seconds"]) == kernels.available
    assert EAGER in row["seconds"]


def test_attention_that_differs_is_told(on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    case, build = functional.AttentionCase("scaled_dot", 2, 3, 4, 8), functional.builders

    def wrong(case: Any) -> dict[str, Any]:
        found = build(case)
        run = found[SDPA]()
        return {**found, SDPA: lambda: lambda: run() + 1}

    monkeypatch.setattr(functional, "builders", wrong)
    assert measured(functional_rows([case]), on_the_cpu, "attention", functional.line) == 1
    row = on_the_cpu.content["parts"]["attention"]["rows"][case.name]
    assert list(row["disagrees"]) == [SDPA]
    assert f"{EAGER} differs from " in row["disagrees"][SDPA]


@pytest.mark.parametrize("training", [False, True])
def test_dry_run_of_the_loss(training: bool, on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_ops, "_few", lambda *_: False)
    case = functional.LossCase(5, 33, 8, training=training)
    assert measured(functional_rows([case]), on_the_cpu, "loss", functional.line) == 0
    row = on_the_cpu.content["parts"]["loss"]["rows"][case.name]
    assert not row["disagrees"]
    assert {OURS, EAGER} <= set(row["seconds"])
    assert row["peak_mib"] == dict.fromkeys(row["seconds"], 3.0)
    assert (TRITON in row["seconds"]) == kernels.available
    assert (CHUNKED in row["seconds"]) == hasattr(torch.nn, "LinearCrossEntropyOptions")
    assert CUDA not in {**row["seconds"], **row["refused"]}
    assert "linear_cross_entropy" in row["choice"]
    assert f"| `{case.name}` | 1 / 3 |" in summary.markdown(on_the_cpu.content)


@pytest.mark.parametrize("part", ["attention", "loss"])
def test_parts_of_functions_run(part: str, on_the_cpu: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, which takes the rows that are asked for."""
    monkeypatch.setattr(program, "need_engines", lambda: None)
    monkeypatch.setattr(program, "DeviceClock", HostClock)
    case = functional.AttentionCase("scaled_dot", 1, 1, 2, 4), functional.LossCase(2, 3, 4)
    monkeypatch.setattr(functional, "attention_cases", lambda: case[:1])
    monkeypatch.setattr(functional, "loss_cases", lambda: case[1:])
    words = ["--part", part, "--each", "0.001", "--out", str(on_the_cpu.path.parent.parent)]
    assert program.main([*words, "--only", "nothing"]) == 0
    assert not written_rows(on_the_cpu, part)
    assert program.main(words) == 0
    assert list(written_rows(on_the_cpu, part)) == [case[part == "loss"].name]


def written_rows(of: Results, part: str) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(of.path.read_text())["parts"][part]["rows"]
    return rows


def test_rows_of_functions() -> None:
    attended, lost = list(functional.attention_cases()), list(functional.loss_cases())
    assert {case.dtype for case in attended} == set(functional.DTYPES)
    assert {case.Tq > 1 for case in attended} == {False, True}
    assert {case.dtype for case in lost} == {torch.bfloat16, torch.float32}
    assert {case.training for case in attended} == {case.training for case in lost} == {False, True}
    assert len({case.name for case in [*attended, *lost]}) == len(attended) + len(lost)
    assert (min(case.V for case in lost), max(case.V for case in lost)) == (10_000, 128_000)
    for case in lost:  # fewer logits or rows are left to torch's two functions
        assert not loss_ops._few("cuda", case.dtype, case.N, case.V)


def test_what_triton_loads_is_counted(tmp_path: Path) -> None:
    """By its compiler, which needs no GPU, in a process that does not interpret; first with a cold cache on disk."""
    if not kernels.available:
        pytest.skip(kernels.reason)
    program = """if True:
        import json, torch
        from benchmarks.gpu.candidates import loaded_kernels
        from rnnkern.triton import compile
        from rnnkern.triton.launch import recording

        target = compile.TARGETS["sm_90"]
        with recording(target.facts) as launches:
            compile.run_loss(torch.float16, True)
        for _ in range(2):
            with loaded_kernels() as loaded:
                compile.compile_launch(launches[0], target)
            print(json.dumps(loaded))
    """
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=variables, cwd=ROOT).stdout
    cold, warm = map(json.loads, said.splitlines())
    assert cold == {"compiled": ["softmax_rows"], "cached": []}  # the name by which compute-sanitizer is to know it
    assert warm == {"compiled": [], "cached": ["softmax_rows"]}
