"""The command line: `python -m rnnkern info`, `bench` and (more in test_triton_tune.py) `tune`."""

import os
import subprocess
import sys

import pytest
import torch

import rnnkern
from rnnkern import _library
from rnnkern.__main__ import in_unit, main

TINY = ["--T", "3", "--B", "2", "--H", "4", "--seconds", "0.01"]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing the machine takes a second; the floor is tested elsewhere."""
    monkeypatch.setenv("CXX", "no-such-compiler")


def test_module_runs_as_a_program() -> None:
    run = subprocess.run([sys.executable, "-m", "rnnkern", "info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert rnnkern.__version__ in run.stdout


@pytest.mark.skipif(_library.extension is None, reason=f"no compiled kernels: {_library.reason}")
@pytest.mark.parametrize("arguments", [["info"], ["bench", "gru", *TINY]], ids=["info", "bench"])
def test_unknown_instruction_set(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "rnnkern", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RNNKERN_CPU_ISA": "nonsense"})
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("python -m rnnkern: error: RNNKERN_CPU_ISA: instruction set 'nonsense'")
    assert len(run.stderr.splitlines()) == 1


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:] for line in text.splitlines()}
    assert rows["torch"] == torch.__version__
    assert rows["threads"].startswith(str(torch.get_num_threads()))
    assert rows["backend eager"] == "yes"
    assert rows["backend cuda"].startswith("no: ")
    if _library.extension is not None:
        assert rows["backend cpu"] == "yes"
        assert rows["isa"].startswith(_library.extension.get_isa())
        assert all(isa in rows["isa"] for isa in _library.extension.supported_isas())
    else:
        assert _library.reason in rows["backend cpu"]


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize(
    "more", [[], ["--train", "--bidirectional", "--layers", "2", "--I", "3"], ["--dtype", "bfloat16"]]
)
def test_bench(cell: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", cell, *TINY, *more]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{cell} T=3 B=2 I={3 if '--I' in more else 4} H=4")
    assert ("forward and backward" in text) == ("--train" in more)
    assert "times as fast" in text
    assert "\n  first call " in text
    assert "no-such-compiler is not found" in text


@pytest.mark.usefixtures("no_compiler")
def test_bench_forces_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gru", *TINY, "--backend", "eager"]) == 0
    assert "backend eager" in capsys.readouterr().out


@pytest.mark.usefixtures("no_compiler")
def test_bench_sets_threads(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert main(["bench", "gru", *TINY, "--threads", "1"]) == 0
        assert "1 thread(s)" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_bench_prints_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gru", *TINY]) == 0
    floor = capsys.readouterr().out.splitlines()[-1]
    assert "of the floor's speed" in floor or "unknown" in floor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["bench", "lstn"], "invalid choice: 'lstn'"),
        (["bench", "lstm", "--T", "0"], "argument --T: '0' is not a whole number of at least 1"),
        (["bench", "lstm", "--B", "many"], "argument --B: 'many' is not a whole number of at least 1"),
        (["bench", "lstm", "--seconds", "-1"], "argument --seconds: '-1' is not a positive number of seconds"),
        (["bench", "lstm", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["bench", "lstm", "--backend", "cuda"], "invalid choice: 'cuda'"),
        (["tune", "--cell", "lstn"], "invalid choice: 'lstn'"),
        (["tune", "--H", "0"], "argument --H: '0' is not a whole number of at least 1"),
        (["tune", "--device", "nowhere"], "argument --device: "),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.5 s"), (0.1234, "123 ms"), (4.56e-3, "4.56 ms"), (7.89e-6, "7.89 us"), (3e-7, "0.3 us")],
)
def test_in_unit(value: float, text: str) -> None:
    assert in_unit(value) == text
