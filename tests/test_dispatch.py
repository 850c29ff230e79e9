"""The choice of a backend: a pure function, and what users see of it."""

import subprocess
import sys
import threading

import pytest
import torch

import rnnkern
from rnnkern.ops._dispatch import Choice, choose
from tests.helpers import needs_kernels

CASE = {"cell": "lstm", "device": "cpu", "dtype": torch.float32, "T": 10, "B": 4, "H": 8}


def test_cpu_kernels_run_what_they_support() -> None:
    assert choose(**CASE) == Choice("cpu", "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "meta"}, "the tensors are on meta, not on the cpu"),
        ({"device": "xpu"}, "the tensors are on xpu, not on the cpu"),
        ({"device": "cuda", "missing": {"cuda": "no nvcc"}}, "no nvcc"),
        ({"projection": True}, "proj_size is not supported by cpu kernels"),
        ({"dtype": torch.complex64}, "torch.complex64 is not supported by cpu kernels"),
        ({"transformed": True}, "torch.func transforms and forward-mode derivatives are not supported by cpu kernels"),
        ({"cell": "toy"}, "cell 'toy' is not supported by cpu kernels"),
        ({"missing": {"cpu": "not built"}}, "not built"),
        ({"H": 0}, "a hidden size of zero is not supported by cpu kernels"),
    ],
)
def test_the_rest_falls_to_the_reference(change: dict[str, object], why: str) -> None:
    assert choose(**CASE | change) == Choice("eager", f"{why}: eager reference")
    if change.get("device") != "cuda":
        with pytest.raises(rnnkern.BackendUnavailable, match=why):
            choose(**CASE | change, forced="cpu")
    assert choose(**CASE | change, forced="eager").backend == "eager"


def test_forcing_a_backend_that_cannot_run() -> None:
    with (
        pytest.raises(ValueError, match="backend must be one of cpu, cuda, cuda-emulated, eager, triton, got 'mps'"),
        rnnkern.backend("mps"),
    ):
        pass
    with pytest.raises(rnnkern.BackendUnavailable, match="triton kernels are not part"), rnnkern.backend("triton"):
        pass
    for engine, name in (("systolic", "cuda"), ("stepwise", "cpu")):
        with pytest.raises(ValueError, match="engine must be one of"), rnnkern.backend(name, engine=engine):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_forcing_cuda_without_a_gpu() -> None:
    with pytest.raises(rnnkern.BackendUnavailable, match="'cuda' cannot run: "), rnnkern.backend("cuda"):
        pass


@needs_kernels
def test_forcing_the_kernels_where_they_do_not_run() -> None:
    with rnnkern.backend("cpu"), pytest.raises(rnnkern.BackendUnavailable, match="proj_size is not supported"):
        rnnkern.nn.LSTM(3, 4, proj_size=2)(torch.randn(5, 2, 3))


@needs_kernels
def test_the_forced_backend_runs_in_this_thread_only() -> None:
    gru, x = rnnkern.nn.GRU(3, 4), torch.randn(5, 2, 3)
    seen = []

    def look() -> None:
        seen.append(rnnkern.explain(gru, x).layers[0].backend)

    with rnnkern.backend("eager"):
        look()
        other = threading.Thread(target=look)
        other.start()
        other.join()
        with rnnkern.backend("cpu"):
            look()
        look()
    look()
    assert seen == ["eager", "cpu", "cpu", "eager", "cpu"]


def test_a_failure_inside_the_block_ends_the_override() -> None:
    with pytest.raises(KeyError), rnnkern.backend("eager"):
        raise KeyError
    from rnnkern.ops import _dispatch

    assert _dispatch._overrides == 0


def test_explain_tells_each_layer() -> None:
    lstm = rnnkern.nn.LSTM(3, 8, num_layers=2, proj_size=2, bidirectional=True)
    told = rnnkern.explain(torch.nn.Sequential(lstm), torch.randn(5, 2, 3))
    assert [note.backend for note in told.layers] == ["eager", "eager"]
    assert [note.I for note in told.layers] == [3, 4]
    text = str(told)
    assert "proj_size is not supported by cpu kernels: eager reference" in text
    assert f"threads: {torch.get_num_threads()}" in text


@needs_kernels
def test_explain_names_the_instruction_set(isa: str) -> None:
    told = rnnkern.explain(rnnkern.nn.GRUCell(3, 4), torch.randn(2, 3))
    assert told.isa == isa
    assert f"isa {isa}" in str(told)
    assert str(told).startswith("0: gru T=1 B=2 I=3 H=4 D=1 float32 cpu: cpu\n")


def test_explain_leaves_the_random_state() -> None:
    gru = rnnkern.nn.GRU(3, 4, num_layers=2, dropout=0.5)
    torch.manual_seed(3)
    rnnkern.explain(gru, torch.ones(5, 2, 3))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


@needs_kernels
def test_explain_tells_of_attention() -> None:
    model = rnnkern.nn.AdditiveAttention(4, 5, 3)
    query, key = torch.randn(2, 6, 4), torch.randn(2, 7, 5)
    told = rnnkern.explain(model, query, key)
    assert str(told.layers[0]) == "additive attention B=2 Tq=6 Tk=7 D=3 Dv=5 float32 cpu: cpu"
    with rnnkern.backend("eager"):
        told = rnnkern.explain(model, query, key)
    assert told.layers[0].backend == "eager"
    assert told.layers[0].why == "forced by rnnkern.backend"
    told = rnnkern.explain(rnnkern.nn.DotAttention().to("meta"), query.to("meta"), query.to("meta"))
    assert "the tensors are on meta, not on the cpu: eager reference" in str(told)


def test_explain_a_model_without_recurrence() -> None:
    assert "no recurrent layer or attention of rnnkern ran" in str(
        rnnkern.explain(torch.nn.Linear(2, 2), torch.ones(1, 2))
    )


def test_explain_calls_what_can_be_called() -> None:
    with pytest.raises(TypeError, match="module must be a module or a function to be called, got NoneType"):
        rnnkern.explain(None)


def test_missing_kernels_are_said_once() -> None:
    """In a process of its own, where the library cannot be found."""
    program = """
import pathlib, warnings
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: self.name != "librnnkern.so" and exists(self)
import torch, rnnkern
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        rnnkern.nn.GRU(3, 4)(torch.ones(5, 2, 3)).__len__()
        rnnkern.nn.LSTMCell(3, 4)(torch.ones(2, 3))
print(len(caught), caught[0].category.__name__, caught[0].message)
print(rnnkern.explain(rnnkern.nn.GRU(3, 4), torch.ones(5, 2, 3)))
try:
    with rnnkern.backend("cpu"):
        pass
except rnnkern.BackendUnavailable as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rnnkern.enable()
print(*[f"{w.category.__name__} {w.message}" for w in caught])
print(rnnkern.explain(torch.nn.GRU(3, 4), torch.ones(5, 2, 3)))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.startswith("1 RuntimeWarning rnnkern runs its slow eager reference: librnnkern.so is not built")
    assert "float32 cpu: eager (librnnkern.so is not built" in told
    assert "backend 'cpu' cannot run: librnnkern.so is not built" in told
    assert "\nRuntimeWarning rnnkern.enable() changes nothing: librnnkern.so is not built" in told
    assert "float32 cpu: torch (librnnkern.so is not built" in told
