"""The GPU report's sweeps without a GPU: dry runs on the CPU, and what becomes of rows that fail or are slow."""

import json
from typing import Any

import pytest
import torch

from benchmarks.gpu import attention, cases, device, layers, machine, results, summary, sweep
from benchmarks.gpu.results import Results
from benchmarks.runtimes import PeerUnavailable
from rnnkern import triton as kernels
from rnnkern._bench.cases import OURS, TORCH
from rnnkern._bench.timing import compare
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
