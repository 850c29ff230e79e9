"""The choice of a backend: a pure function, and what users see of it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rnnkern
from rnnkern import _library
from rnnkern.ops._dispatch import Choice, choose
from rnnkern.ops.explain import float32_products
from tests.helpers import needs_kernels

CASE = {"cell": "lstm", "device": "cpu", "dtype": torch.float32, "T": 10, "B": 4, "H": 8}


def test_cpu_kernels_run_what_they_support() -> None:
    assert choose(**CASE) == Choice("cpu", "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "meta"}, "the tensors are on meta, not on the cpu"),
        ({"device": "xpu", "missing": {"triton": "no Triton"}}, "no Triton"),
        ({"device": "cuda", "missing": {"cuda": "no nvcc", "triton": "no Triton"}}, "no nvcc; no Triton"),
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
    if "device" not in change:
        with pytest.raises(rnnkern.BackendUnavailable, match=why):
            choose(**CASE | change, forced="cpu")
    assert choose(**CASE | change, forced="eager").backend == "eager"


def test_a_gpu_runs_the_first_that_can() -> None:
    assert choose(**CASE | {"device": "cuda"}) == Choice("cuda", "")
    assert choose(**CASE | {"device": "cuda", "missing": {"cuda": "no nvcc"}}) == Choice("triton", "no nvcc")
    assert choose(**CASE | {"device": "xpu"}) == Choice("triton", "")
    assert choose(**CASE | {"device": "cuda"}, forced="triton").backend == "triton"


def test_recorded_results_decide_between_gpu_backends() -> None:
    gpu, triton_wins = CASE | {"device": "cuda"}, {"cuda": 1.8e-3, "triton": 1.2e-3}
    why = "triton took 1.2 ms, cuda 1.8 ms by the table of plans"
    assert choose(**gpu, seconds=triton_wins) == Choice("triton", why)
    assert choose(**gpu, seconds={"cuda": 1e-3, "triton": 2.346e-3}) == Choice(
        "cuda", "cuda took 1 ms, triton 2.35 ms by the table of plans"
    )
    assert choose(**gpu, seconds={"triton": 1e-3, "cuda": 1e-3}).backend == "cuda"
    # The faster one goes first; what it cannot run the other may.
    assert choose(**gpu, seconds=triton_wins, missing={"triton": "broken"}) == Choice("cuda", f"{why}; broken")
    assert choose(**gpu, seconds=triton_wins, missing={"cuda": "no nvcc"}) == Choice("triton", why)
    assert choose(**gpu, seconds=triton_wins, transformed=True).backend == "eager"
    for name in ("cuda", "triton", "eager"):
        assert choose(**gpu, seconds=triton_wins, forced=name) == Choice(name, "forced by rnnkern.backend")


def test_forcing_a_backend_that_cannot_run() -> None:
    with (
        pytest.raises(ValueError, match="backend must be one of cpu, cuda, cuda-emulated, eager, triton, got 'mps'"),
        rnnkern.backend("mps"),
    ):
        pass
    for engine, name in (("systolic", "cuda"), ("stepwise", "cpu"), ("cluster", "triton"), ("resident", "cuda")):
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
    from rnnkern.ops import _overrides

    assert _overrides.count == 0


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


def test_explain_tells_of_the_loss() -> None:
    def told(N: int, V: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        x, weight = (torch.ones(rows, 2, dtype=dtype, device=device) for rows in (N, V))
        target = torch.zeros(N, dtype=torch.long, device=device)
        (note,) = rnnkern.explain(rnnkern.functional.linear_cross_entropy, x, weight, target).layers
        return str(note)

    few = "eager (few logits: torch's two functions), all logits at once"
    name = "linear_cross_entropy N={} V=5000 D=2 {} {}: "
    assert told(838, 5000) == name.format(838, "float32", "cpu") + few
    assert told(839, 5000) == name.format(839, "float32", "cpu") + "cpu, 838 rows at a time"
    assert told(256, 5000, torch.bfloat16) == name.format(256, "bfloat16", "cpu") + few
    assert told(257, 5000, torch.bfloat16) == name.format(257, "bfloat16", "cpu") + "cpu, 1677 rows at a time"
    with rnnkern.backend("cpu"):
        assert told(3, 5000).endswith("D=2 float32 cpu: cpu (forced by rnnkern.backend), 838 rows at a time")
    with rnnkern.backend("eager"):
        assert told(839, 5000).endswith("cpu: eager (forced by rnnkern.backend), all logits at once")
    # No backend runs on this device.
    assert ": eager reference), all logits at once" in told(839, 5000, device="meta")


def test_explain_a_model_without_recurrence() -> None:
    assert "no recurrent layer, attention or linear_cross_entropy of rnnkern ran" in str(
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


BUILT = ("sm_80", "sm_90a", "sm_100", "compute_100")


@pytest.mark.parametrize(
    ("code", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_100a", [(10, 0)], [(10, 3)]),
        ("sm_100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("compute_80", [(8, 0), (8, 9), (9, 0), (12, 1)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100", [(10, 0), (10, 3), (11, 0), (12, 0), (12, 1)], [(9, 0)]),
        ("compute_120f", [(12, 0), (12, 1)], [(10, 0), (13, 0)]),
    ],
)
def test_which_gpus_run_compiled_code(code: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert all(_library.runs_on(code, capability) for capability in runs)
    assert not any(_library.runs_on(code, capability) for capability in does_not)


def test_gpus_that_a_build_does_not_serve() -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)):
        assert _library.unsupported(BUILT, "cuda:0", capability) == ""
    why = _library.unsupported(BUILT, "cuda:0", (7, 5))
    assert why == "the CUDA kernels need compute capability 8.0, cuda:0 has compute capability 7.5"
    for capability in ((8, 0), (10, 0), (12, 0)):
        why = _library.unsupported(("sm_90a", "compute_90a"), "cuda:1", capability)
        assert why.startswith("the CUDA kernels were compiled for sm_90a, compute_90a, cuda:1 has compute capability ")
        assert why.endswith(f"-DRNNKERN_CUDA_ARCHITECTURES={capability[0]}{capability[1]})")
    with pytest.raises(ValueError, match="got 'gfx90a'"):
        _library.runs_on("gfx90a", (9, 0))


def test_a_gpu_without_code_falls_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "missing", {**_library.missing, "cuda": ""})
    monkeypatch.setattr(_library, "cuda_code", ("sm_90a", "compute_90a"))
    monkeypatch.setattr(rnnkern.triton, "reason", "no Triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    _library._no_code_on_gpu.cache_clear()
    missing = _library.missing_on(torch.device("cuda", 0))
    chosen = choose(**CASE | {"device": "cuda"}, missing=missing)
    assert chosen.backend == "eager"
    assert "compiled for sm_90a, compute_90a, cuda:0 has compute capability 12.0" in chosen.why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _library._no_code_on_gpu.cache_clear()
    assert choose(**CASE | {"device": "cuda"}, missing=_library.missing_on(torch.device("cuda", 0))).backend == "cuda"
    _library._no_code_on_gpu.cache_clear()


def test_a_gpu_is_asked_once_and_never_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, graphs = [], []

    def capability(device: int) -> tuple[int, int]:
        asked.append(device)
        return 9, 0

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append([node.op for node in graph.graph.nodes])
        return graph.forward

    monkeypatch.setattr(_library, "missing", {**_library.missing, "cuda": ""})
    monkeypatch.setattr(_library, "cuda_code", ("sm_90a",))
    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=capability)
    monkeypatch.setattr(_library, "torch", SimpleNamespace(cuda=cuda))  # Dynamo itself goes on to find no GPU
    _library._no_code_on_gpu.cache_clear()
    device = torch.device("cuda", 1)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x if _library.missing_on(device)["cuda"] else x + x

    compiled = torch.compile(doubled, backend=keep, fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    for _ in range(3):
        assert not _library.missing_on(device)["cuda"]
    _library._no_code_on_gpu.cache_clear()
    assert asked == [1]
    assert graphs == [["placeholder", "call_function", "output"]]


@needs_kernels
def test_the_operators_are_those_of_the_library() -> None:
    """But for those that are defined in Python: of Triton, and the loss over a vocabulary."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rnnkern::")}
    compiled = {name for name in names if "::triton_" not in name and "linear_cross_entropy" not in name}
    assert compiled == {f"rnnkern::{name}" for name in _library.OPERATORS}


