"""Triton's kernels on a GPU, against the float64 reference and within the promises that torch's users rely on.

`make gpu-report` runs these; without a GPU they are skipped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import _library, ops
from rnnkern import triton as kernels
from rnnkern.__main__ import main
from rnnkern.cells import CELLS
from rnnkern.functional import linear_cross_entropy
from rnnkern.ops._dispatch import TRITON_ENGINES
from rnnkern.triton import config, launch, table
from tests.attention_problem import SCORES, make_problem
from tests.cuda_works import Place, Work, attention_work, move_problem, moved
from tests.helpers import DTYPES, Layer, assert_as_accurate, assert_same_bits, make_layer
from tests.test_cuda_device import WAIT_CYCLES, names, on_cpu, on_device, set_tf32
from tests.test_linear_cross_entropy import REDUCTIONS, make_inputs, results, torch_loss
from tests.test_packed_rows import padded_and_packed

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("no_tf32"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(bool(kernels.missing_on("cuda")), reason=kernels.missing_on("cuda")),
    pytest.mark.skipif(kernels.interprets(), reason="Triton interprets"),
]

LOW_AND_SINGLE = [torch.bfloat16, torch.float16, torch.float32]
PLACE = Place("triton", "cuda")
SIZES = [(1, 1, 1, 1, 1), (7, 3, 10, 17, 2), (5, 33, 16, 64, 2), (12, 9, 20, 100, 1)]  # T, B, I, H, D


@contextmanager
def skip_refused(engine: str | None, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Skips what an engine that was asked for by name may refuse.

    float64; float32 by programs that hold all weights; before Hopper, and on AMD, also what has no room there. Sizes
    here are small: all else has to run.
    """
    try:
        yield
    except rnnkern.BackendUnavailable as refusal:
        allowed = dtype == torch.float64 or (engine == "resident" and dtype == torch.float32)
        if engine in (None, "stepwise") or not (allowed or not hopper()):
            raise
        pytest.skip(str(refusal))


def hopper() -> bool:
    """Or later."""
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)


def run(layer: Layer, engine: str | None) -> dict[str, Tensor]:
    with skip_refused(engine, layer.x.dtype):
        return on_cpu(on_device(layer).run("triton", engine=engine))


every_engine = pytest.mark.parametrize("engine", [None, *TRITON_ENGINES])


@every_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("T", "B", "I", "H", "D"), SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(
    cell: str, T: int, B: int, I: int, H: int, D: int, dtype: torch.dtype, engine: str | None
) -> None:
    layer = make_layer(cell, T, B, I, H, D=D, dtype=dtype, bias=H != 100, seed=T * H)
    assert_as_accurate(run(layer, engine), layer.run_reference(), on_cpu(on_device(layer).run_torch()), dtype)


@every_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell: str, D: int, dtype: torch.dtype, engine: str | None) -> None:
    T, B = 9, 20
    spread = torch.linspace(1, T, B).round().long()[torch.randperm(B)]
    lengths = torch.where(torch.arange(B) % 3 == 1, 0, spread)
    resets = torch.rand(T, B) < 0.3
    layer = make_layer(cell, T, B, 11, 18, D=D, dtype=dtype, lengths=lengths, resets=resets, every_c=True)
    assert_as_accurate(run(layer, engine), layer.run_reference(), layer.run("eager"), dtype)


@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_plan_agrees(cell: str, tf32: bool) -> None:
    """Those that only a table chooses, too; within some ten roundings, which 20 steps may add up to."""
    set_tf32(tf32)
    T, B, H = 20, 40, 64
    layer = make_layer(cell, T, B, 16, H)
    problem, expected = on_device(layer), layer.run_reference()
    work = table.Work(cell, torch.float32, tf32, H, 1, B, False)
    for plan in config.cuts(work, config.facts_of(problem.x.device)):
        with table.using(table.Table({work: plan, work._replace(backward=True): plan})):
            try:
                found = on_cpu(problem.run("triton"))
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # `tune` passes it over
                    raise
                continue
        for name, value in found.items():
            most = max(1.0, float(expected[name].abs().max()))
            assert float((value - expected[name]).abs().max()) <= (2e-2 if tf32 else 1e-4) * most, (plan, name)


@every_engine
def test_results_are_the_same_every_time(engine: str | None) -> None:
    layer = make_layer("lstm", 20, 17, 40, 120, D=2, dtype=torch.bfloat16)
    assert_same_bits(run(layer, engine), run(layer, engine))


