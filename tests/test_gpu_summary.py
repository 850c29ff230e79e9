"""The GPU report's summary: tables of results, and the figures that stand beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import commands, layers, order, results, summary, targets
from benchmarks.gpu.candidates import CUDA, TRITON
from benchmarks.gpu.results import Results
from rnnkern._bench.cases import OURS, TORCH, Case
from tests.gpu_dry_run import layer_row


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


def test_summary_of_everything(on_the_cpu: Results, tmp_path: Path) -> None:
    content = on_the_cpu.content
    on_the_cpu.begin("tests").add("pytest -m cuda", {"status": 1, "counts": {"failed": 1}, "failed": ["test_x"]})
    sanitize = on_the_cpu.begin("sanitize")
    sanitize.add("racecheck cuda", {"status": 9, "errors": 1, "first": ["Race"]})
    sanitize.add("racecheck triton", {"skipped": "Triton is not installed"})
    timed = {"unit": "ns", "value": 401.0, "low": 400.0, "high": 410.0}
    on_the_cpu.begin("latencies").add("flag through L2, one way", timed)
    row = layer_row("lstm-T100-B16-H256-bfloat16-eval")
    seconds = {OURS: 200e-6, TORCH: 600e-6, layers.PROJECTION: 100e-6, f"{CUDA} stepwise": 900e-6}
    seconds |= {TRITON: 300e-6, f"{TRITON} grid": 310e-6}
    ratios = {"ratio": {TORCH: 0.5}, "triton_ratio": {TORCH: 2.0, CUDA: 0.8}}
    figures = {"seconds": seconds, "call_seconds": {OURS: 300e-6}, **ratios, "peak_mib": {OURS: 1.0}}
    on_the_cpu.begin("layers").add(row.name, {"case": row.facts(), "refused": {}, "disagrees": {}, **figures})
    kernels = {"case": row.facts(), TORCH: {"launches": 305, "top": [["LSTM_elementWise_fp", 100, 250.0]]}}
    on_the_cpu.begin("kernels").add(row.name, kernels)
    on_the_cpu.save()
    assert json.loads(on_the_cpu.path.read_text()) == results.rounded(content)
    text = summary.markdown(content)
    assert "| compute-sanitizer racecheck cuda | 1 errors | Race |" in text
    assert "| compute-sanitizer racecheck triton | skipped | Triton is not installed |" in text
    assert "| flag through L2, one way | 401 ns | 400-410 | 400 |" in text
    assert "1 slower than cuDNN" in text
    line = next(line for line in text.splitlines() if line.startswith("| H=256, B=16, T=100 |"))
    assert line.startswith(
        "| H=256, B=16, T=100 | 0.2 | 0.3 | 0.50 | triton grid | 0.3 | 2.00 | cuda 1.25 | 1.00 | 5.00 |"
    )
    assert line.endswith("| 0.6-0.8 | 1.25 | standard | 1 / ? |")
    summary.write(on_the_cpu.path.parent)
    assert (on_the_cpu.path.parent / "gpu.md").read_text() == text


def compared(ratio: float | None, **facts: Any) -> dict[str, Any]:
    """A row in which Triton was so many times as fast as CUDA, or only one of them ran."""
    return {"triton_ratio": {} if ratio is None else {CUDA: ratio}, "disagrees": {}, **facts}


def test_the_faster_backend() -> None:
    assert order.winner(compared(1.25)) == "triton 1.25"
    assert order.winner(compared(0.5)) == "cuda 2.00"
    assert order.winner(compared(None)) == ""
    assert order.winner({"failed": "no memory"}) == ""
    assert order.winner(compared(1.25, disagrees={TRITON: "differs"})) == ""  # a wrong result in no time
    assert order.winner(compared(1.25, disagrees={f"{TRITON} grid": "differs"})) == "triton 1.25"


def test_order_of_backends() -> None:
    layer = {"cell": "lstm", "dtype": "bf16", "shape": "plain", "mode": "eval"}
    attention = {"score": "additive", "dtype": "bfloat16", "training": True}
    layers = {"a": compared(0.5, case=layer), "b": compared(1.5, case=layer), "c": compared(2.0, case=layer)}
    layers |= {"d": compared(None, case=layer), "e": {"failed": "no memory"}}
    parts = {"layers": {"rows": layers}, "attention": {"rows": {"f": compared(0.8, case=attention)}}}
    text = "\n".join(order.order_tables(parts))
    assert "| layers: lstm, bf16, plain, eval | 3 | 1 | 2 | 1.50 | 0.50 | 2.00 |" in text
    assert "| attention: additive, bfloat16, forward and backward | 1 | 1 | 0 | 0.80 | 0.80 | 0.80 |" in text
    assert "| triton faster: 2 of 2 |" in text
    assert text.index("| `c` | 2.00 |") < text.index("| `b` | 1.50 |")
    assert "`a`" not in text
    assert not list(order.order_tables({"layers": {"rows": {"d": layers["d"]}}}))


def test_first_calls_are_cold_or_from_disk() -> None:
    def row(compiled: int, cached: int, seconds: float) -> dict[str, Any]:
        kernels = {TRITON: {"compiled": compiled, "cached": cached}, TORCH: {"compiled": 9, "cached": 0}}
        return {"first_call_seconds": {TRITON: seconds, TORCH: 9.0}, "first_call_kernels": kernels}

    rows = {"a": row(2, 0, 1.0), "b": row(3, 0, 5.0), "c": row(0, 2, 0.25), "mixed": row(1, 1, 7.0), "failed": {}}
    text = "\n".join(summary.first_call_table({"loss": {"rows": rows}}))
    assert f"| loss: {TRITON} | 2 | 2-3 | 3.00 | 5.00 | 1 | 2-2 | 0.25 | 0.25 |" in text
    assert TORCH not in text  # what others compile is not ours
    assert not list(summary.first_call_table({"loss": {"rows": {"mixed": row(1, 1, 7.0)}}}))


@pytest.mark.parametrize("name", targets.ESTIMATES)
def test_estimates_are_of_latencies_that_are_measured(name: str) -> None:
    text = Path(commands.__file__).with_name("latencies.cu").read_text()
    assert name.split(",")[0] in text