@needs_kernels
@pytest.mark.parametrize(
    ("patch", "lacking"),
    [
        ("_library.OPERATORS += ('of_tomorrow',)", "the operator of_tomorrow"),
        ("_library._BUILD_FACTS += ('tomorrow',)", "the build fact tomorrow"),
    ],
    ids=["operator", "build fact"],
)
def test_a_stale_library_is_not_used(patch: str, lacking: str, tmp_path: Path) -> None:
    """As if these sources had something that the library was built without: eager runs, with the usual warning."""
    package = tmp_path / "rnnkern"
    shutil.copytree(Path(rnnkern.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "_library.py"
    before, after = path.read_text().split("def _lacking(", 1)
    path.write_text(f"{before}{patch.replace('_library.', '')}\n\n\ndef _lacking({after}")
    code = "import torch, rnnkern; print(rnnkern._library.reason); rnnkern.nn.LSTM(3, 4)(torch.ones(2, 1, 3)); "
    code += "print({**rnnkern._library.missing})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}
    )
    assert run.returncode == 0, run.stderr
    why = f"librnnkern.so is of another version, without {lacking} (run `make build` or `pip install .`)"
    assert run.stdout.splitlines()[0] == why
    assert f"RuntimeWarning: rnnkern runs its slow eager reference: {why}" in run.stderr


def test_products_of_float32_are_told() -> None:
    assert float32_products("stepwise", "tf32", "none") == "products: float32 (torch.backends.cuda.matmul)"
    assert float32_products("stepwise; backward: stepwise", "ieee", "tf32").startswith("products: TF32 (")
    told = float32_products("cluster, 1 groups of 4 blocks; backward: stepwise", "tf32", "ieee")
    assert "cluster and grid: TF32 (torch.backends.cudnn.rnn), other products: float32 (" in told
    assert "three TF32 (torch.backends.cudnn.rnn), other products: TF32 (" in float32_products("grid", "ieee", "tf32")
