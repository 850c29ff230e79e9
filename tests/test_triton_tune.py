"""The user's own table of plans: what is read and what is ignored, who goes first, and how it is measured."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

import rnnkern
from rnnkern import triton as kernels
from rnnkern.__main__ import main
from rnnkern.cells import CELLS
from rnnkern.triton import config, table
from rnnkern.triton.config import Facts
from rnnkern.triton.table import Entry, Plan, Table, Work
from tests.helpers import assert_as_accurate, make_layer
from tests.test_recurrence import lengths_like

H100 = Facts("cuda", 132, 232448, "Some GPU")
STEPWISE = Plan("stepwise", 2, 128, 4)
GRID = Plan("grid", 32, 16, 8, 8, 64, True)
WORK = Work("lstm", torch.bfloat16, False, 512, 1, 64, False)
CPU = torch.device("cpu")

_why = kernels.missing_on("cpu")
interpreted = pytest.mark.skipif(bool(_why), reason=_why)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No table but the test's own, and none remembered."""
    monkeypatch.delenv(table.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    table.load.cache_clear()
    yield
    table.load.cache_clear()


def plan(work: Work = WORK, engine: str = "", facts: Facts = H100) -> Plan:
    return config.plan(work.cell, work.dtype, work.H, work.B, work.D, engine, work.tf32, facts, work.backward)


def save(plans: dict[Work, Plan], path: Path | None = None) -> Path:
    path = path or table.default_path("Some GPU")
    table.write(path, "Some GPU", {work: Entry(of, 1.0, None, 2.0) for work, of in plans.items()})
    return path


def ignored() -> str:
    """What is told of a table that does not count; it is told once."""
    with pytest.warns(RuntimeWarning, match="ignores its table of plans") as told:
        assert plan() == plan() == plan(facts=H100._replace(name=""))
    assert len(told) == 1
    return str(told[0].message)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    backward = WORK._replace(backward=True, D=2)
    entries = {WORK: Entry(GRID, 1e-3, 2e-3, 0.5, 0.25), backward: Entry(STEPWISE, 1e-3, None, 0.5, None)}
    path = tmp_path / "deep" / "table.json"
    table.write(path, "Some GPU", entries)
    assert table.read(path, "Some GPU") == entries
    assert len(path.read_text().splitlines()) == 4
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({WORK: GRID}, tmp_path / "table.json")
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save({}, path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_the_next_larger_batch_counts() -> None:
    found = Table({WORK._replace(B=B): STEPWISE._replace(rows=B) for B in (8, 16, 100)})
    batches = {B: of.rows if (of := found.find(WORK._replace(B=B))) else None for B in (3, 4, 8, 9, 16, 17, 50, 101)}
    assert batches == {3: None, 4: 8, 8: 8, 9: 16, 16: 16, 17: None, 50: 100, 101: None}
    assert len(found) == 3


def test_the_table_goes_before_the_rules() -> None:
    by_rule = plan()
    assert by_rule.engine == "grid"
    assert by_rule != GRID
    save({WORK: STEPWISE, WORK._replace(backward=True): GRID})
    table.load.cache_clear()
    assert plan() == plan(WORK._replace(B=40)) == STEPWISE
    assert plan(WORK._replace(backward=True)) == GRID
    # Not for others, nor against the caller's word.
    assert plan(engine="grid") == by_rule
    assert plan(WORK._replace(backward=True), engine="grid") == GRID
    assert plan(WORK._replace(B=31)).engine == plan(WORK._replace(cell="gru")).engine == "grid"
    assert plan(WORK._replace(D=2)) != STEPWISE
    assert plan(facts=H100._replace(name="Another GPU")) == by_rule


def test_tf32_tells_float32_apart_alone() -> None:
    save({WORK: STEPWISE, (exact := WORK._replace(dtype=torch.float32)): STEPWISE})
    assert config.plan("lstm", torch.bfloat16, 512, 64, 1, "", True, H100) == STEPWISE
    assert plan(exact) == STEPWISE
    assert plan(exact._replace(tf32=True)).engine == "grid"


@pytest.mark.parametrize("wrong", [GRID._replace(warps=64), GRID._replace(rows=-1), STEPWISE._replace(engine="quick")])
def test_a_plan_that_nobody_could_have_measured_is_passed_over(wrong: Plan) -> None:
    by_rule = plan()
    save({WORK: wrong})
    table.load.cache_clear()
    assert plan() == by_rule


def altered(change: Callable[[dict], object]) -> str:
    content = json.loads(save({WORK: GRID}).read_text())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        lambda: "",
        lambda: "{",
        lambda: "[]",
        lambda: "[" * 100_000,
        lambda: '{"plans": []}',
        lambda: altered(lambda it: it.pop("plans")),
        lambda: altered(lambda it: it["plans"].append(3)),
        lambda: altered(lambda it: it["plans"][0].pop("B")),
        lambda: altered(lambda it: it["plans"][0].update(B="64")),
        lambda: altered(lambda it: it["plans"][0].update(dtype="int8")),
        lambda: altered(lambda it: it["plans"][0].update(seconds=None)),
        lambda: altered(lambda it: it["plans"][0].pop("cuda_seconds")),
        lambda: altered(lambda it: it["plans"][0]["plan"].update(rows=True)),
        lambda: altered(lambda it: it["plans"][0]["plan"].pop("engine")),
    ],
)
def test_a_broken_table_is_ignored(text: Callable[[], str]) -> None:
    path = save({})
    path.write_text(text())
    assert "it is no table of plans" in ignored()


