"""A few cases of each kind that `make fuzz` runs, the same every time; and that a fault would be seen."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rnnkern
from rnnkern.functional import linear_cross_entropy
from rnnkern.ops import _dispatch
from tests.fuzz import cases
from tests.fuzz.__main__ import STRATEGIES, run, watch
from tests.fuzz.cases import AttentionCase, Call, KeywordCase, ModuleCase, Spec
from tests.fuzz.checks import check
from tests.fuzz.loss import LossCase


@pytest.mark.parametrize("name", STRATEGIES)
def test_some_cases(name: str) -> None:
    failure = run(name, number=0, examples=30)
    assert not failure, failure


def on_kernels() -> bool:
    """Whether the call is not the eager reference's, with which it is compared."""
    return _dispatch.forced() is None


def spoiled(function: Callable[..., Any], spoil: Callable[[Any], None]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        spoil((result, args))
        return result

    return wrapped


CASE = ModuleCase("GRU", (3, 4), {}, (Call(Spec((2, 3, 3)), mode="no_grad"),))
KEYWORDS = KeywordCase("GRU", (3, 4), Spec((2, 3, 3)))
ATTENTION = AttentionCase("dot", {"query": Spec((2, 3, 4)), "key": Spec((2, 5, 4), grad=True)}, module=())


@pytest.mark.parametrize(
    ("case", "spoil", "message"),
    [
        (CASE, lambda seen: seen[0][0][1, 2].mul_(2), "output 0: differs"),
        (CASE, lambda seen: seen[0][1].fill_(float("nan")), "output 1: not finite"),
        (KEYWORDS, lambda seen: seen[1][0].add_(1), "wrote past"),
        (ATTENTION, lambda seen: on_kernels() and seen[0][0].data[1, 2].mul_(2), "output 0: differs"),
        (ATTENTION, lambda seen: on_kernels() and seen[0][0].register_hook(lambda g: 2 * g), r"gradient of \['key'\]"),
        (ATTENTION, lambda seen: seen[1][0].add_(1), "wrote past"),
    ],
    ids=["value", "nan", "write", "attention value", "attention gradient", "attention write"],
)
def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch, case: Any, spoil: Any, message: str) -> None:
    module = rnnkern.nn.DotAttention if case is ATTENTION else rnnkern.nn.GRU
    check(case)
    with monkeypatch.context() as patched:
        patched.setattr(module, "forward", spoiled(module.forward, spoil))
        with pytest.raises(AssertionError, match=message):
            check(case)


OPTIONS = {"reduction": "mean", "label_smoothing": 0.1}
LOSS = LossCase(
    {"input": Spec((5, 3), grad=True), "linear_weight": Spec((4, 3))}, Spec((5,), "int64"), "", OPTIONS, rows=2
)


@pytest.mark.parametrize(
    ("change", "spoil", "message"),
    [
        ({}, lambda loss, _: 2 * loss, "the loss: differs"),
        ({}, lambda loss, _: loss.double(), "the loss: torch.float64 and torch.float32"),
        ({}, lambda loss, _: loss.detach(), "requires a gradient: False"),
        ({}, lambda loss, _: loss.detach() + 3 * (loss - loss.detach()), "gradient of input: differs"),
        ({}, lambda loss, given: [given["input"].data.add_(1), loss][1], "wrote past"),
        ({"wrong": "class"}, lambda loss, _: loss, "wrong class: a result"),
        ({"wrong": "class"}, lambda loss, _: [][0], ""),
    ],
    ids=["value", "dtype", "no gradient", "gradient", "write", "no exception", "an exception"],
)
def test_faults_of_the_loss_are_seen(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], spoil: Any, message: str
) -> None:
    check(LOSS)

    def spoiled_loss(**given: Any) -> Any:
        right = {**given, "target": given["target"] % 4} if change else given
        return spoil(linear_cross_entropy(**right), given)

    monkeypatch.setattr("tests.fuzz.loss.linear_cross_entropy", spoiled_loss)
    with pytest.raises(AssertionError, match=message) if message else contextlib.nullcontext():
        check(replace(LOSS, **change))


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


@pytest.mark.parametrize(
    ("begun", "told"),
    [(False, "died with -11 before its first case\n"), (True, "died with -11\nReproduce: python -m tests.fuzz GRU\n")],
    ids=["before a case", "in a case"],
)
def test_a_crash_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: bool, told: str
) -> None:
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\n" + ('eval "printf GRU >\\$$#"\n' if begun else "") + "kill -SEGV $$\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    assert watch(argparse.Namespace(seconds=1, seed=2, only=[])) == 1
    assert capsys.readouterr().out == "seed 2\n" + told
