"""Measuring: the floors against figures worked out by hand, the paired timing, the report's tables."""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks import environment, render, report
from benchmarks.rows import SMOKE, all_rows
from benchmarks.runtimes import PeerUnavailable
from rnnkern import _library
from rnnkern._bench.cases import OURS, TORCH, Case, first_tensor, modules, runners
from rnnkern._bench.floors import CacheLevel, Ceilings, floor_seconds
from rnnkern._bench.probes import MachineProbe, Probes, ProbesUnavailable, ceilings
from rnnkern._bench.timing import Comparison, compare

# Two cores of a Zen 5, as measured: FMA 575 GFLOP/s, L2 565, L3 262, memory 92 GB/s, tanh 2 x 9 G/s.
ZEN5 = Ceilings(
    threads=2,
    fma_gflops=575,
    activations_gps=18,
    levels=(CacheLevel(40e3, 1126), CacheLevel(0.85e6, 565), CacheLevel(8e6, 262), CacheLevel(1e12, 92)),
)


@pytest.mark.parametrize(
    ("cell", "T", "B", "H", "microseconds"),
    [
        ("gru", 1, 1, 256, 2.9),
        ("lstm", 1, 1, 512, 25),
        ("gru", 100, 1, 256, 217),
        ("lstm", 100, 1, 512, 1631),
        ("gru", 100, 1, 1024, 5541),
        ("lstm", 100, 8, 256, 1516),
        ("gru", 100, 32, 256, 4513),
        ("lstm", 100, 64, 512, 47595),
        ("gru", 50, 64, 1024, 70572),
        ("gru", 1000, 1, 128, 583),
        ("lstm", 1000, 16, 128, 7863),
        ("rnn_tanh", 100, 1, 256, 75),
        ("rnn_tanh", 100, 64, 512, 11853),
    ],
)
def test_floor_of_a_known_machine(cell: str, T: int, B: int, H: int, microseconds: float) -> None:
    assert floor_seconds(cell, ZEN5, T=T, B=B, I=H, H=H) == pytest.approx(microseconds * 1e-6, rel=0.03)


def test_floor_of_stacked_directions_and_training() -> None:
    sizes = {"T": 100, "B": 32, "I": 256, "H": 256, "layers": 2, "bidirectional": True}
    forward = floor_seconds("lstm", ZEN5, **sizes)
    assert forward == pytest.approx(30088e-6, rel=0.03)
    assert floor_seconds("lstm", ZEN5, **sizes, training=True) == pytest.approx(3 * forward)


def test_reading_comes_from_the_nearest_memory_that_holds_it() -> None:
    rates = [size / ZEN5.read_seconds(size) / 1e9 for size in (50e3, 1e6, 12e6, 1e9)]
    assert rates[:2] == pytest.approx([1126, 565])
    assert 262 < rates[2] < 565  # part of it stays in L2
    assert 92 < rates[3] < 95


def test_probes_measure_something() -> None:
    try:
        probes = Probes()
    except ProbesUnavailable as error:
        pytest.skip(str(error))
    assert probes.fma_gflops(1) > 0
    assert probes.tanh_gps(1) > 0
    assert probes.read_gbps(1, 16 << 10) > 0
    assert probes.ping_pong_ns() > 0


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ProbesUnavailable, match="no-such-compiler"):
        Probes()


