"""What the benchmarks compare us with computes what we do; the sweep and the streaming benchmark measure it."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import rows, runtimes, streaming, sweep
from benchmarks.attention import COMPILED, EAGER, SDPA, AttentionCase
from benchmarks.loss import CHUNKED, LossCase
from benchmarks.onnx_model import onnx_model
from benchmarks.peers import PeerDisagrees, recurrence_builders
from rnnkern._bench.cases import OURS, TORCH, Case, modules
from rnnkern._bench.timing import Comparison

ALL_CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("peer", ["ONNX Runtime", "OpenVINO"])
def test_runtime_computes_what_we_do(peer: str, cell: str, layers: int, bidirectional: bool) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip(peer.replace(" ", "").lower())
    case = Case(cell, 5, 3, 7, 9, layers, bidirectional)
    builders = recurrence_builders(case)
    ours, theirs = (builders[name]() for name in (OURS, peer))
    torch.testing.assert_close(theirs(), ours(), rtol=1e-4, atol=1e-5)
    rows.check_row(case, {OURS: ours, peer: theirs})


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_onnx_states_are_carried(cell: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    case = Case(cell, 4, 2, 3, 5, layers=2, bidirectional=True)
    module = modules(case)[OURS]
    first = [torch.randn(4, 2, 5) for _ in range(2 if cell == "lstm" else 1)]
    y, last = module(case.input(), tuple(first) if cell == "lstm" else first[0])
    session = runtimes.onnxruntime_session(onnx_model(module, 4, 2, states=True))
    found: list[Tensor] = [torch.empty(4, 2, 10), *(torch.empty(2, 2, 5) for _ in session.get_outputs()[1:])]
    by_layer = [state[2 * layer : 2 * layer + 2].contiguous() for layer in range(2) for state in first]
    runtimes.BoundSession(session, [case.input(), *by_layer], found)()
    torch.testing.assert_close(found[0], y, rtol=1e-4, atol=1e-5)
    for kind, state in enumerate(last if cell == "lstm" else [last]):
        both = torch.cat(found[1 + kind :: len(first)])
        torch.testing.assert_close(both, state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "peers"),
    [
        (Case("lstm", 9, 8, 6, 16, layers=2, bidirectional=True), ["ONNX Runtime", "OpenVINO", "torch int8"]),
        (Case("gru", 9, 9, 6, 16), ["ONNX Runtime", "OpenVINO"]),
        (Case("rnn_relu", 9, 1, 6, 16), ["ONNX Runtime", "OpenVINO"]),
        (Case("gru", 9, 2, 6, 16, dtype=torch.bfloat16), ["rnnkern float32"]),
        (Case("lstm", 9, 2, 6, 16, dtype=torch.float16), ["rnnkern bfloat16"]),
        (Case("lstm", 9, 2, 6, 16, layers=2, dtype=torch.int8), ["torch int8", "rnnkern float32"]),
        (Case("gru", 9, 9, 6, 16, dtype=torch.int8), ["rnnkern float32"]),
        (Case("gru", 9, 4, 6, 16, ragged="lengths"), ["rnnkern padded"]),
        (Case("lstm", 9, 4, 6, 16, ragged="packed", training=True), ["rnnkern padded"]),
        (Case("lstm", 9, 4, 6, 16, training=True), []),
        (Case("gru", 1, 4, 6, 16, single_step=True), []),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_peers_of_a_case_agree(case: Case, peers: list[str]) -> None:
    assert list(recurrence_builders(case)) == [OURS, TORCH, *peers]
    with torch.set_grad_enabled(case.training):
        rows.check_row(case, rows.row_runners(case))


def test_a_wrong_peer_is_refused() -> None:
    case = Case("gru", 9, 2, 6, 16)
    right = recurrence_builders(case)[TORCH]()
    for wrong in (lambda: right() * 1.01, lambda: right() * float("nan")):
        with pytest.raises(PeerDisagrees, match=r"gru-T9-B2-H16-I6-eval: torch\.nn differs from rnnkern"):
            rows.check_row(case, {OURS: right, TORCH: wrong})


def test_missing_runtimes_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    rows._say_once.cache_clear()
    for _ in range(2):
        assert list(rows.row_runners(Case("lstm", 3, 1, 4, 4))) == [OURS, TORCH, "torch int8"]
    said = capsys.readouterr().err
    assert said.count("ONNX Runtime is left out: ") == said.count("OpenVINO is left out: ") == 1
    assert list(streaming.streams(Case("lstm", 1, 1, 4, 4))) == [OURS, streaming.STEP, streaming.IN_PLACE, TORCH]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("score", ["additive", "dot", "scaled_dot", "general"])
def test_peers_of_attention_agree(score: str, training: bool) -> None:
    case = AttentionCase(score, 2, 3, 4, 16, training=training, need_weights=training)
    with torch.set_grad_enabled(training):
        functions = rows.row_runners(case)
        assert set(functions) - {COMPILED} == {OURS, EAGER} | ({SDPA} if score != "additive" else set())
        rows.check_row(case, functions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_peers_of_the_loss_agree(training: bool, dtype: torch.dtype) -> None:
    case = LossCase(20, 7, 5, training=training, padding=0.3, dtype=dtype)
    mode = ("bfloat16-" if dtype == torch.bfloat16 else "") + ("train" if training else "eval")
    assert case.name == f"loss-N20-V7-D5-padding0.3-{mode}"
    with torch.set_grad_enabled(training):
        functions = rows.row_runners(case)
        assert set(functions) - {CHUNKED, COMPILED} == {OURS, EAGER}
        rows.check_row(case, functions)


def test_random_shapes() -> None:
    cases = list(sweep.random_cases(200, seed=3))
    assert cases == list(sweep.random_cases(200, seed=3))
    assert len(set(cases)) == 200
    assert cases != list(sweep.random_cases(200, seed=4))
    assert [Case.parse(case.name) for case in cases] == cases
    for case in cases:
        assert 1 <= case.T <= 2000
        assert 1 <= case.B <= 128
        assert 8 <= case.H <= 1024
        assert 1 <= case.I <= 1024
        assert sweep.flop(case) <= sweep.MAX_FLOP
    assert {(case.cell, case.training) for case in cases} == {(c, t) for c in ALL_CELLS for t in (False, True)}
    assert {case.layers for case in cases} == {1, 2}
    assert {case.bidirectional for case in cases} == {False, True}
    assert any(case.H % 16 for case in cases)


def test_flop() -> None:
    assert sweep.flop(Case("lstm", 10, 3, 5, 7)) == 10 * 3 * 2 * 4 * 7 * (5 + 7)
    both = Case("gru", 10, 3, 5, 7, layers=2, bidirectional=True, training=True)
    assert sweep.flop(both) == 3 * 10 * 3 * 2 * 2 * 3 * 7 * ((5 + 7) + (14 + 7))


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "find_probes", lambda: None)
    monkeypatch.setattr(sweep, "MAX_FLOP", 1e6)
    assert sweep.main(["--count", "3", "--each", "0.01", "--out", str(tmp_path), "--threads", "1"]) in (0, 1)
    printed = capsys.readouterr().out
    (written,) = tmp_path.glob("*/sweep.json")
    (section,) = json.loads(written.read_text())["sections"]
    ratios = [shape["ratio"] for shape in section["shapes"]]
    assert len(ratios) == 3
    assert ratios == sorted(ratios)
    assert "[3/3]" in printed
    assert section["shapes"][0]["name"] in (written.parent / "sweep.md").read_text()
    name = section["shapes"][0]["name"]
    sweep.main(["--only", name, "--each", "0.01", "--out", str(tmp_path), "--threads", "1"])
    assert [shape["name"] for shape in json.loads(written.read_text())["sections"][0]["shapes"]] == [name]


def test_a_seeming_loss_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    results = [Comparison({OURS: [1.0], TORCH: [ratio]}) for ratio in (0.8, 1.2, 2.0)]

    def compare(functions: object, **how: Any) -> Comparison:
        asked.append(how)
        return results[len(asked) - 1]

    monkeypatch.setattr(sweep, "compare", compare)
    case = sweep.random_case(random.Random(0))
    again = sweep.measure(case, None, seconds=0.5)
    assert (again["ratio"], again["measured_again"]) == (1.2, True)
    assert asked[1]["seconds"] == 4 * asked[0]["seconds"]
    once = sweep.measure(case, None, seconds=0.5)
    assert (once["ratio"], once["measured_again"]) == (2.0, False)


def test_sweep_stops_when_its_time_is_spent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "find_probes", lambda: None)
    cases = [Case("gru", 1, 1, 8, 8), Case("gru", 1, 1, 9, 9)]
    section = sweep.run(cases, seconds=0.02, budget=0.01)
    assert [shape["name"] for shape in section["shapes"]] == [cases[0].name]
    assert "the time is spent after 1 of 2 shapes" in capsys.readouterr().err


def test_sweep_refuses_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--only", "lstn-T1"]) == 2
    assert "'lstn-T1' is not the name of a case" in capsys.readouterr().err


@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_streams_carry_the_same_state(cell: str, single_step: bool) -> None:
    found = streaming.streams(Case(cell, 1, 1, 6, 6, single_step=single_step))
    assert {OURS, streaming.STEP, streaming.IN_PLACE, TORCH} <= set(found)
    streaming.check_agreement(found)
    found[TORCH]()
    with pytest.raises(PeerDisagrees, match=r"torch\.nn differs"):
        streaming.check_agreement(found)


def test_percentile() -> None:
    assert streaming.percentile(range(1, 101), 99) == 99
    assert streaming.percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert streaming.percentile(range(1, 101), 50) == 50


@pytest.mark.parametrize("mode", [streaming.ASLEEP, streaming.AWAKE])
def test_calls_keep_the_period(mode: str) -> None:
    began: list[float] = []
    clock = streaming.time.perf_counter
    start = clock()
    assert len(streaming.times(lambda: began.append(clock()), 3, 0.01, mode)) == 3
    assert [moment - start >= 0.01 * number for number, moment in enumerate(began, start=1)] == [True] * 3


def test_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 2)
    arguments = ["--only", "gru", "--H", "8", "--calls", "4", "--period", "0.001", "--threads", "1"]
    assert streaming.main([*arguments, "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*/streaming.json")
    (measured,) = json.loads(written.read_text())["sections"][0]["rows"]
    modes = measured["measured"][TORCH]
    assert {mode: figures["calls"] for mode, figures in modes.items()} == {"tight": 40, "asleep": 4, "awake": 4}
    assert all(0 < figures["median"] <= figures["p99"] for figures in modes.values())
    assert "| GRU, H=8 | torch.nn |" in (written.parent / "streaming.md").read_text()
