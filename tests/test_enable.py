"""torch's own operators on our kernels: what runs there gives what torch gives."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import rnnkern
from rnnkern import _enable
from tests.helpers import needs_kernels
from tests.torch_operators import CELLS, IDS, LAYERS, B, H, I, T, assert_close, results, state_of

pytestmark = [needs_kernels, pytest.mark.usefixtures("disabled_afterwards")]


@pytest.mark.parametrize(
    "flags", list(itertools.product([False, True], repeat=3)), ids=lambda f: "".join("ft"[v] for v in f)
)
@pytest.mark.parametrize(("kind", "more"), LAYERS, **IDS)
def test_layers(kind: str, more: dict[str, Any], flags: tuple[bool, bool, bool], ran: list[str]) -> None:
    bidirectional, bias, batch_first = flags
    module = getattr(torch.nn, kind)(
        I, H, 2, bias=bias, bidirectional=bidirectional, batch_first=batch_first, dropout=0.5, **more
    )
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    hx = state_of(module, B)
    packed = pack_sequence([torch.randn(n, I) for n in (2, 6, 1)], enforce_sorted=False)
    cases = [(x, None), (x, hx), (x[0], None), (packed, None), (packed, hx)]
    expected = [results(module, *case) for case in cases]
    assert not ran
    with rnnkern.enable():
        for case, wanted in zip(cases, expected):
            assert_close(results(module, *case), wanted)
    assert ran == ["ours"] * len(cases)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "more"), CELLS, **IDS)
def test_cells(kind: str, more: dict[str, Any], bias: bool, ran: list[str]) -> None:
    module = getattr(torch.nn, kind)(I, H, bias=bias, **more)
    h = torch.randn(B, H)
    hx = (h, torch.randn(B, H)) if kind == "LSTMCell" else h
    cases = [(torch.randn(B, I), None), (torch.randn(B, I), hx), (torch.randn(I), None)]
    expected = [results(module, *case) for case in cases]
    with rnnkern.enable():
        for case, wanted in zip(cases, expected):
            assert_close(results(module, *case), wanted)
    assert ran == ["ours"] * len(cases)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("kind", "more"), [*LAYERS, *CELLS], **IDS)
def test_short_calls_without_gradients(
    kind: str, more: dict[str, Any], mode: Any, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that go past the dispatcher, with weights that change between them."""
    module = getattr(torch.nn, kind)(I, H, **more, **({} if "Cell" in kind else {"batch_first": True})).eval()
    x = torch.randn(B, I) if "Cell" in kind else torch.randn(B, 2, I)
    with mode():
        for change in (None, "add", "swap", "data"):
            with torch.inference_mode(False), torch.no_grad():
                if change == "add":
                    module.state_dict()[next(iter(module.state_dict()))].add_(1)
                elif change == "swap":
                    name, weight = next(iter(module.named_parameters()))
                    setattr(module, name, torch.nn.Parameter(weight.detach() * 2))
                elif change == "data":
                    for parameter in module.parameters():
                        parameter.data = parameter.data / 2
            rnnkern.disable()
            expected = tree_leaves(module(x))
            rnnkern.enable()
            for _ in range(4):
                assert_close(tree_leaves(module(x)), expected)
    assert ran == ["ours"] * 16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # a call past the dispatcher would not look at it
        ours = tree_leaves(module(x))
        rnnkern.disable()
        assert [leaf.dtype for leaf in ours] == [leaf.dtype for leaf in tree_leaves(module(x))]
    assert ran[16:] == ["torch"]


def test_weights_are_packed_between_short_calls() -> None:
    lstm = torch.nn.LSTM(I, H).eval()
    rnnkern.enable()
    known = _enable._switch._known["lstm"][0]
    with torch.no_grad():
        for _ in range(3):
            lstm(torch.randn(1, 1, I))
    (entry,) = known.values()
    assert entry.packs.short is not None
    lstm.train()(torch.randn(1, 1, I))  # an optimizer may follow, which changes weights without a trace
    assert next(iter(known.values())).packs.short is None
    del lstm, entry
    assert not known  # with the weights, what is known of them goes


def test_weights_may_be_swapped() -> None:
    """torch.utils.swap_tensors refuses tensors with weak references."""
    cell, other, x = torch.nn.LSTMCell(I, H).eval(), torch.nn.LSTMCell(I, H), torch.randn(B, I)
    expected = other(x)
    rnnkern.enable()
    with torch.no_grad():
        for _ in range(3):
            cell(x)
    for ours, theirs in zip(cell.parameters(), other.parameters()):
        torch.utils.swap_tensors(ours, theirs)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(cell(x), expected)