@pytest.mark.parametrize(("isa", "narrow"), [("avx2", True), ("avx512", False)])
def test_probes_use_the_vectors_of_the_engines(isa: str, narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("no C++ compiler")
    commands: list[list[str]] = []

    def refuse(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="")

    monkeypatch.setattr("subprocess.run", refuse)
    monkeypatch.setattr(_library, "extension", SimpleNamespace(get_isa=lambda: isa))
    with pytest.raises(ProbesUnavailable):
        Probes()
    assert ("-mno-avx512f" in commands[0]) == narrow


def test_ceilings_take_the_probe() -> None:
    probe = MachineProbe(100.0, 200.0, 9.0, {"l1": 400.0, "l2": 200.0, "l3": 150.0, "memory": 30.0}, 50.0, threads=2)
    found = ceilings(probe)
    assert (found.threads, found.fma_gflops, found.activations_gps) == (2, 200.0, 9.0)
    assert [level.read_gbps for level in found.levels] == [400.0, 200.0, 150.0, 30.0]


def test_ratio_is_the_median_of_pairs() -> None:
    comparison = Comparison({"peer": [2.0, 40.0, 6.0], "ours": [1.0, 10.0, 2.0]})
    assert comparison.ratio("peer", "ours") == 3.0
    assert comparison.median("peer") == 6.0
    assert comparison.best("ours") == 1.0
    assert comparison.ratio_range("peer", "ours") == (2.0, 4.0)


def test_compare_interleaves() -> None:
    ran: list[str] = []
    functions = {name: lambda name=name: ran.append(name) for name in "ab"}
    result = compare(functions, seconds=0.0, min_rounds=4, sample_seconds=0.0)
    assert [len(samples) for samples in result.samples.values()] == [4, 4]
    assert ran == list("aabb") + list("abba") * 2  # two warm-up calls each, then every round in turning order


def test_compare_rests_before_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr("time.sleep", lambda seconds: ran.append(f"rest {seconds}"))
    functions = {name: lambda name=name: ran.append(name) for name in "ab"}
    compare(functions, seconds=0.0, min_rounds=1, max_rounds=1, sample_seconds=0.0, rest=0.5)
    assert ran == [*"aabb", "rest 0.5", "a", "a", "rest 0.5", "b", "b"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_both_sides_of_a_case_compute_the_same(cell: str, single_step: bool, training: bool) -> None:
    extra: dict[str, Any] = {} if single_step else {"layers": 2, "bidirectional": True}
    case = Case(cell, 1 if single_step else 3, 2, 5, 4, training=training, single_step=single_step, **extra)
    x = torch.randn((2, 5) if single_step else (3, 2, 5))
    ours, theirs = (first_tensor(module(x)) for module in modules(case).values())
    torch.testing.assert_close(ours, theirs)
    results = [function() for function in runners(case).values()]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_both_sides_of_a_ragged_case_compute_the_same(cell: str, training: bool) -> None:
    case = Case(cell, 20, 5, 3, 4, layers=2, bidirectional=True, training=training, ragged="packed")
    ours, theirs = (function() for function in runners(case).values())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    padded = runners(replace(case, ragged="lengths"))[OURS]()
    if training:  # of the weights; that of the input has another layout
        torch.testing.assert_close(padded[1:], ours[1:], rtol=1e-4, atol=1e-5)
    else:
        packed = pack_padded_sequence(padded, case.lengths(), enforce_sorted=False)
        torch.testing.assert_close(packed.data, ours)


def test_ragged_lengths() -> None:
    case = Case("gru", 100, 32, 8, 8, ragged="lengths")
    lengths = case.lengths()
    assert lengths.max() == 100
    assert 10 <= lengths.min() < 30
    assert sorted(lengths) != list(lengths)
    assert case.valid_share() == pytest.approx(lengths.float().mean() / 100)
    assert case.floor(ZEN5) == pytest.approx(case.valid_share() * replace(case, ragged="").floor(ZEN5))
    assert replace(case, ragged="").valid_share() == 1.0


def test_names_are_read_back() -> None:
    cases = [row for row in all_rows() if isinstance(row, Case)]
    assert [Case.parse(case.name) for case in cases] == cases
    full = Case("rnn_relu", 7, 3, 5, 9, 2, bidirectional=True, training=True, dtype=torch.float64, ragged="lengths")
    assert Case.parse(full.name) == full


@pytest.mark.parametrize(
    "name",
    [
        "lstm",
        "lstm-T1-B1-H8",
        "lstn-T1-B1-H8-eval",
        "lstm-T1-B0-H8-eval",
        "gru-T1-B1-H8-eval-",
        "gru-T1-B1-H8-int8-train",
        "gru-cell-B1-H8-int8-eval",
    ],
)
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        Case.parse(name)


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in all_rows()]
    assert len(names) == len(set(names))
    assert set(SMOKE) <= set(names)


def entry(name: str, ratio: float, kind: str = "recurrence") -> dict[str, Any]:
    case = {**dataclasses.asdict(Case.parse(name)), "dtype": str(Case.parse(name).dtype)}
    return {
        "name": name,
        "kind": kind,
        "case": case,
        "seconds": {OURS: 1e-3, TORCH: ratio * 1e-3},
        "ratio": {TORCH: ratio},
        "floor_seconds": 5e-4,
        "valid_share": 1.0,
        "peak_mib": None,
    }


def make_report(*sections: list[dict[str, Any]]) -> dict[str, Any]:
    found = [
        {"threads": 2 - number, "probes": {"before": None, "after": None}, "rows": rows}
        for number, rows in enumerate(sections)
    ]
    return {
        "machine": {"cpu": "Some CPU", "threads": 2},
        "software": {"isa": "avx2", "torch": "2.13.0", "rnnkern": "0.1.0", "commit": "abc"},
        "date": "2026-01-01",
        "load_before": 0.1,
        "sections": found,
    }


def test_table_shows_losses_like_wins() -> None:
    rows = [entry("lstm-T100-B1-H64-eval", 2.0), entry("lstm-T100-B1-H64-I32-train", 0.5)]
    text = render.markdown(make_report(rows))
    assert "**Recurrence, forward, 2 threads**" in text
    assert "| LSTM, T=100, B=1, H=64 | 1 | 2.00 | 50% |" in text
    assert "| LSTM, T=100, B=1, I=32, H=64 | 1 | 0.50 | 50% |" in text


def test_tables_have_a_column_for_each_peer() -> None:
    more, less = entry("lstm-T100-B1-H64-eval", 2.0), entry("gru-cell-B1-H64-eval", 3.0)
    more["ratio"]["OpenVINO"] = 1.5
    more["peak_mib"] = {OURS: 1.25, TORCH: None}
    text = render.markdown(make_report([more, less]))
    assert "|  | rnnkern, ms | x torch.nn | x OpenVINO | of the floor | MiB, rnnkern / torch.nn |" in text
    assert "| LSTM, T=100, B=1, H=64 | 1 | 2.00 | 1.50 | 50% | 1.2 / ? |" in text
    assert "| GRUCell, B=1, H=64 | 1 | 3.00 |  | 50% |  |" in text


def test_ragged_rows_show_their_waste() -> None:
    ragged = entry("gru-T100-B8-H64-lengths-eval", 2.0, kind="ragged")
    ragged["ratio"][render.PADDED] = 1.6
    ragged["valid_share"] = 0.5
    text = render.markdown(make_report([ragged]))
    assert "| GRU, T=100, B=8, H=64, `lengths=` | 1 | 2.00 | 1.60 | 50% | 1.25 |" in text


def test_both_numbers_of_threads_are_shown() -> None:
    text = render.markdown(make_report([entry("gru-T9-B1-H64-eval", 2.0)], [entry("gru-T9-B1-H64-eval", 3.0)]))
    two, one = text.split("## 1 thread\n")
    assert "2.00" in two.split("## 2 threads\n")[1]
    assert "3.00" not in two
    assert "3.00" in one


def test_readme_block_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    render.update_readme(readme, tmp_path / "results")
    assert readme.read_text() == f"before\n{render.BEGIN}\n{render.NOTHING}\n{render.END}\nafter\n"
    folder = tmp_path / "results" / "some-cpu-2c"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(make_report([entry("lstm-T100-B1-H64-eval", 2.0)])))
    render.update_readme(readme, tmp_path / "results")
    text = readme.read_text()
    assert "LSTM, T=100, B=1, H=64" in text
    assert "results/some-cpu-2c/report.md" in text
    assert render.NOTHING not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


