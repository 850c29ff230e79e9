"""What the table of plans records of the CUDA backend: how it is measured, and what it changes in the choice."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnkern
from rnnkern import _library
from rnnkern import triton as kernels
from rnnkern.nn._stack import runs_as_one
from rnnkern.ops import _dispatch, _overrides, cuda
from rnnkern.ops._dispatch import EMULATED, Choice
from rnnkern.triton import config, probe, table
from rnnkern.triton.config import Facts
from rnnkern.triton.table import Entry, Plan, Work
from tests.helpers import needs_emulator

H100 = Facts("cuda", 132, 232448, "Some GPU")
GPU = torch.device("cuda", 0)
STEPWISE = Plan("stepwise", 2, 128, 4)
WORK = Work("lstm", torch.bfloat16, False, 512, 1, 64, False)

_why = kernels.missing_on("cpu")
interpreted = pytest.mark.skipif(bool(_why), reason=_why)


def forget() -> None:
    for cached in (table.load, _dispatch._has_records, _dispatch._cached_choice):
        cached.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As if there were an H100 on which both backends run, and no table but the test's own."""
    monkeypatch.delenv(table.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "reason", "")
    monkeypatch.setattr(_library, "missing", {**_library.missing, "cuda": ""})
    monkeypatch.setattr(_library, "_no_code_on", lambda code, index: "")
    monkeypatch.setattr(probe, "_found", {GPU: ""})
    forget()
    with config.pretending(H100):
        yield
    forget()


def record(entries: Mapping[Work, tuple[float, float | None]], plan: Plan = STEPWISE) -> None:
    """Writes a table of the seconds of Triton and of CUDA."""
    found = {work: Entry(plan, seconds, None, 1.0, cuda) for work, (seconds, cuda) in entries.items()}
    table.write(table.default_path("Some GPU"), "Some GPU", found)
    forget()


def selected(work: Work = WORK, T: int = 10, *, training: bool = False, packed: bool = False) -> str:
    """What runs a layer of a GPU, without one: nothing is computed."""
    with FakeTensorMode(), torch.set_grad_enabled(training):
        x = torch.empty(T * work.B, 3, device=GPU) if packed else torch.empty(T, work.B, 3, device=GPU)
        h0 = torch.empty(work.D, work.B, work.H, device=GPU)
        return _dispatch.select(work.cell, x.to(work.dtype), h0, False)


@pytest.mark.usefixtures("gpu")
def test_without_a_table_cuda_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selected() == "cuda"
    record({WORK: (1.0, None)})  # nothing of CUDA
    assert selected() == "cuda"
    # And no call looks further than whether there is something.
    monkeypatch.setattr(_dispatch, "_recorded_seconds", None)
    monkeypatch.setattr(_dispatch, "tf32_allowed", None)
    assert selected() == selected(training=True) == "cuda"


@pytest.mark.usefixtures("gpu")
def test_the_faster_goes_first() -> None:
    assert _dispatch.choose_gpu("lstm", GPU, torch.bfloat16, 10, 64, 512, 1) == Choice("cuda", "")
    record({WORK: (1.0, 2.0)})
    with torch.no_grad():
        found = _dispatch.choose_gpu("lstm", GPU, torch.bfloat16, 10, 64, 512, 1)
        assert found == Choice("triton", "triton took 1e+03 ms, cuda 2e+03 ms by the table of plans")
        assert selected() == selected(packed=True) == selected(WORK._replace(B=32)) == "triton"
        notes: list[Any] = []
        with _overrides.Override("notes", notes):  # as `explain` does
            assert selected() == "triton"
        assert notes[0].why == found.why
    others = [{"B": 31}, {"B": 65}, {"H": 511}, {"D": 2}, {"cell": "gru"}, {"dtype": torch.float16}]
    for change in others:
        assert selected(WORK._replace(**change)) == "cuda"
    assert selected(T=1) == "cuda"
    record({WORK: (2.0, 1.0)})
    assert selected() == "cuda"
    # A plan that nobody could have measured is not what would run.
    record({WORK: (1.0, 2.0)}, STEPWISE._replace(rows=-1))
    assert selected() == "cuda"


@pytest.mark.usefixtures("gpu")
def test_a_segment_runs_where_its_layer_does() -> None:
    """`checkpoint_every` gives the same bits, with gradients enabled or not, a last segment of one step, too."""
    backward = WORK._replace(backward=True)
    for times, expected in (((5.0, 3.0), "cuda"), ((2.0, 3.0), "triton")):
        record({WORK: (1.0, 2.0), backward: times})
        with _overrides.Override("whole", (10, 1)):
            assert {selected(T=T, training=training) for T in (1, 4) for training in (False, True)} == {expected}
        with _overrides.Override("whole", (10, 2)):
            assert selected(T=4) == "cuda"


