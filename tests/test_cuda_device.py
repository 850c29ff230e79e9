"""The CUDA kernels on a GPU, against the float64 reference and within the promises that torch's users rely on.

`make gpu-report` runs these; without a GPU they are skipped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import _library
from rnnkern.cells import CELLS
from rnnkern.ops._dispatch import ENGINES
from tests.cuda_works import move_layer
from tests.helpers import DTYPES, TORCH_MODULES, Layer, assert_as_accurate, assert_same_bits, error, make_layer
from tests.test_cuda_stack import Stack, make_stack, with_exact_products

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("no_tf32"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(bool(_library.missing["cuda"]), reason=f"no CUDA kernels: {_library.missing['cuda']}"),
]

ENGINE_NAMES = ("automatic", *ENGINES)
SIZES = [(1, 1, 1, 1, 1), (7, 3, 10, 17, 2), (5, 9, 16, 128, 2), (12, 33, 20, 100, 1)]  # T, B, I, H, D
WAIT_CYCLES = 500_000_000  # a quarter of a second


def names(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def set_tf32(allowed: bool) -> None:
    precision = "tf32" if allowed else "ieee"
    torch.backends.cudnn.rnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = precision


def on_device(layer: Layer, device: str = "cuda") -> Layer:
    return move_layer(layer, device)


def stack_on_device(stack: Stack) -> Stack:
    return replace(
        stack,
        inputs={name: value.cuda() for name, value in stack.inputs.items()},
        cotangents=tuple(value.cuda() for value in stack.cotangents),
        resets=None if stack.resets is None else stack.resets.cuda(),
    )


def on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}


@contextmanager
def skip_refused(engine: str, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Skips what an engine that was asked for by name may refuse: float64, and what has no room before Hopper.

    Sizes here are small: from Hopper on every engine has to run them.
    """
    try:
        yield
    except rnnkern.BackendUnavailable as refusal:
        if engine in ("automatic", "stepwise") or (
            dtype != torch.float64 and torch.cuda.get_device_capability() >= (9, 0)
        ):
            raise
        pytest.skip(str(refusal))


def forced(engine: str) -> dict[str, Any]:
    return {"engine": None if engine == "automatic" else engine}


