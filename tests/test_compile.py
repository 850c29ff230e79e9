"""torch.compile of every module: one graph, no break, and no compilation for each length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_sequence

import rnnkern
from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

I, H = 4, 5
SHAPES = [(6, 3), (7, 4), (20, 9), (2, 2), (33, 5)]  # T on both sides of where calls count as short
LAYERS = ["RNN", "LSTM", "GRU"]


def lengths_of(T: int, B: int) -> Tensor:
    return torch.randint(0, T + 1, (B,))


def leaves(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def check(module: nn.Module, inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """Results and gradients are those of the module, from at most two graphs in either mode: one for the sizes that
    came first, and one for all others.
    """
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(module, fullgraph=True, backend=counter)
    for training in (True, False):
        module.train(training)
        before = counter.frame_count
        for shape in SHAPES:
            args, options = inputs(*shape)
            torch.testing.assert_close(leaves(run(*args, **options)), leaves(module(*args, **options)))
        assert counter.frame_count - before <= (2 if training else 1), training  # it knows now that sizes change
    parameters = [p for p in module.parameters() if p.requires_grad]
    if parameters:
        gradients = [
            torch.autograd.grad(
                sum(leaf.sum() for leaf in leaves(f(*args, **options)) if leaf.requires_grad), parameters
            )
            for f in (run, module)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str) -> None:
    check(getattr(rnnkern.nn, kind)(I, H), lambda T, B: ((torch.randn(T, B, I),), {}))


def test_layers_in_a_stack_with_states_and_lengths() -> None:
    module = rnnkern.nn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True)
    check(
        module,
        lambda T, B: ((torch.randn(B, T, I), torch.randn(2, 4, B, H).unbind()), {"lengths": lengths_of(T, B)}),
    )


def test_resets_and_cell_states() -> None:
    check(
        rnnkern.nn.LSTM(I, H),
        lambda T, B: ((torch.randn(T, B, I),), {"resets": torch.rand(T, B) < 0.1, "return_sequence_states": True}),
    )


def test_packed_sequences() -> None:
    def inputs(T: int, B: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = [torch.randn(max(1, T - 2 * b), I) for b in range(B)]
        return (pack_sequence(rows[::-1], enforce_sorted=False),), {}

    check(rnnkern.nn.GRU(I, H), inputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_cells(kind: str) -> None:
    check(getattr(rnnkern.nn, f"{kind}Cell")(I, H), lambda T, B: ((torch.randn(B, I),), {}))


@pytest.mark.parametrize("attention", [rnnkern.nn.DotAttention(scaled=True), rnnkern.nn.AdditiveAttention(I, I, 3)])
def test_attention(attention: nn.Module) -> None:
    def inputs(T: int, B: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        key = torch.randn(B, T + 3, I)
        return (torch.randn(B, T, I, requires_grad=True), key), {"lengths": lengths_of(T + 3, B), "need_weights": True}

    check(attention, inputs)


def test_int8_weights() -> None:
    module = rnnkern.nn.QuantizedGRU.from_float(rnnkern.nn.GRU(I, H))
    check(module, lambda T, B: ((torch.randn(T, B, I),), {}))


def test_seq2seq() -> None:
    encoder = Encoder(30, 8, 8)
    model = Seq2Seq(encoder, Decoder(40, 8, 8, encoder.memory_size, attention="additive"))
    check(
        model,
        lambda T, B: (
            (torch.randint(1, 30, (T, B)), torch.randint(1, 40, (T + 2, B)), lengths_of(T, B).clamp(min=1)),
            {},
        ),
    )


def test_a_length_of_one_is_compiled_once_more() -> None:
    """As torch.compile does with any size of one."""
    module, counter = rnnkern.nn.GRU(I, H), CompileCounterWithBackend("aot_eager")
    run = torch.compile(module, fullgraph=True, backend=counter)
    for T in (6, 7, 1, 8, 1, 9):
        run(torch.randn(T, 3, I))
    assert counter.frame_count == 3


def test_inductor() -> None:
    model = nn.Sequential(nn.Linear(I, I), rnnkern.nn.LSTM(I, H, num_layers=2))
    run = torch.compile(model, fullgraph=True, dynamic=True)
    for T in (6, 20):
        x = torch.randn(T, 3, I)
        gradients = []
        for f in (run, model):
            model.zero_grad()
            f(x)[0].pow(2).sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*gradients)