def test_another_machine_gets_another_folder(tmp_path: Path) -> None:
    mine, other = {"cpu": "mine", "threads": 2}, {"cpu": "other", "threads": 2}
    first = environment.folder_for(tmp_path, mine)
    first.mkdir()
    (first / "report.json").write_text(json.dumps({"machine": other}))
    second = environment.folder_for(tmp_path, mine)
    assert second != first
    assert environment.folder_for(tmp_path, other) == first


def test_a_forced_instruction_set_gets_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = {"cpu": "mine", "threads": 2}
    monkeypatch.delenv("RNNKERN_CPU_ISA", raising=False)
    own = environment.folder_for(tmp_path, identity)
    monkeypatch.setenv("RNNKERN_CPU_ISA", "avx2")
    forced = environment.folder_for(tmp_path, identity)
    assert forced == tmp_path / "avx2" / own.name


def test_no_row_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--only", "no-such-row"]) == 2
    assert "no row matches no-such-row" in capsys.readouterr().err


def unavailable(*_: object, **__: object) -> None:
    raise PeerUnavailable("it would compile for long")


def test_report_of_two_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_probes", lambda: None)
    threads = torch.get_num_threads()
    quick = ["--seconds", "0.01", "--no-memory", "--out", str(tmp_path)]
    monkeypatch.setattr("benchmarks.loss.compiled_runner", unavailable)
    patterns = ["gru-T1-B1-H64-*", "loss-N64-*-bfloat16-eval", "gru-T100-B32-H256-lengths-eval"]
    patterns.append("dot-B32-Tq1-Tk50-D512-eval")
    only = [word for pattern in patterns for word in ("--only", pattern)]
    assert report.main([*only, "--threads", "2,1", *quick]) == 0
    assert torch.get_num_threads() == threads
    (written,) = tmp_path.glob("*/report.json")
    both = json.loads(written.read_text())["sections"]
    assert [section["threads"] for section in both] == [2, 1]
    names = [[row["name"] for row in section["rows"]] for section in both]
    assert set(names[0]) - set(names[1]) == {"dot-B32-Tq1-Tk50-D512-eval"}  # attention in the first section only
    assert "N=64, V=1000, D=128, bfloat16" in (written.parent / "report.md").read_text().split("## 1 thread")[1]
    assert {path.name for path in written.parent.iterdir()} == {"report.json", "report.md", "speedup.png"}
    padded, loss = both[1]["rows"][-2:]
    assert "rnnkern padded" in padded["ratio"]
    assert "eager" in loss["ratio"]
    assert "torch.compile" not in loss["ratio"]


@pytest.mark.parametrize("text", ["0", "two", "2,", ""])
def test_threads_are_numbers(text: str) -> None:
    with pytest.raises(SystemExit):
        report.main(["--threads", text])