def run(layer: Layer, engine: str, device: str = "cuda") -> dict[str, Tensor]:
    """Outputs and gradients by an engine, on the CPU."""
    moved = on_device(layer, device)
    with skip_refused(engine, layer.x.dtype):
        return on_cpu(moved.run("cuda", **forced(engine)))
    raise AssertionError


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("T", "B", "I", "H", "D"), SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(
    cell: str, T: int, B: int, I: int, H: int, D: int, dtype: torch.dtype, engine: str
) -> None:
    layer = make_layer(cell, T, B, I, H, D=D, dtype=dtype, bias=H != 100, seed=T * H)
    assert_as_accurate(run(layer, engine), layer.run_reference(), on_cpu(on_device(layer).run_torch()), dtype)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("lengths", ["none", "spread", "zeros"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell: str, D: int, lengths: str, resets: bool, dtype: torch.dtype, engine: str) -> None:
    T, B = 9, 10
    spread = torch.linspace(1, T, B).round().long()[torch.randperm(B)]
    layer = make_layer(
        cell,
        T,
        B,
        11,
        18,
        D=D,
        dtype=dtype,
        lengths={"none": None, "spread": spread, "zeros": torch.where(torch.arange(B) % 3 == 1, 0, spread)}[lengths],
        resets=torch.rand(T, B) < 0.3 if resets else None,
        every_c=True,
    )
    assert_as_accurate(run(layer, engine), layer.run_reference(), layer.run("eager"), dtype)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_is_as_accurate_as_cudnns(cell: str, engine: str) -> None:
    set_tf32(True)
    layer = make_layer(cell, 6, 8, 32, 64, D=2)
    found, expected, peer = run(layer, engine), layer.run_reference(), on_cpu(on_device(layer).run_torch())
    for name, value in found.items():
        if name in peer:  # a tenth of a percent: 13 bits less than float32 has
            allowed = 1.5 * error(peer[name], expected[name]) + 1e-3 * max(1.0, float(expected[name].abs().max()))
            assert error(value, expected[name]) <= allowed, name


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_the_same_every_time(cell: str, engine: str) -> None:
    layer = make_layer(cell, 20, 17, 40, 136, D=2, dtype=torch.bfloat16)
    assert_same_bits(run(layer, engine), run(layer, engine))


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("cell", TORCH_MODULES)
def test_packed_modules(cell: str, engine: str) -> None:
    options = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    theirs = getattr(torch.nn, TORCH_MODULES[cell])(12, 40, num_layers=2, bidirectional=True, device="cuda", **options)
    ours = getattr(rnnkern.nn, TORCH_MODULES[cell])(12, 40, num_layers=2, bidirectional=True, device="cuda", **options)
    ours.load_state_dict(theirs.state_dict())
    lengths = torch.tensor([3, 9, 1, 7])
    x = torch.randn(9, 4, 12, device="cuda")
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    with skip_refused(engine), rnnkern.backend("cuda", **forced(engine)):
        found = ours(packed)[0].data
    torch.testing.assert_close(found, theirs(packed)[0].data, rtol=1e-4, atol=1e-5)


def forward(engine: str) -> tuple[Any, Tensor]:
    """A function that runs a layer without gradients, and its input."""
    layer = on_device(make_layer("lstm", 6, 5, 12, 64, D=2))

    def infer() -> dict[str, Tensor]:
        return layer.infer("cuda", **forced(engine))

    with skip_refused(engine):
        infer()
    return infer, layer.x


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_cuda_graph_holds_it(engine: str) -> None:
    infer, x = forward(engine)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        infer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = infer()
    x.copy_(torch.randn_like(x))
    graph.replay()
    graph.replay()  # from the same initial states: nothing is left over from the first
    assert_same_bits(held, infer())


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_the_current_stream_is_used(engine: str) -> None:
    """The input comes late, on a stream of its own: a kernel on any other stream would not wait for it."""
    infer, x = forward(engine)
    late = torch.randn_like(x)
    x.copy_(late)
    expected = infer()
    x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(WAIT_CYCLES)
        x.copy_(late)
        found = infer()
    side.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_waits_for_the_gpu(engine: str, training: bool) -> None:
    infer, _ = forward(engine)
    layer = on_device(make_layer("gru", 6, 5, 12, 64, D=2))
    work = (lambda: layer.run("cuda", **forced(engine))) if training else infer
    with skip_refused(engine):
        work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(WAIT_CYCLES)
        work()
        still_busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert still_busy
    torch.cuda.synchronize()


def wavefront(engine: str, training: bool) -> tuple[Callable[[], dict[str, Tensor]], Tensor]:
    """A function that runs three layers side by side on chunks of time, and their input."""
    stack = stack_on_device(make_stack("lstm", 9, 5, 12, 64, 3))

    def work() -> dict[str, Tensor]:
        return (stack.wavefront if training else stack.infer)(4, backend="cuda", **forced(engine))

    with skip_refused(engine):
        work()
    return work, stack.inputs["x"]


@pytest.mark.parametrize("engine", ["cluster", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 0, 11, 7, 1])], ids=["", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_layers_side_by_side_give_the_bits_of_one_after_another(
    cell: str, lengths: Tensor | None, dtype: torch.dtype, engine: str
) -> None:
    resets = torch.rand(11, 5) < 0.2
    stack = stack_on_device(with_exact_products(make_stack(cell, 11, 5, 12, 64, 3, dtype=dtype, resets=resets)))
    stack = replace(stack, lengths=lengths)
    with skip_refused(engine, dtype):
        expected = stack.run(stack.by_layers, "cuda", engine)
        for chunks in (2, 5):
            for _ in range(3):
                assert_same_bits(stack.wavefront(chunks, engine, "cuda"), expected)


@pytest.mark.parametrize("engine", ["cluster", "grid"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_cuda_graph_holds_layers_side_by_side(training: bool, engine: str) -> None:
    work, x = wavefront(engine, training)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = work()
    x.copy_(torch.randn_like(x))
    graph.replay()
    graph.replay()
    assert_same_bits(held, work())


@pytest.mark.parametrize("engine", ["cluster", "grid"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layers_side_by_side_wait_for_the_current_stream_alone(training: bool, engine: str) -> None:
    """The input comes late, on a stream of its own; and nobody waits on the CPU."""
    work, x = wavefront(engine, training)
    late = torch.randn_like(x)
    x.copy_(late)
    expected = work()
    x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()  # makes the streams beside this one
        torch.cuda.synchronize()
        torch.cuda._sleep(WAIT_CYCLES)
        x.copy_(late)
        found = work()
        still_busy = not side.query()
    assert still_busy
    side.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_the_tensors_device_is_used(engine: str) -> None:
    layer = make_layer("lstm", 6, 5, 12, 64, D=2)
    assert torch.cuda.current_device() == 0
    assert_same_bits(run(layer, engine, "cuda:1"), run(layer, engine, "cuda:0"))
    assert torch.cuda.current_device() == 0


def test_it_is_chosen_by_itself() -> None:
    module = rnnkern.nn.LSTM(8, 16, device="cuda")
    (note,) = rnnkern.explain(module, torch.ones(3, 2, 8, device="cuda")).layers
    assert note.backend == "cuda"
    y, _ = module(torch.ones(3, 2, 8, device="cuda"))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
