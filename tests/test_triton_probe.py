"""A Triton that is installed and runs nothing: found out once on each device, told, and done without."""

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnkern
from rnnkern import _library
from rnnkern import triton as kernels
from rnnkern.__main__ import main
from rnnkern.ops import _dispatch, attention, linear_cross_entropy
from rnnkern.triton import probe

GPU = torch.device("cuda", 0)
BROKEN = "Triton does not run on cuda:0: Failed to find C compiler."
_why = kernels.missing_on("cpu")
interpreted = pytest.mark.skipif(bool(_why), reason=_why)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Where the kernel was launched; nothing is known of any device, and all are GPUs of compute capability 9.0."""
    launched: list[torch.device] = []
    monkeypatch.setattr(probe, "_found", {})
    monkeypatch.setattr(probe, "_launch", launched.append)
    monkeypatch.setattr(kernels, "reason", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_library, "_warned", set())
    _dispatch._cached_choice.cache_clear()
    yield launched
    _dispatch._cached_choice.cache_clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("\nFailed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(probe, "_launch", fail)
    monkeypatch.setattr(_library, "missing", {**_library.missing, "cuda": "no nvcc"})


def selected() -> str:
    """What runs a layer of a GPU, without one: nothing is computed."""
    with FakeTensorMode():
        return _dispatch.select("lstm", torch.empty(5, 2, 3, device=GPU), torch.empty(1, 2, 4, device=GPU), False)


def test_a_device_is_tried_once(launches: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device: torch.device) -> None:
        time.sleep(0.05)  # meanwhile all ask
        launches.append(device)

    monkeypatch.setattr(probe, "_launch", launch)
    with ThreadPoolExecutor(8) as pool:
        barrier = threading.Barrier(8)

        def ask(index: int) -> str:
            barrier.wait()
            return probe.refusal(torch.device("cuda", index % 2))

        assert set(pool.map(ask, range(8))) == {""}
    assert sorted(launches, key=str) == [GPU, torch.device("cuda", 1)]


def test_only_what_would_run_is_tried(launches: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "missing", {**_library.missing, "cuda": ""})
    monkeypatch.setattr(_library, "_no_code_on", lambda code, index: "")
    assert selected() == "cuda"
    assert launches == []
    monkeypatch.setattr(_library, "missing", {**_library.missing, "cuda": "no nvcc"})
    _dispatch._cached_choice.cache_clear()
    assert selected() == "triton"
    assert launches == [GPU]


@pytest.mark.usefixtures("broken")
def test_a_failure_is_told_once_and_eager_runs() -> None:
    with pytest.warns(RuntimeWarning, match=f"runs its slow eager reference: {BROKEN}$") as told:
        assert selected() == selected() == "eager"
    assert len(told) == 1
    assert _dispatch._cached_choice("lstm", GPU, torch.float32, 5, 2, 4, False).why == (
        f"no nvcc; {BROKEN}: eager reference"
    )
    assert attention._choose(None, GPU, torch.float32, False) == ("eager", f"no nvcc; {BROKEN}")
    assert linear_cross_entropy.refusal("triton", GPU, torch.float32) == BROKEN


@pytest.mark.usefixtures("broken")
def test_the_loss_tells_of_a_failure_where_the_kernel_would_run() -> None:
    with FakeTensorMode(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        weight = torch.empty(1000, 4, device=GPU)
        assert linear_cross_entropy._choose(torch.empty(2, 4, device=GPU), weight).backend == "eager"
        assert not told
        assert linear_cross_entropy._choose(torch.empty(100_000, 4, device=GPU), weight).backend == "eager"
    assert [str(warning.message) for warning in told] == [f"rnnkern runs its slow eager reference: {BROKEN}"]


@interpreted
def test_forced_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(device: torch.device) -> None:
        raise AssertionError

    gru, x = rnnkern.nn.GRU(3, 4), torch.ones(5, 2, 3)
    why = "Triton does not run on cpu: AssertionError"
    with rnnkern.backend("triton"):
        probe._found.clear()
        monkeypatch.setattr(probe, "_launch", fail)
        with pytest.raises(rnnkern.BackendUnavailable, match=f"'triton' cannot run gru: {why}"):
            gru(x)
        attend = rnnkern.nn.DotAttention()
        with pytest.raises(rnnkern.BackendUnavailable, match=f"'triton' cannot run dot attention: {why}"):
            attend(x, x)
    with pytest.raises(rnnkern.BackendUnavailable, match=f"'triton' cannot run: {why}"), rnnkern.backend("triton"):
        pass
    assert main(["info"]) == 0
    assert f"no: {why}\n" in capsys.readouterr().out
    assert main(["tune", "--H", "5"]) == 2
    assert capsys.readouterr().err.endswith(f"error: {why}\n")


def test_nothing_is_launched_into_a_cuda_graph(launches: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything chosen for good that was not tried."""
    monkeypatch.setattr(_library, "missing", {**_library.missing, "cuda": "no nvcc"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="run the model once before the capture"):
            selected()
    assert launches == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert selected() == "triton"
    assert launches == [GPU]


def test_what_needs_no_launch_is_told_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in probe.refusal(GPU)


@pytest.mark.usefixtures("broken")
def test_what_is_known_counts_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.refusal(GPU) == BROKEN
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert probe.refusal(GPU) == BROKEN


@pytest.mark.parametrize(("capability", "runs"), [((5, 0), False), ((7, 5), False), ((8, 0), True), ((12, 1), True)])
def test_older_gpus_of_nvidia_are_refused(
    capability: tuple[int, int], runs: bool, launches: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is compiled: for such GPUs Triton's compiler may end the process."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has = ".".join(map(str, capability))
    assert probe.refusal(GPU) == ("" if runs else f"Triton's kernels need compute capability 8.0, cuda:0 has {has}")
    assert len(launches) == runs
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert probe.refusal(torch.device("cuda", 1)) == ""


def test_where_triton_never_runs_nothing_is_tried(
    launches: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "on meta" in probe.refusal(torch.device("meta"))
    monkeypatch.setattr(kernels, "reason", "Triton is not installed")
    assert probe.refusal(GPU) == "Triton is not installed"
    assert launches == []


@interpreted
def test_the_kernel_runs_and_is_no_part_of_a_traced_program() -> None:
    """In a process of its own, where nothing is replaced."""
    program = """
import torch, rnnkern
from rnnkern.triton import config, launch, probe
gru, x = rnnkern.nn.GRU(4, 5), torch.ones(3, 2, 4)
with rnnkern.backend("triton"):
    assert probe._found == {x.device: ""}, probe._found
    probe._found.clear()
    traced = torch.compile(gru, fullgraph=True, backend="eager")
    assert torch.equal(traced(x)[0], gru(x)[0])
    assert probe._found == {x.device: ""}, probe._found
with launch.recording(config.facts_of(x.device)) as launches:
    probe._launch(x.device)
assert [of.grid for of in launches] == [(1,)]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