@pytest.mark.parametrize("T", [1, 3, 500])
@pytest.mark.parametrize("H", [512, 1024])
def test_a_large_grid_is_right_and_one_launch(H: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs on most multiprocessors, which wait for each other at every step."""
    layer = make_layer("lstm", T, 16, 8, H, dtype=torch.bfloat16)
    facts = config.facts_of(torch.device("cuda", torch.cuda.current_device()))
    try:
        plan = config.plan("lstm", torch.bfloat16, H, 16, 1, "grid", False, facts)
    except RuntimeError as error:
        if hopper():
            raise
        pytest.skip(str(error))
    if not plan.cooperative:
        assert not hopper()
        pytest.skip("this GPU launches no cooperative grids")
    from rnnkern.triton import layer as layers

    launched: list[Any] = []

    def count(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append((kernel.fn.__module__, constants.get("launch_cooperative_grid")))
        launch.launch(kernel, *arguments, **constants)

    monkeypatch.setattr(layers, "launch", count)
    found = run(layer, "grid")
    grids = [cooperative for module, cooperative in launched if module == "rnnkern.triton.grid"]
    assert grids == [True, True]  # forward and backward
    assert_as_accurate(found, layer.run_reference(), on_cpu(on_device(layer).run_torch()), torch.bfloat16)


@pytest.mark.parametrize("engine", TRITON_ENGINES)
def test_a_new_length_or_batch_compiles_nothing(engine: str) -> None:
    def train(T: int, B: int) -> None:
        x = torch.ones(T, B, 8, device="cuda", dtype=torch.float16)
        with rnnkern.backend("triton", engine=engine):
            module(x)[0].sum().backward()
        torch.cuda.synchronize()

    # The second layer's states begin where the batch says, at any multiple of 8 bytes.
    module = rnnkern.nn.LSTM(8, 36, num_layers=2, device="cuda", dtype=torch.float16)
    with skip_refused(engine, torch.float16):
        train(3, 16)
    kept = {kernel: count_compiled(kernel) for kernel in kernels_of(engine)}
    assert all(kept.values())
    for T, B in ((1, 1), (16, 2), (33, 7), (64, 3), (2, 31)):
        train(T, B)
    assert {kernel: count_compiled(kernel) for kernel in kernels_of(engine)} == kept


def kernels_of(engine: str) -> list[Any]:
    from rnnkern.triton import grid, resident, sequence, stepwise

    of = {
        "stepwise": [stepwise.forward_step, stepwise.backward_step],
        "resident": [resident.forward, resident.backward],
        "grid": [grid.forward, grid.backward],
    }
    return [*of[engine], sequence.previous_h]


def count_compiled(kernel: Any) -> int:
    """Variants of a kernel in Triton's memory, on all devices."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def layer_work(engine: str | None, training: bool) -> Work:
    """Two directions with resets, without lengths, whose copy from pageable memory may wait."""
    return work_of(make_layer("lstm", 5, 4, 7, 40, D=2, resets=torch.rand(5, 4) < 0.3, every_c=True), engine, training)


def work_of(layer: Layer, engine: str | None, training: bool) -> Work:
    layer = on_device(layer)
    run = layer.run if training else layer.infer
    return Work(lambda: run("triton", engine=engine), [layer.x, layer.h0])


def loss_work() -> Work:
    """A loss of two chunks, and its gradients."""
    inputs = moved(tuple(make_inputs((12,), 9, 40, torch.float32)), "cuda")

    def run() -> dict[str, Tensor]:
        with rnnkern.backend("triton"):
            return results(linear_cross_entropy, inputs)

    return Work(run, [inputs[0].detach(), inputs[3]])


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses run chunk by chunk, however small."""
    monkeypatch.setattr(ops.linear_cross_entropy, "chunk_rows", lambda *_: 7)


def assert_a_graph_holds(work: Work) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = work.run()
    work.change()
    graph.replay()
    graph.replay()  # from the same initial states: nothing is left over from the first
    assert_same_bits(on_cpu(held), on_cpu(work.run()))


def assert_nothing_waits(work: Work) -> None:
    work.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(WAIT_CYCLES)
        work.run()
        still_busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert still_busy
    torch.cuda.synchronize()


@every_engine
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_layer_is_held_by_a_graph_and_waits_for_nothing(engine: str | None, training: bool) -> None:
    work = layer_work(engine, training)
    with skip_refused(engine):
        work.run()
    assert_a_graph_holds(work)
    assert_nothing_waits(work)


@every_engine
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_graph_keeps_lengths(packed: bool, engine: str | None) -> None:
    work = work_of(padded_and_packed("lstm", [5, 4, 4, 0], D=2)[packed], engine, training=True)
    with skip_refused(engine):
        work.run()
    assert_a_graph_holds(work)


@pytest.mark.usefixtures("chunks")
def test_a_loss_is_held_by_a_graph_and_waits_for_nothing() -> None:
    assert_a_graph_holds(loss_work())
    assert_nothing_waits(loss_work())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("Tq", [1, 5])
@pytest.mark.parametrize("score", ["general", "additive"])
def test_attention_is_held_by_a_graph_and_waits_for_nothing(score: str, Tq: int, training: bool) -> None:
    work = attention_work(PLACE, score, Tq, on_cpu=False, training=training)
    assert_a_graph_holds(work)
    assert_nothing_waits(work)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_graph_keeps_the_lengths_of_attention(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on the CPU, by no kernel of `cuda`."""
    monkeypatch.setitem(_library.missing, "cuda", "left out")
    assert_a_graph_holds(attention_work(PLACE, "general", 5, on_cpu=True, training=training))


@every_engine
def test_the_current_stream_is_used(engine: str | None) -> None:
    """The input comes late, on a stream of its own: a kernel on any other stream would not wait for it."""
    work = layer_work(engine, training=True)
    x = work.inputs[0]
    late = torch.randn_like(x)
    x.copy_(late)
    with skip_refused(engine):
        expected = work.run()
    x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(WAIT_CYCLES)
        x.copy_(late)
        found = work.run()
    side.synchronize()
    assert_same_bits(on_cpu(found), on_cpu(expected))


@pytest.mark.parametrize("dtype", LOW_AND_SINGLE, ids=names)
@pytest.mark.parametrize("Tq", [1, 5, 40])
@pytest.mark.parametrize("score", SCORES)
def test_attention(score: str, Tq: int, dtype: torch.dtype) -> None:
    problem = make_problem(score, 3, Tq, 70, 20, 9, padding="lengths", dtype=dtype)
    found = on_cpu(move_problem(problem, "cuda").run("triton"))
    assert_as_accurate(found, problem.run("plain", torch.float64), problem.run("plain"), dtype)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("V", [1, 17, 4101])
@pytest.mark.parametrize("dtype", LOW_AND_SINGLE, ids=names)
def test_loss(dtype: torch.dtype, V: int, reduction: str, smoothing: float) -> None:
    inputs = make_inputs((6, 5), 9, V, dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    with rnnkern.backend("triton"):
        found = on_cpu(results(linear_cross_entropy, list(moved(tuple(inputs), "cuda")), **options))
    expected, peer = (results(torch_loss, inputs, of, **options) for of in (torch.float64, dtype))
    assert_as_accurate(found, expected, peer, dtype)


def test_forced_it_is_what_explain_tells() -> None:
    module, x = rnnkern.nn.LSTM(8, 16, device="cuda"), torch.ones(3, 2, 8, device="cuda")
    with rnnkern.backend("triton"):
        (note,) = rnnkern.explain(module, x).layers
    assert note.backend == "triton"
    assert note.engine.startswith("resident")
    if _library.missing_on(x.device)["cuda"]:  # then by itself, too
        (note,) = rnnkern.explain(module, x).layers
        assert note.backend == "triton"


def test_tune_measures_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    words = ["tune", "--cell", "gru", "--H", "32", "--B", "4", "--T", "10", "--seconds", "0.05", "--table", str(path)]
    assert main(words) == 0
    entries = table.read(path, config.facts_of(torch.device("cuda", torch.cuda.current_device())).name)
    assert [work.backward for work in entries] == [True, False]
    (backward, forward) = entries.values()
    without_cuda = bool(_library.missing_on(torch.device("cuda"))["cuda"])
    assert [entry.cuda_seconds is None for entry in (forward, backward)] == [without_cuda] * 2
    monkeypatch.setenv(table.VARIABLE, str(path))
    table.load.cache_clear()
    try:
        module = rnnkern.nn.GRU(8, 32, device="cuda", dtype=torch.bfloat16)
        x = torch.ones(3, 4, 8, device="cuda", dtype=torch.bfloat16)
        with rnnkern.backend("triton"), torch.no_grad():
            (note,) = rnnkern.explain(module, x).layers
        assert note.engine == str(forward.plan)
    finally:
        table.load.cache_clear()
