"""A few cases of each kind that `make fuzz` runs, the same every time; and that a fault would be seen."""

import shlex
from collections.abc import Callable
from typing import Any

import pytest

import rnnkern
from tests.fuzz import cases
from tests.fuzz.__main__ import STRATEGIES, run
from tests.fuzz.cases import Call, KeywordCase, ModuleCase, Spec
from tests.fuzz.checks import check


@pytest.mark.parametrize("name", STRATEGIES)
def test_some_cases(name: str) -> None:
    failure = run(name, number=0, examples=30)
    assert not failure, failure


def spoiled(function: Callable[..., Any], spoil: Callable[[Any], None]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        spoil((result, args))
        return result

    return wrapped


CASE = ModuleCase("GRU", (3, 4), {}, (Call(Spec((2, 3, 3)), mode="no_grad"),))


@pytest.mark.parametrize(
    ("case", "spoil", "message"),
    [
        (CASE, lambda seen: seen[0][0][1, 2].mul_(2), "output 0: differs"),
        (CASE, lambda seen: seen[0][1].fill_(float("nan")), "output 1: not finite"),
        (KeywordCase("GRU", (3, 4), Spec((2, 3, 3))), lambda seen: seen[1][0].add_(1), "wrote past"),
    ],
    ids=["value", "nan", "write"],
)
def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch, case: Any, spoil: Any, message: str) -> None:
    check(case)
    with monkeypatch.context() as patched:
        patched.setattr(rnnkern.nn.GRU, "forward", spoiled(rnnkern.nn.GRU.forward, spoil))
        with pytest.raises(AssertionError, match=message):
            check(case)


def test_other_exceptions_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise KeyError("none")

    monkeypatch.setattr(rnnkern.nn.GRU, "_run", refuse)
    with pytest.raises(AssertionError, match=r"call 0: ours KeyError\('none'\), the other a result: \[\(2, 3, 4\)"):
        check(CASE)
    wrong = ModuleCase("GRU", (3, 4), {}, (Call(Spec((2, 3, 5))),))
    with pytest.raises(AssertionError, match=r"call 0: ours KeyError\('none'\), the other RuntimeError"):
        check(wrong)


def test_a_failure_tells_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: ModuleCase) -> None:
        assert case.kind != "GRU", "no GRU"

    monkeypatch.setattr("tests.fuzz.__main__.check", refuse)
    failure = run("module", number=0, examples=60)
    assert "AssertionError: no GRU" in failure
    command = shlex.split(failure.partition("Reproduce: ")[2])
    assert command[:3] == ["python", "-m", "tests.fuzz"]
    assert eval(command[3], vars(cases)).kind == "GRU"
