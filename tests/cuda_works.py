"""Small calls of every kind, for tests of a GPU; on the emulator, too, so that the tests are tested themselves."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rnnkern
from rnnkern.ops import cuda
from rnnkern.ops._dispatch import ENGINES
from rnnkern.ops.step import attention_step, step
from tests.attention_problem import Problem, make_problem
from tests.helpers import Layer, make_layer
from tests.seq2seq_models import make_model
from tests.test_cuda_stack import in_chunks


@dataclass(frozen=True)
class Place:
    """Where kernels run."""

    backend: str
    device: str


@dataclass
class Work:
    """A call, and the tensors that it reads, which a test may write to."""

    run: Callable[[], dict[str, Tensor]]
    inputs: list[Tensor]

    def change(self) -> None:
        """Other inputs in the same memory; symbols and lengths change places."""
        with torch.no_grad():
            for tensor in self.inputs:
                tensor.copy_(torch.rand_like(tensor) * 2 - 1 if tensor.dtype.is_floating_point else tensor.flip(0))


def moved(values: Any, device: str) -> Any:
    """The same on a device: tensors, and containers of them."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, tuple):
        return tuple(moved(value, device) for value in values)
    return {name: moved(value, device) for name, value in values.items()} if isinstance(values, dict) else values


def move_layer(layer: Layer, device: str) -> Layer:
    """The same layer, but for lengths, which stay on the CPU as everywhere."""
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return Layer(**{name: value if name == "lengths" else moved(value, device) for name, value in fields.items()})


def move_problem(problem: Problem, device: str, lengths_device: str = "cpu") -> Problem:
    """The same attention."""
    tensors, gradients = moved(problem.tensors, device), moved((problem.dcontext, problem.dweights), device)
    return Problem(problem.score, tensors, moved(problem.padding, lengths_device), *gradients)


def layer_work(place: Place, engine: str | None, training: bool) -> Work:
    """A layer of two directions with lengths and resets, and every gradient."""
    marks = {"lengths": torch.tensor([5, 0, 2, 4]), "resets": torch.rand(5, 4) < 0.3}
    layer = move_layer(make_layer("lstm", 5, 4, 7, 40, D=2, **marks, every_c=True), place.device)
    run = layer.run if training else layer.infer
    return Work(lambda: run(place.backend, engine=engine), [layer.x, layer.h0])


def packed_work(place: Place, training: bool) -> Work:
    """Two layers of two directions on packed rows."""
    module = rnnkern.nn.GRU(6, 20, num_layers=2, bidirectional=True, device=place.device)
    x = torch.randn(7, 4, 6, device=place.device)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 7, 1, 6]), enforce_sorted=False)

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(training), rnnkern.backend(place.backend):
            y, h_n = module(packed)
            found = {"y": y.data.detach(), "h_n": h_n.detach()}
            if training:
                parameters = dict(module.named_parameters())
                gradients = torch.autograd.grad(y.data.square().sum() + h_n.sum(), list(parameters.values()))
                found |= dict(zip(parameters, gradients, strict=True))
        return found

    return Work(run, [packed.data])


def attention_work(place: Place, score: str, Tq: int, on_cpu: bool, training: bool) -> Work:
    """Attention with weights; lengths on the CPU or where the rest is."""
    problem = make_problem(score, 3, Tq, 50, 20, 9, padding="lengths")
    problem = move_problem(problem, place.device, "cpu" if on_cpu else place.device)
    inputs = [problem.tensors["query"], problem.tensors["value"]]
    if not on_cpu:
        inputs.append(problem.padding["lengths"])
    if training:
        return Work(lambda: problem.run(place.backend), inputs)

    def infer() -> dict[str, Tensor]:
        with torch.no_grad(), rnnkern.backend(place.backend):
            context, weights = problem.attend(problem.tensors)
        assert weights is not None
        return {"context": context, "weights": weights}

    return Work(infer, inputs)


def cell_work(place: Place) -> Work:
    """A cell in one launch."""
    layer = move_layer(make_layer("lstm", 1, 3, 6, 40), place.device)
    x, h, weights = layer.x[0], layer.h0[0], layer.weights
    assert layer.c0 is not None
    c = layer.c0[0]

    def run() -> dict[str, Tensor]:
        with torch.no_grad(), rnnkern.backend(place.backend):
            next_h, next_c = step("lstm", x, h, c, weights)
        assert next_c is not None
        return {"h": next_h, "c": next_c}

    return Work(run, [x, h, c])


