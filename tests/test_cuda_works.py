"""Attention, fused steps, decoding, lengths and training on a GPU: against float64, in CUDA graphs, without waits.

Numbers are tested on the emulator, too. A graph is there a second call that writes over the results of the first, which
tests the test. Waits and streams are a GPU's alone: of these tests a few run emulated, and show only that they can run.
`make gpu-report` runs all on a GPU; test_cuda_device.py has more of layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import _library
from rnnkern.cells import CELLS
from rnnkern.functional import attention
from rnnkern.ops.cuda import FUSED_DTYPES
from rnnkern.seq2seq import greedy_search
from tests.attention_problem import SCORES, make_problem
from tests.cuda_works import WORKS, Place, Work, move_layer, move_problem, moved
from tests.helpers import assert_as_accurate, make_layer, needs_emulator
from tests.seq2seq_models import ATTENTIONS, END, LETTERS, START, make_model
from tests.test_cuda_device import WAIT_CYCLES, names, on_cpu
from tests.test_cuda_step import SCORES as STEP_SCORES
from tests.test_cuda_step import attended, one_step
from tests.test_seq2seq_steps import make_decoder, make_inputs

pytestmark = pytest.mark.usefixtures("no_tf32")
GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(bool(_library.missing["cuda"]), reason=f"no CUDA kernels: {_library.missing['cuda']}"),
]
PLACES = [
    pytest.param(Place("cuda-emulated", "cpu"), marks=needs_emulator, id="emulated"),
    pytest.param(Place("cuda", "cuda"), marks=GPU, id="cuda"),
]
everywhere = pytest.mark.parametrize("place", PLACES)
every_work = pytest.mark.parametrize("work", WORKS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
EMULATED_WORKS = ("cell", "packed, training")  # of the tests that can fail for what they claim on a GPU only
on_a_gpu = pytest.mark.parametrize(
    ("place", "work"),
    [
        pytest.param(
            *place.values, work, marks=place.marks, id=f"{place.id}-{work.replace(', ', '-').replace(' ', '_')}"
        )
        for place in PLACES
        for work in (EMULATED_WORKS if place.id == "emulated" else WORKS)
    ],
)


def make_work(name: str, place: Place) -> Work:
    """The work, done once: what refuses an engine before Hopper is skipped."""
    work = WORKS[name](place)
    try:
        work.run()
    except rnnkern.BackendUnavailable as refusal:
        if "automatic" in name or place.device == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
            raise
        pytest.skip(str(refusal))
    return work


class Held:
    """A call in a CUDA graph; emulated, one that writes over its results when it is replayed."""

    def __init__(self, run: Callable[[], dict[str, Tensor]], place: Place) -> None:
        self.run, self.graph = run, None
        if place.device == "cpu":
            self.results = {name: result.clone() for name, result in run().items()}
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = run()
        self.replay()  # capture alone runs nothing

    def replay(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for name, result in self.run().items():
            self.results[name].copy_(result)


@every_work
@everywhere
def test_a_cuda_graph_holds_it(place: Place, work: str) -> None:
    made = make_work(work, place)
    held = Held(made.run, place)
    first = {name: result.clone() for name, result in held.results.items()}
    made.change()
    held.replay()
    held.replay()  # nothing is left over from the replay before
    expected = made.run()
    torch.testing.assert_close(held.results, expected)
    assert any(not torch.equal(result, expected[name]) for name, result in first.items()), "the inputs should matter"


@everywhere
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_graph_decodes_step_after_step(place: Place, cell: str) -> None:
    """Each replay goes on from the symbols and the state that the last one left."""
    decoder = make_decoder(cell, layers=2).to(place.device)
    tokens, state, values, lengths = make_inputs(decoder)
    tokens, values = tokens.to(place.device), values.to(place.device)
    states = moved(state if cell == "lstm" else (state,), place.device)
    begin = [tensor.clone() for tensor in (tokens, *states)]
    with torch.no_grad(), rnnkern.backend(place.backend):
        memory = decoder.prepare(values, lengths)

    def run() -> dict[str, Tensor]:
        with torch.no_grad(), rnnkern.backend(place.backend):
            logits, after, _ = decoder.step(tokens, states if cell == "lstm" else states[0], memory)
            for to, result in zip((tokens, *states), (logits.argmax(1), *(after if cell == "lstm" else (after,)))):
                to.copy_(result)
        return {"logits": logits}

    def begin_again() -> None:
        for tensor, value in zip((tokens, *states), begin, strict=True):
            tensor.copy_(value)

    held = Held(run, place)
    begin_again()
    found = []
    for _ in range(6):
        held.replay()
        found.append((held.results["logits"].clone(), tokens.clone()))
    begin_again()
    for logits, symbols in found:
        torch.testing.assert_close(logits, run()["logits"])
        assert torch.equal(symbols, tokens)


@contextmanager
def no_waits(place: Place) -> Iterator[None]:
    """Raises if anything inside waits for the GPU, which is busy meanwhile; emulated, it tests nothing."""
    if place.device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(WAIT_CYCLES)
        yield
        still_busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert still_busy
    torch.cuda.synchronize()


@on_a_gpu
def test_nothing_waits_for_the_gpu(place: Place, work: str) -> None:
    made = make_work(work, place)
    with no_waits(place):
        made.run()


@pytest.mark.parametrize("place", PLACES[1:])
def test_preparing_to_decode_waits_for_nothing(place: Place) -> None:
    decoder = make_decoder("gru").to(place.device)
    _, _, values, lengths = make_inputs(decoder)
    values = values.to(place.device)
    with torch.no_grad(), rnnkern.backend(place.backend):
        decoder.prepare(values, lengths)
        with no_waits(place):
            decoder.prepare(values, lengths)


@on_a_gpu
def test_the_current_stream_is_used(place: Place, work: str) -> None:
    """Inputs come late, on a stream of their own: a kernel on any other stream would not wait for them."""
    made = make_work(work, place)
    made.change()
    late = [tensor.clone() for tensor in made.inputs]
    expected = made.run()
    made.change()
    if place.device == "cpu":
        found = with_inputs(made, late)
    else:
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(WAIT_CYCLES)
            found = with_inputs(made, late)
        side.synchronize()
    torch.testing.assert_close(found, expected)


def with_inputs(work: Work, inputs: list[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for tensor, value in zip(work.inputs, inputs, strict=True):
            tensor.copy_(value)
    return work.run()


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=names)
@pytest.mark.parametrize("padding", ["none", "lengths", "lengths on the device", "mask"])
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 70), (7, 50)])
@pytest.mark.parametrize("score", SCORES)
@everywhere
def test_attention(place: Place, score: str, Tq: int, Tk: int, padding: str, dtype: torch.dtype) -> None:
    problem = make_problem(score, 3, Tq, Tk, 20, 9, padding=padding.partition(" ")[0], dtype=dtype)
    expected, peer = problem.run("plain", torch.float64), problem.run("plain")
    device = "cpu" if padding == "lengths" else place.device
    found = move_problem(problem, place.device, device).run(place.backend)
    assert_as_accurate(on_cpu(found), expected, peer, dtype)


@everywhere
def test_lengths_that_nobody_can_see_are_taken_as_the_nearest(place: Place) -> None:
    query, key = (torch.randn(2, T, 8, device=place.device) for T in (3, 50))
    wrong, right = (torch.tensor(lengths, device=place.device) for lengths in ([-3, 55], [0, 50]))
    with rnnkern.backend(place.backend):
        if place.device == "cpu":
            with pytest.raises(RuntimeError, match=r"lengths: expected values in 0..50"):
                attention(query, key, score="dot", lengths=wrong)
            return
        found, expected = (attention(query, key, score="dot", lengths=lengths)[0] for lengths in (wrong, right))
    assert torch.equal(found, expected)


@everywhere
def test_lengths_of_layers_on_the_device(place: Place) -> None:
    """They are copied, which waits; while a graph is captured they are refused."""
    gru, x = rnnkern.nn.GRU(5, 8, device=place.device), torch.randn(6, 3, 5, device=place.device)
    lengths = torch.tensor([6, 0, 2])
    with torch.no_grad(), rnnkern.backend(place.backend):
        expected = gru(x, lengths=lengths)[0]
        assert torch.equal(gru(x, lengths=lengths.to(place.device))[0], expected)
        if place.device == "cpu":
            return
        with pytest.raises(RuntimeError, match="lengths must be on the CPU"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            gru(x, lengths=lengths.to(place.device))
        assert torch.equal(gru(x, lengths=lengths)[0], expected)


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=names)
@pytest.mark.parametrize(("B", "I", "H"), [(1, 16, 64), (3, 10, 17), (32, 5, 8)])
@pytest.mark.parametrize("cell", CELLS)
@everywhere
def test_a_cell(place: Place, cell: str, B: int, I: int, H: int, dtype: torch.dtype) -> None:
    layer = make_layer(cell, 1, B, I, H, dtype=dtype)
    found = one_step(move_layer(layer, place.device), place.backend)
    assert_as_accurate(on_cpu(found), one_step(layer, "eager", torch.float64), one_step(layer, "eager"), dtype)


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=names)
@pytest.mark.parametrize("score", STEP_SCORES)
@pytest.mark.parametrize(("B", "Tk", "lengths"), [(1, 200, None), (4, 70, [70, 0, 33, 1]), (2, 0, None)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@everywhere
def test_a_cell_and_attention(
    place: Place, cell: str, B: int, Tk: int, lengths: list[int] | None, score: str, dtype: torch.dtype
) -> None:
    layer = make_layer(cell, 1, B, 6, 16, dtype=dtype)
    sizes = score, Tk, 24, None if lengths is None else torch.tensor(lengths)
    found = attended(move_layer(layer, place.device), *sizes, place.backend)
    expected = attended(layer, *sizes, "eager", torch.float64)
    assert_as_accurate(on_cpu(found), expected, attended(layer, *sizes, "eager"), dtype)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
@everywhere
def test_decoding(place: Place, cell: str, attention: str) -> None:
    found = {}
    for backend, device, dtype in (
        ("eager", "cpu", torch.float64),
        ("eager", "cpu", torch.float32),
        (place.backend, place.device, torch.float32),
    ):
        decoder = make_decoder(cell, attention, 2).to(device, dtype)
        tokens, state, values, lengths = make_inputs(make_decoder(cell, attention, 2))
        state, values = moved(state, device), values.to(device)
        state = tuple(s.to(dtype) for s in state) if cell == "lstm" else state.to(dtype)
        with torch.no_grad(), rnnkern.backend(backend):
            memory = decoder.prepare(values.to(dtype), lengths)
            logits, state, _ = decoder.step(tokens.to(device), state, memory)
            names = dict(zip(("h", "c"), state if cell == "lstm" else (state,), strict=False))
        found[backend, dtype] = on_cpu({"logits": logits} | names)
    expected, peer = found["eager", torch.float64], found["eager", torch.float32]
    assert_as_accurate(found[place.backend, torch.float32], expected, peer, torch.float32)


@everywhere
def test_greedy_search(place: Place) -> None:
    model = make_model("lstm", "additive", dtype=torch.float32, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that rows say different things
    source = torch.randint(3, LETTERS, (9, 6), generator=torch.Generator().manual_seed(5))
    results = []
    for backend, device in (("eager", "cpu"), (place.backend, place.device)):
        with rnnkern.backend(backend):
            options = {"start": START, "end": END, "max_length": 20, "need_weights": False}
            results.append(greedy_search(model.to(device), source.to(device), torch.arange(6) + 4, **options))
    assert torch.equal(results[1].tokens.cpu(), results[0].tokens)
    torch.testing.assert_close(results[1].scores.cpu(), results[0].scores, rtol=1e-3, atol=1e-3)
