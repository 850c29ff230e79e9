"""Swapping a model's recurrent modules in place, what is left alone and why, and swapping back."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import needs_kernels

pytestmark = needs_kernels

I, H = 4, 5
KINDS = [
    ("RNN", {"num_layers": 2, "bidirectional": True}),
    ("RNN", {"nonlinearity": "relu", "dropout": 0.5, "num_layers": 3}),
    ("LSTM", {"batch_first": True, "bias": False}),
    ("GRU", {"dtype": torch.float64}),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("LSTMCell", {"bias": False}),
    ("GRUCell", {"dtype": torch.bfloat16}),
]


def make(kind: str, more: dict[str, Any]) -> torch.nn.Module:
    return getattr(torch.nn, kind)(I, H, **more)


def run(module: Any, x: Tensor) -> list[Tensor]:
    """Outputs and gradients."""
    module.zero_grad()
    torch.manual_seed(1)
    leaves = tree_leaves(module(x))
    sum(leaf.pow(2).sum() for leaf in leaves).backward()
    return [*leaves, *(p.grad.clone() for p in module.parameters())]


def ran_ours(module: torch.nn.Module, x: Tensor) -> bool:
    return [note.backend for note in rnnkern.explain(module, x).layers] not in ([], ["eager"])


@pytest.mark.parametrize(("kind", "more"), KINDS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_one_module(kind: str, more: dict[str, Any]) -> None:
    """It keeps its parameters, state_dict and repr, gives the same, and is torch's to the last attribute after."""
    module = make(kind, more)
    dtype = more.get("dtype", torch.float32)
    x = torch.randn(3, I, dtype=dtype) if "Cell" in kind else torch.randn(6, 3, I, dtype=dtype)
    expected, attributes, text = run(module, x), dict(vars(module)), repr(module)
    parameters, state = list(module.parameters()), list(module.state_dict())
    report = rnnkern.accelerate(module)
    assert [str(note) for note in report.swapped] == [f"(the model): {kind} swapped"]
    assert report.left == ()
    assert type(module) is getattr(rnnkern.nn, kind)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert (list(module.state_dict()), repr(module)) == (state, text)
    assert ran_ours(module, x)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(run(module, x), expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    again = rnnkern.accelerate(module)
    assert (again.swapped, again.left, again.already) == ((), (), report.swapped)
    assert str(again) == f"(the model): {kind} swapped already"
    assert rnnkern.restore(module) == ("",)
    assert type(module) is getattr(torch.nn, kind)
    assert vars(module).keys() == attributes.keys()
    for a, b in zip(run(module, x), expected, strict=True):
        assert torch.equal(a, b)
    assert rnnkern.restore(module) == ()


class Model(torch.nn.Module):
    """Nested, shared, a subclass, and all that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.ModuleDict({"rnns": torch.nn.ModuleList([torch.nn.GRU(I, I), torch.nn.GRU(I, I)])})
        self.shared = self.encoder["rnns"][0]
        self.head = torch.nn.Linear(I, H)
        self.aside = [self.shared]

    def forward(self, x: Tensor) -> Tensor:
        for rnn in [*self.encoder["rnns"], self.shared, *self.aside]:
            x = rnn(x)[0]
        return self.head(x)


def test_nested_and_shared_modules() -> None:
    model, x = Model(), torch.randn(6, 3, I)
    expected = run(model, x)
    report = rnnkern.accelerate(model)
    assert [note.path for note in report.swapped] == ["encoder.rnns.0", "encoder.rnns.1", "shared"]
    assert model.shared is model.encoder["rnns"][0] is model.aside[0]
    assert len(rnnkern.explain(model, x).layers) == 4
    model.more = torch.nn.LSTM(I, H)
    assert str(rnnkern.accelerate(model)).splitlines() == [
        "more: LSTM swapped",
        "encoder.rnns.0: GRU swapped already",
        "encoder.rnns.1: GRU swapped already",
        "shared: GRU swapped already",
    ]
    del model.more
    for a, b in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert rnnkern.restore(model) == ("encoder.rnns.0", "encoder.rnns.1", "shared")
    for a, b in zip(run(model, x), expected, strict=True):
        assert torch.equal(a, b)


def test_training_goes_on() -> None:
    """An optimizer made before, with its state, steps the same parameters, swapped and back."""
    losses = []
    for accelerated in (False, True):
        torch.manual_seed(5)
        model, x = Model(), torch.randn(6, 3, I)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(6):
            if accelerated and step == 2:
                rnnkern.accelerate(model)
            elif accelerated and step == 4:
                rnnkern.restore(model)
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(losses[6:], losses[:6])


class _Subclass(torch.nn.LSTM):
    pass


def _replaced() -> torch.nn.Module:
    module = torch.nn.LSTM(I, H)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _odd_parameter() -> torch.nn.Module:
    class Odd(torch.nn.Parameter):
        pass

    module = torch.nn.GRU(I, H)
    module.weight_ih_l0 = Odd(module.weight_ih_l0.detach())
    return module


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: _Subclass(I, H), "it is a subclass of torch.nn.LSTM, which may compute something else"),
        (_replaced, "its forward was replaced"),
        (_odd_parameter, "weight_ih_l0 is a Odd"),
        (lambda: torch.nn.LSTM(I, H, proj_size=2), "proj_size is not supported by cpu kernels"),
        (lambda: torch.nn.GRUCell(I, H, device="meta"), "the tensors are on meta, not on the cpu"),
        (lambda: torch.jit.script(torch.nn.GRU(I, H)), "it is scripted; rnnkern.enable() reaches it"),
    ],
)
def test_left_alone(make: Any, why: str) -> None:
    module = make()
    model = torch.nn.Sequential(torch.nn.Sequential(module), torch.nn.GRU(I, H))
    before = type(module)
    report = rnnkern.accelerate(model)
    assert [(note.path, note.why) for note in report.left] == [("0.0", why)]
    assert f"left alone: {why}" in str(report)
    assert [note.path for note in report.swapped] == ["1"]
    assert type(module) is before
    assert rnnkern.restore(model) == ("1",)
    assert type(module) is before


def test_nothing_to_do() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), rnnkern.nn.GRU(2, 2))
    assert str(rnnkern.accelerate(model)) == "no recurrent module of torch was found"
    assert rnnkern.restore(model) == ()
    assert type(model[1]) is rnnkern.nn.GRU
    for function in (rnnkern.accelerate, rnnkern.restore):
        with pytest.raises(TypeError, match="model must be a module, got int"):
            function(3)


def test_hooks_and_attributes_stay() -> None:
    gru, x, seen = torch.nn.GRU(I, H), torch.randn(6, 3, I), []
    gru.extra = "kept"
    handle = gru.register_forward_hook(lambda module, *_: seen.append(module))
    gru.weight_hh_l0.register_hook(lambda gradient: seen.append("gradient"))
    rnnkern.accelerate(gru)
    gru(x)[0].sum().backward()
    assert seen == [gru, "gradient"]
    assert gru.extra == "kept"
    handle.remove()
    gru(x)
    assert len(seen) == 2


def _weight_norm(module: torch.nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")


def _old_weight_norm(module: torch.nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module, "weight_hh_l0")


def _two_parametrizations(module: torch.nn.Module) -> None:
    torch.nn.utils.parametrizations.orthogonal(module, "weight_hh_l0")
    torch.nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")


@pytest.mark.parametrize("change", [_weight_norm, _old_weight_norm, _two_parametrizations])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_computed(change: Any, training: bool) -> None:
    rnn, x = torch.nn.RNN(I, I), torch.randn(6, 3, I)
    change(rnn)
    rnn.train(training)
    expected, kind = run(rnn, x), type(rnn)
    assert len(rnnkern.accelerate(rnn).swapped) == 1
    assert isinstance(rnn, rnnkern.nn.RNN)
    assert ran_ours(rnn, x)
    for _ in range(2):
        for a, b in zip(run(rnn, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for _ in range(3):
            next(rnn.parameters()).mul_(1.5)
            ours = rnn(x)[0]
            rnnkern.restore(rnn)
            torch.testing.assert_close(ours, rnn(x)[0])
            rnnkern.accelerate(rnn)
    rnnkern.restore(rnn)
    assert isinstance(rnn, torch.nn.RNN)
    assert type(rnn).__name__ == kind.__name__


def test_parametrizations_are_removed_from_a_swapped_module() -> None:
    gru = torch.nn.GRU(I, H)
    other = torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(gru), "weight_hh_l0")
    rnnkern.accelerate(other)
    parametrize.remove_parametrizations(other, "weight_hh_l0")
    assert type(other) is rnnkern.nn.GRU
    rnnkern.restore(other)
    assert type(other) is torch.nn.GRU
    torch.testing.assert_close(other.state_dict(), gru.state_dict())


def test_copies_and_pickles() -> None:
    """They are accelerated, too, and can be restored; checkpoints go either way."""
    model, x = Model(), torch.randn(6, 3, I)
    expected = model(x)
    rnnkern.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(other.shared) is rnnkern.nn.GRU
        torch.testing.assert_close(other(x), expected)
        assert len(rnnkern.restore(other)) == 3
        assert torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
    assert type(model.shared) is rnnkern.nn.GRU


def test_compiled_models() -> None:
    """A swap after compiling is seen; swapped modules compile without a break, torch's do not."""
    model, x = torch.nn.Sequential(torch.nn.GRU(I, H)), torch.randn(6, 3, I)
    expected = model(x)[0]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x)[0], expected)
    rnnkern.accelerate(compiled)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x)[0], expected)
    torch.testing.assert_close(compiled(x)[0], expected)