@pytest.mark.usefixtures("gpu")
def test_both_passes_count_where_gradients_are_enabled() -> None:
    backward = WORK._replace(backward=True)
    record({WORK: (1.0, 2.0)})
    assert selected(training=True) == "cuda"  # nobody knows
    for times, expected in (((5.0, 3.0), "cuda"), ((5.0, 4.5), "triton"), ((5.0, None), "cuda")):
        record({WORK: (1.0, 2.0), backward: times})
        assert selected(training=True) == expected
        assert selected() == "triton"


@pytest.mark.usefixtures("gpu")
def test_tf32_tells_float32_apart_alone() -> None:
    rnn = torch.backends.cudnn.rnn
    before, single = rnn.fp32_precision, WORK._replace(dtype=torch.float32)
    record({WORK: (1.0, 2.0), single._replace(tf32=True): (1.0, 2.0)})
    try:
        for precision, expected in (("tf32", "triton"), ("ieee", "cuda")):
            rnn.fp32_precision = precision
            assert selected(single) == expected
            assert selected() == "triton"
    finally:
        rnn.fp32_precision = before


@pytest.mark.usefixtures("gpu")
def test_what_is_forced_or_traced_does_not_ask_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    record({WORK: (1.0, 2.0)})
    for name in ("cuda", "triton", "eager"):
        with _overrides.Override("forced", name):  # what rnnkern.backend does where there is a GPU
            assert selected() == name
    assert selected() == "triton"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert selected() == "cuda"


@pytest.mark.usefixtures("gpu")
def test_a_triton_that_does_not_run_leaves_it_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    record({WORK: (1.0, 2.0)})
    monkeypatch.setattr(probe, "_found", {GPU: "no C compiler"})
    assert selected() == "cuda"
    # One that is not installed has no plans either: nothing is said of a table of another version.
    monkeypatch.setattr(kernels, "reason", "Triton is not installed")
    table.default_path("Some GPU").write_text("of another version")
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selected() == "cuda"


@pytest.mark.usefixtures("gpu")
def test_layers_run_as_one_where_cuda_would_run_each() -> None:
    with FakeTensorMode(), torch.no_grad():
        x, fewer = (torch.empty(10, B, 512, device=GPU, dtype=torch.bfloat16) for B in (64, 20))
        layers = rnnkern.nn.LSTM(512, 512, 2, device="meta")
        assert runs_as_one(layers, x, 64, False)
        record({WORK: (1.0, 2.0)})
        assert not runs_as_one(layers, x, 64, False)
        assert runs_as_one(layers, fewer, 20, False)
        assert cuda.fuses("lstm", torch.empty(32, 512, device=GPU, dtype=torch.bfloat16), 512)  # a single step


Functions = Mapping[str, Callable[[], object]]
WORKS = [Work("lstm", torch.float32, False, 18, 1, 3, backward) for backward in (False, True)]


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend's operators run on the CPU."""
    _library.load_emulated()
    assert not _library.missing[EMULATED]


def tune(path: Path, cuda_seconds: float, cuda: bool = True) -> tuple[list[Entry], str]:
    """The entries that are written, and what is told, where CUDA takes so long and Triton a second."""
    from rnnkern.triton import tune as tuning

    def measure(functions: Functions) -> dict[str, float]:
        assert all(function() is not None for function in functions.values())
        return {name: cuda_seconds if name == "cuda" else 1.0 for name in functions}

    lines: list[str] = []
    assert tuning.tune(WORKS, 2, torch.device("cpu"), path, measure, lines.append, cuda) == 2
    return list(table.read(path, "interpreter").values()), "\n".join(lines)


@interpreted
@needs_emulator
@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_cuda_is_measured_beside_the_plans(seconds: float, tmp_path: Path) -> None:
    entries, told = tune(tmp_path / "table.json", seconds)
    assert [(entry.seconds, entry.cuda_seconds) for entry in entries] == [(1.0, seconds)] * 2
    assert told.count(f"    cuda: {1e3 * seconds:.3f} ms; first call ") == 2
    entries, told = tune(tmp_path / "table.json", seconds, cuda=False)
    assert [entry.cuda_seconds for entry in entries] == [None, None]
    assert "    cuda: " not in told


@interpreted
@needs_emulator
@pytest.mark.usefixtures("emulated_cuda")
def test_a_cuda_that_fails_or_differs_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnkern.triton import tune as tuning

    runner = tuning.runner

    def wrong(work: Work, T: int, device: torch.device, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        run = runner(work, T, device, backend)
        if backend == "triton":
            return run
        if work.backward:
            raise RuntimeError("no memory\nat all")
        return lambda: tuple(2 * value for value in run())

    monkeypatch.setattr(tuning, "runner", wrong)
    entries, told = tune(tmp_path / "table.json", 0.5)
    assert [(entry.seconds, entry.cuda_seconds) for entry in entries] == [(1.0, None)] * 2
    assert "    cuda: its results are off by " in told
    assert "    cuda: no memory; first call " in told