def attention_step_work(place: Place) -> Work:
    """A cell and additive attention in one launch, with what is kept from step to step."""
    layer = move_layer(make_layer("gru", 1, 3, 6, 40), place.device)
    x, h = layer.x[0], layer.h0[0]
    key, value = (torch.randn(3, 70, size, device=place.device) for size in (11, 9))
    w_query, vector = torch.randn(11, 40, device=place.device) / 6, torch.randn(11, device=place.device)
    lengths = torch.tensor([70, 0, 33], device=place.device)
    workspace = cuda.step_workspace(key, value)

    def run() -> dict[str, Tensor]:
        with torch.no_grad(), rnnkern.backend(place.backend):
            next_h, _, context = attention_step(
                *("gru", x, h, None, layer.weights, key, value),
                w_query=w_query,
                vector=vector,
                lengths=lengths,
                workspace=workspace,
            )
        return {"h": next_h, "context": context}

    return Work(run, [x, h, value, lengths])


def decoding_work(place: Place, cell: str, attention: str) -> Work:
    """A step of greedy decoding by two layers: the next symbol, its logits and the state."""
    decoder = make_model(cell, attention, decoder_layers=2, dtype=torch.float32).decoder.to(place.device).eval()
    tokens = torch.arange(4, device=place.device)
    h, c = (torch.rand(2, 4, decoder.hidden_size, device=place.device) - 0.5 for _ in range(2))
    values = torch.randn(37, 4, decoder.memory_size, device=place.device)
    with torch.no_grad(), rnnkern.backend(place.backend):
        memory = decoder.prepare(values, torch.tensor([37, 0, 33, 1]))

    def run() -> dict[str, Tensor]:
        with torch.no_grad(), rnnkern.backend(place.backend):
            logits, state, _ = decoder.step(tokens, (h, c) if cell == "lstm" else h, memory)
            after = state if cell == "lstm" else (state,)
            return {"tokens": logits.argmax(1), "logits": logits} | dict(zip(("h", "c"), after, strict=False))

    return Work(run, [tokens, h] + ([c] if cell == "lstm" else []))


def stack_work(place: Place, training: bool) -> Work:
    """Two layers of one direction, of so many steps that the planner makes them a wavefront.

    Before Hopper it does so only by request, as it does of the few steps that the emulator has time for.
    """
    steps, gpu = 1000, place.device != "cpu"
    module = rnnkern.nn.LSTM(6, 64, num_layers=2, device=place.device)
    x = torch.randn(steps if gpu else 6, 2, 6, device=place.device)
    by_itself = not gpu or torch.cuda.get_device_capability() >= (9, 0)
    for backward in (False, True) if by_itself else ():
        sizes = x.new_empty(steps, 2, 6), x.new_empty(2, 2, 64)
        plan = torch.ops.rnnkern.cuda_stack_plan("lstm", *sizes, None, "", False, 0, backward)
        assert "wavefront" in plan, plan
    chunks = 0 if gpu and by_itself else 2

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(training), rnnkern.backend(place.backend), in_chunks(chunks):
            y, (h_n, c_n) = module(x)
            found = {"y": y.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
            if training:
                parameters = dict(module.named_parameters())
                gradients = torch.autograd.grad(y.square().mean() + h_n.sum(), list(parameters.values()))
                found |= dict(zip(parameters, gradients, strict=True))
        return found

    return Work(run, [x])


def clipped_work(place: Place) -> Work:
    """Training with gradients limited in norm for each sequence, whose ends are told by lengths on the CPU."""
    module = rnnkern.nn.GRU(6, 20, grad_clip_norm=0.5, device=place.device)
    x, lengths = torch.randn(7, 4, 6, device=place.device), torch.tensor([3, 7, 0, 6])

    def run() -> dict[str, Tensor]:
        with rnnkern.backend(place.backend):
            y, _ = module(x, lengths=lengths)
            parameters = dict(module.named_parameters())
            gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    return Work(run, [x])


WORKS: dict[str, Callable[[Place], Work]] = {
    "cell": cell_work,
    "attention step": attention_step_work,
    "decoding, lstm, additive": partial(decoding_work, cell="lstm", attention="additive"),
    "decoding, gru, general": partial(decoding_work, cell="gru", attention="general"),
    "decoding, rnn, none": partial(decoding_work, cell="rnn_tanh", attention="none"),
    "packed": partial(packed_work, training=False),
    "packed, training": partial(packed_work, training=True),
    "stack": partial(stack_work, training=False),
    "stack, training": partial(stack_work, training=True),
    "clipped, training": clipped_work,
}
for score in ("scaled_dot", "general", "additive"):
    for Tq in (1, 5):
        for on_cpu in (True, False):
            name = f"{score}, Tq={Tq}, lengths on the {'CPU' if on_cpu else 'GPU'}"
            options = {"score": score, "Tq": Tq, "on_cpu": on_cpu}
            WORKS[name] = partial(attention_work, training=False, **options)
            WORKS[f"{name}, training"] = partial(attention_work, training=True, **options)
for engine in (None, *ENGINES):
    WORKS[f"layer, {engine or 'automatic'}"] = partial(layer_work, engine=engine, training=False)
    WORKS[f"layer, {engine or 'automatic'}, training"] = partial(layer_work, engine=engine, training=True)
