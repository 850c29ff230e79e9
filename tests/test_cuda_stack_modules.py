"""Modules whose layers run side by side, emulated: what they give, what runs them, and what `explain` says of it."""

from typing import Any

import pytest
import torch

import rnnkern
from tests.helpers import needs_emulator
from tests.test_cuda_layer import EMULATED
from tests.test_cuda_stack import in_chunks

pytestmark = [needs_emulator, pytest.mark.usefixtures("no_tf32")]


def test_modules_drop_between_layers_in_training_alone() -> None:
    lstm, x = rnnkern.nn.LSTM(3, 8, num_layers=2, dropout=0.5), torch.randn(6, 2, 3)
    with rnnkern.backend(EMULATED), in_chunks(2), torch.no_grad():
        drawn = [lstm(x)[0] for _ in range(2)]
        assert not torch.equal(*drawn)
        lstm.eval()
        found = lstm(x)[0]
    with rnnkern.backend("eager"), torch.no_grad():
        torch.testing.assert_close(found, lstm(x)[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_modules_run_on_it(cell: str, batch_first: bool) -> None:
    module = getattr(rnnkern.nn, cell)(3, 5, num_layers=3, batch_first=batch_first)
    x = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (2, 4, 1)], enforce_sorted=False)
    resets = {"resets": torch.rand(4, 4) < 0.4}
    for arguments, more in ((x, {}), (torch.randn(4, 4, 3), resets)):
        found = []
        for backend in ("eager", EMULATED):
            with rnnkern.backend(backend), in_chunks(2):
                y, _ = module(arguments, **more)
                y = y.data if isinstance(y, torch.nn.utils.rnn.PackedSequence) else y
                found.append([y, *torch.autograd.grad(y.sin().sum(), list(module.parameters()))])
        for actual, expected in zip(found[1], found[0]):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"bidirectional": True},
        {"checkpoint_every": 2},
        {"grad_clip_norm": 1.0},
        {"num_layers": 1},
        {"return_sequence_states": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_asked_of_single_layers_runs_them_one_by_one(options: dict[str, Any]) -> None:
    call = {name: options[name] for name in options if name == "return_sequence_states"}
    gru = rnnkern.nn.GRU(3, 5, **({"num_layers": 2} | {n: v for n, v in options.items() if n not in call}))
    with rnnkern.backend(EMULATED), in_chunks(2):
        told = rnnkern.explain(gru, torch.randn(4, 2, 3), **call)
    assert "cuda-emulated" in str(told)
    assert "wavefront" not in str(told)


def test_a_learned_state_and_resets() -> None:
    lstm = rnnkern.nn.LSTM(3, 5, num_layers=2, learn_initial_state=True)
    for parameter in lstm.parameters():
        torch.nn.init.uniform_(parameter)
    x, resets = torch.randn(5, 3, 3), torch.rand(5, 3) < 0.4
    found = []
    for backend in ("eager", EMULATED):
        with rnnkern.backend(backend), in_chunks(2):
            y, _ = lstm(x, resets=resets)
            found.append([y, *torch.autograd.grad(y.sin().sum(), list(lstm.parameters()))])
    for actual, expected in zip(found[1], found[0]):
        torch.testing.assert_close(actual, expected)


def test_autocast() -> None:
    lstm, x = rnnkern.nn.LSTM(3, 5, num_layers=2), torch.randn(5, 3, 3)
    found = []
    for backend in ("eager", EMULATED):
        with rnnkern.backend(backend), in_chunks(2), torch.autocast("cpu", torch.bfloat16):
            y, (h, c) = lstm(x)
            found.append((y, h, c))
    for actual, expected in zip(found[1], found[0]):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_explain_tells_the_wavefront() -> None:
    gru, x = rnnkern.nn.GRU(3, 40, num_layers=3, dtype=torch.bfloat16), torch.zeros(4, 3, 3, dtype=torch.bfloat16)
    with rnnkern.backend(EMULATED), in_chunks(2):
        told = rnnkern.explain(gru, x)
    assert [note.I for note in told.layers] == [3, 40, 40]
    for note in told.layers:
        forward, backward = note.engine.split("; backward: ")
        for engine in (forward, backward):
            assert engine.endswith("; wavefront of 3 layers in 2 chunks of time")
    for length, expected in ((4, False), (2000, True)):
        x = torch.zeros(length, 1, 3)
        h0 = torch.zeros(3, 1, 64)
        assert ("wavefront" in torch.ops.rnnkern.cuda_stack_plan("gru", x, h0, None, "", False, 0, False)) == expected


def test_a_wavefront_that_cannot_be_says_why() -> None:
    gru, x = rnnkern.nn.GRU(3, 4, num_layers=2, dtype=torch.float64), torch.zeros(2, 1, 3, dtype=torch.float64)
    with (
        rnnkern.backend(EMULATED),
        in_chunks(2),
        pytest.raises(rnnkern.BackendUnavailable, match="float64 is for the stepwise engine"),
    ):
        rnnkern.explain(gru, x)
    lstm = rnnkern.nn.LSTM(3, 3000, num_layers=2, dtype=torch.bfloat16)
    with (
        torch.no_grad(),
        rnnkern.backend(EMULATED, engine="cluster"),
        pytest.raises(rnnkern.BackendUnavailable, match="no room for 4 gates of H = 3000"),
    ):
        lstm(x.bfloat16())


def test_compiles_as_one_graph() -> None:
    gru, x = rnnkern.nn.GRU(3, 5, num_layers=2), torch.randn(6, 2, 3)
    compiled = torch.compile(gru, backend="aot_eager", fullgraph=True)
    with rnnkern.backend(EMULATED), in_chunks(2):
        for steps in (6, 4, 5):
            torch.testing.assert_close(compiled(x[:steps])[0], gru(x[:steps])[0], rtol=0, atol=0)
        compiled(x)[0].sum().backward()
        found = [parameter.grad for parameter in gru.parameters()]
        expected = torch.autograd.grad(gru(x)[0].sum(), list(gru.parameters()))
    torch.testing.assert_close(found, list(expected))