def test_random_numbers_are_not_drawn() -> None:
    model = Model()
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    rnnkern.accelerate(model)
    assert torch.equal(torch.rand(1), expected)


class Wrapper:
    pass


def test_restore_refuses_what_replaced_our_class() -> None:
    """As torch.distributed's fully_shard and replicate do, for a module of their own."""
    model = torch.nn.Sequential(torch.nn.GRU(3, 4), torch.nn.LSTM(3, 4))
    report = rnnkern.accelerate(model)
    model[1].__class__ = type("WrappedLSTM", (Wrapper, rnnkern.nn.LSTM), {})
    assert rnnkern.accelerate(model).already == report.swapped
    with pytest.raises(RuntimeError, match=r"^1: its class was replaced after accelerate, by WrappedLSTM"):
        rnnkern.restore(model)
    assert type(model[0]) is rnnkern.nn.GRU
    model[1].__class__ = rnnkern.nn.LSTM
    assert rnnkern.restore(model) == ("0", "1")


def test_restore_refuses_what_wraps_our_forward() -> None:
    model = torch.nn.Sequential(torch.nn.GRU(3, 4), torch.nn.GRUCell(3, 4))
    rnnkern.accelerate(model)
    inner = model[1].forward
    model[1].forward = lambda *args: inner(*args)
    with pytest.raises(RuntimeError, match=r"^1: its forward was replaced"):
        rnnkern.restore(model)
    assert type(model[0]) is rnnkern.nn.GRU
    del model[1].forward
    assert rnnkern.restore(model) == ("0", "1")