def test_bytes_that_are_no_text_are_ignored() -> None:
    save({}).write_bytes(b"\xff\xfe\x00")
    assert "it is no table of plans" in ignored()


@pytest.mark.parametrize(
    ("name", "value"), [("device", "Another GPU"), ("triton", "1.0"), ("rnnkern", "0.0.1"), ("format", 1)]
)
def test_a_foreign_table_is_ignored(name: str, value: object) -> None:
    save({}).write_text(altered(lambda it: it.update({name: value})))
    told = ignored()
    assert f"it is for {name} {value}" in told
    assert "python -m rnnkern tune" in told


def test_the_variable_names_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({WORK: GRID})
    monkeypatch.setenv(table.VARIABLE, str(save({WORK: STEPWISE}, tmp_path / "mine.json")))
    assert plan() == STEPWISE
    for value, expected in (("", plan(facts=H100._replace(name=""))), (None, GRID)):
        table.load.cache_clear()
        monkeypatch.delenv(table.VARIABLE) if value is None else monkeypatch.setenv(table.VARIABLE, value)
        assert plan() == expected
    table.load.cache_clear()
    monkeypatch.setenv(table.VARIABLE, str(tmp_path / "not there.json"))
    assert "not there.json" in ignored()


def test_without_a_table_nothing_is_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan().engine == "grid"


@pytest.mark.parametrize(
    "facts", [H100, Facts("hip", 304, 65536), Facts("xpu", 64, 65536)], ids=lambda facts: facts.kind
)
def test_what_is_taken_by_rule_is_measured_too(facts: Facts) -> None:
    for cell in CELLS:
        for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
            for H in (1, 40, 128, 200, 512, 1024, 2048):
                for B, D in ((1, 1), (33, 2), (5000, 1)):
                    work = Work(cell, dtype, tf32, H, D, B, False)
                    found = config.cuts(work, facts)
                    assert plan(work, facts=facts._replace(name="")) in found
                    assert len(set(map(str, found))) == len(found)


@interpreted
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_plan_is_right(cell: str) -> None:
    T, B, H = 2, 5, 20
    resets = torch.rand(T, B) < 0.3
    problem = make_layer(cell, T, B, 6, H, D=2, lengths=lengths_like("zeros", T, B), resets=resets)
    expected, peer = problem.run_reference(), problem.run("eager")
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    forward = Work(cell, torch.float32, tf32, H, 2, B, False)
    seen = set()
    for found in config.cuts(forward, config.facts_of(CPU)):
        with table.using(Table({forward: found, forward._replace(backward=True): found})):
            results: list[dict[str, torch.Tensor]] = []
            (note,) = rnnkern.explain(lambda: results.append(problem.run("triton"))).layers  # noqa: B023
        assert note.engine == f"{found}; backward: {found}"
        assert_as_accurate(results[0], expected, peer, torch.float32)
        seen.add(found.engine)
    assert seen == {"stepwise", "resident", "grid"}


Functions = Mapping[str, Callable[[], object]]


def measure(functions: Functions, favourite: str = "resident, 32 rows x 32 units, 8 warps") -> dict[str, float]:
    """Seconds that say what the test wants, of functions that run."""
    assert all(function() is not None for function in functions.values())
    return {name: 1.0 if name == favourite else 2.0 for name in functions}