def test_one_first_weight_in_different_company() -> None:
    """The same tensors with and without biases, as one layer or two, forward or both ways, in either layout."""
    x, h = torch.randn(4, 4, 4), torch.randn(1, 4, 4)
    w = [torch.randn(12, 4), torch.randn(12, 4), torch.randn(12), torch.randn(12)]
    two = [*w[:2], *w[:2]]
    calls = [
        (x, h, w, True, 1, 0.0, False, False, False),
        (x, h, w[:2], False, 1, 0.0, False, False, False),
        (x, h, w[:2], False, 1, 0.0, False, False, True),
        (x, torch.randn(2, 4, 4), two, False, 2, 0.0, False, False, False),
        (x, torch.randn(2, 4, 4), two, False, 1, 0.0, False, True, False),
    ]
    expected = [torch.gru(*call) for call in calls]
    with rnnkern.enable():
        for call, wanted in zip(calls, expected):
            for _ in range(3):
                assert_close(list(torch.gru(*call)), list(wanted))
    small = [torch.randn(4, 4), torch.randn(4, 4), torch.randn(4), torch.randn(4)]
    cells = [(torch.rnn_tanh_cell, small), (torch.rnn_relu_cell, small), (torch.rnn_tanh_cell, small[:2])]
    expected = [cell(x[0], x[1], *weights) for cell, weights in cells]
    with rnnkern.enable():
        for (cell, weights), wanted in zip(cells, expected):
            for _ in range(3):
                assert_close([cell(x[0], x[1], *weights)], [wanted])


def test_a_scripted_file(ran: list[str]) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.LSTMCell(I, I)
            self.gru = torch.nn.GRU(I, H, 2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(x.size(1), x.size(2))
            c = torch.zeros(x.size(1), x.size(2))
            steps = []
            for t in range(x.size(0)):
                h, c = self.cell(x[t], (h, c))
                steps.append(h)
            return self.gru(torch.stack(steps))[0]

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Model()), file)
    file.seek(0)
    module, x = torch.jit.load(file), torch.randn(T, B, I)
    expected = [module(x) for _ in range(4)]
    rnnkern.enable()
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for wanted in expected:
            with grad():
                torch.testing.assert_close(module(x), wanted)
    assert set(ran) == {"ours"}
    assert len(ran) == 12 * (T + 1)
    frozen = torch.jit.freeze(module.eval())
    torch.testing.assert_close(frozen(x), expected[0])


def test_double_backward_and_weight_norm(ran: list[str]) -> None:
    """Weights that are no parameters, and derivatives of derivatives."""
    gru = torch.nn.utils.parametrizations.weight_norm(torch.nn.GRU(I, H, dtype=torch.float64), "weight_hh_l0")
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)

    def second() -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(gru(x)[0].pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, *gru.parameters()])

    outputs, expected = gru(x)[0].detach(), second()
    with rnnkern.enable():
        torch.testing.assert_close(second(), expected)
        with torch.no_grad():
            for _ in range(4):
                torch.testing.assert_close(gru(x)[0], outputs)
    assert "torch" not in ran


def test_short_calls_with_weights_of_inference_mode_stay_torchs() -> None:
    """They have no version: packs of them could not be kept."""
    with torch.inference_mode(), rnnkern.enable():
        cell, x = torch.nn.LSTMCell(I, H), torch.randn(B, I)
        assert [note.backend for note in rnnkern.explain(cell, x).layers] == ["torch"]


def test_inference_tensors_and_strided_weights(ran: list[str]) -> None:
    with torch.inference_mode():
        gru, x = torch.nn.GRU(I, H), torch.randn(T, B, I)
        expected = gru(x)[0]
        with rnnkern.enable():
            assert gru(x)[0].is_inference()
            torch.testing.assert_close(gru(x)[0], expected)
    weights = [torch.randn(I, 3 * H).t(), torch.randn(H, 3 * H).t()]
    args = torch.randn(I, B).t(), torch.randn(H, B).t(), *weights
    expected = torch.gru_cell(*args)
    with rnnkern.enable():
        torch.testing.assert_close(torch.gru_cell(*args), expected)
    assert set(ran) == {"ours"}