def tiny_works(cell: str = "gru") -> list[Work]:
    return [Work(cell, torch.float32, False, 18, 1, 2, backward) for backward in (False, True)]


@interpreted
def test_the_fastest_is_written(tmp_path: Path) -> None:
    from rnnkern.triton import tune

    path, lines = tmp_path / "table.json", []
    kept = WORK._replace(cell="lstm")
    table.write(path, "interpreter", {kept: Entry(GRID, 1.0, None, 1.0)})
    passes = iter(("resident, 32 rows x 32 units, 8 warps", "stepwise, 8 rows x 32 units, 4 warps"))
    added = tune.tune(tiny_works(), 2, CPU, path, lambda functions: measure(functions, next(passes)), lines.append)
    assert added == 2
    entries = table.read(path, "interpreter")
    forward, backward = tiny_works()
    assert set(entries) == {kept, forward, backward}
    assert entries[forward].plan == Plan("resident", 32, 32, 8)
    assert entries[backward].plan == Plan("stepwise", 8, 32, 4)
    assert (entries[forward].seconds, entries[forward].default_seconds) == (1.0, 2.0)
    assert entries[forward].first_call_seconds > 0
    text = "\n".join(lines)
    assert "  * resident, 32 rows x 32 units, 8 warps: 1000.000 ms; first call " in text
    assert "    resident, 16 rows x 32 units, 4 warps (by rule): 2000.000 ms" in text
    assert f"2 plans written to {path}" in text


@interpreted
def test_plans_that_fail_or_differ_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnkern.triton import layer, tune

    path, lines, run = tmp_path / "table.json", [], layer.forward

    def forward(of: layer.Layer, *arguments: object) -> tuple[torch.Tensor, ...]:
        plan = of.plan("", backward=False)
        y, *rest = run(of, *arguments)
        if plan.engine == "resident" and plan.rows == 32:
            raise ValueError("out of registers\nand more")
        return (y + (plan.engine == "grid"), *rest)

    monkeypatch.setattr(layer, "forward", forward)
    assert tune.tune(tiny_works()[:1], 2, CPU, path, measure, lines.append) == 1
    entries = table.read(path, "interpreter")
    assert [entry.plan.engine for entry in entries.values()] == ["stepwise"]
    assert sum(": out of registers; first call" in line for line in lines) == 2
    assert sum(": its results are off by 1, of " in line for line in lines) == 5

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(layer, "forward", fail)
    assert tune.tune(tiny_works("lstm")[:1], 2, CPU, path, measure, lines.append) == 0
    assert table.read(path, "interpreter") == entries


@interpreted
def test_what_is_no_table_is_not_written_over(tmp_path: Path) -> None:
    from rnnkern.triton import tune

    path = tmp_path / "mine.json"
    path.write_text('{"important": 1}')
    with pytest.raises(table.Unusable):
        tune.tune(tiny_works(), 2, CPU, path, measure)
    assert path.read_text() == '{"important": 1}'
    with pytest.raises(OSError, match=r"mine\.json"):
        tune.tune(tiny_works(), 2, CPU, path / "below a file", measure)
    lines: list[str] = []
    assert tune.tune([], 2, CPU, save({WORK: GRID}, path), measure, lines.append) == 0
    assert lines[0] == f"{path}: it is for device Some GPU; what is there is replaced"
    assert table.read(path, "interpreter") == {}


@interpreted
def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["tune", "--cell", "rnn", "--dtype", "float64", "--H", "5", "--B", "2", "--T", "1", "--seconds", "0.01"]
    assert main([*words, "--bidirectional"]) == 0
    path = table.default_path("interpreter")
    assert f"2 plans written to {path}" in capsys.readouterr().out
    entries = table.read(path, "interpreter")
    assert set(entries) == {Work("rnn_tanh", torch.float64, False, 5, 2, 2, backward) for backward in (False, True)}
    assert main(["info"]) == 0
    rows = capsys.readouterr().out
    assert f"2 of {path}" in rows
    assert "(TRITON_CACHE_DIR)" in rows
    elsewhere = tmp_path / "elsewhere.json"
    assert main([*words, "--table", str(elsewhere)]) == 0
    assert f"if {table.VARIABLE}={elsewhere} is set" in capsys.readouterr().out
    elsewhere.write_text("no table")
    assert main([*words, "--table", str(elsewhere)]) == 2
    assert "it is no table of plans" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "interprets", lambda: False)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("python -m rnnkern tune: error: ")
