"""Packed weights are never stale: whatever changes a weight, the next call sees it."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import needs_kernels

pytestmark = needs_kernels
B, I, H = 2, 5, 20
FORMS: dict[str, tuple[str, dict[str, Any], int]] = {  # the module and the steps of its input
    "GRU": ("GRU", {}, 1),  # past the dispatcher
    "deep LSTM": ("LSTM", {"num_layers": 2}, 3),
    "RNN of few rows": ("RNN", {}, 20),  # packed, but by way of the operator
    "bidirectional GRU": ("GRU", {"bidirectional": True}, 2),
    "LSTMCell": ("LSTMCell", {}, 0),
    "GRUCell": ("GRUCell", {}, 0),
}
forms = pytest.mark.parametrize("form", FORMS)


def make(form: str) -> tuple[torch.nn.Module, Tensor]:
    kind, options, T = FORMS[form]
    x = torch.randn(T, B, I) if T else torch.randn(B, I)
    return getattr(rnnkern.nn, kind)(I, H, **options).eval(), x


def warm(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The output of a call that reads packed weights."""
    with torch.no_grad():
        for _ in range(3):
            output = tree_leaves(module(x))[0]
    assert any(entry.packed is not None for entry in module._packs._entries.values())
    return output


def assert_seen(module: torch.nn.Module, x: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        after = tree_leaves(module(x))[0]
        with rnnkern.backend("eager"):
            expected = tree_leaves(module(x))[0]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


def first(module: torch.nn.Module) -> tuple[str, Tensor]:
    """A weight that every form has, and reads even if its state is zero."""
    return next((name, p) for name, p in module.named_parameters() if name.startswith("weight_ih"))


def other(value: Tensor) -> Tensor:
    return torch.randn(value.shape) / 8


def by_optimizer(make_optimizer: Callable[[Iterator[Tensor]], torch.optim.Optimizer]) -> Callable[..., None]:
    def step(module: torch.nn.Module, x: Tensor) -> None:
        optimizer = make_optimizer(module.parameters())
        for parameter in module.parameters():  # not by a backward of the module, whose call would forget the packs
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    return step


def other_state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: other(value) for name, value in module.state_dict().items()}


def swapped(module: torch.nn.Module, x: Tensor) -> None:
    _, weight = first(module)
    if isinstance(module, torch.nn.RNNBase):
        module._flat_weight_refs = []  # as torch itself does before it swaps
    torch.utils.swap_tensors(weight, torch.nn.Parameter(other(weight)))
    if isinstance(module, torch.nn.RNNBase):
        module._init_flat_weights()


def there_and_back(module: torch.nn.Module, x: Tensor) -> None:
    module.double()
    with torch.no_grad():
        first(module)[1][3, 4] += 1
    module.float()


def by_numpy(module: torch.nn.Module, x: Tensor) -> None:
    first(module)[1].detach().numpy()[...] = 0.25


def pointed_elsewhere(module: torch.nn.Module, x: Tensor) -> None:
    _, weight = first(module)
    with torch.no_grad():
        weight.set_(other(weight))


def replaced(module: torch.nn.Module, x: Tensor) -> None:
    name, weight = first(module)
    setattr(module, name, torch.nn.Parameter(other(weight)))


def deleted_and_reassigned(module: torch.nn.Module, x: Tensor) -> None:
    name, weight = first(module)
    value = other(weight).detach()
    delattr(module, name)
    setattr(module, name, value)


def one_element(module: torch.nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        first(module)[1][3, 4] += 1


CHANGES: dict[str, Callable[[torch.nn.Module, Tensor], Any]] = {
    "SGD": by_optimizer(lambda p: torch.optim.SGD(p, lr=0.1)),
    "foreach Adam": by_optimizer(lambda p: torch.optim.Adam(p, lr=0.1, foreach=True)),
    "fused Adam": by_optimizer(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
    "fused SGD": by_optimizer(lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
    "load_state_dict": lambda module, x: module.load_state_dict(other_state(module)),
    "load_state_dict, assigned": lambda module, x: module.load_state_dict(other_state(module), assign=True),
    "data.copy_": lambda module, x: first(module)[1].data.copy_(other(first(module)[1])),
    "data": lambda module, x: setattr(first(module)[1], "data", other(first(module)[1])),
    "set_": pointed_elsewhere,
    "swap_tensors": swapped,
    "to(dtype)": there_and_back,
    "numpy": by_numpy,
    "another parameter": replaced,
    "deleted and reassigned": deleted_and_reassigned,
    "one element": one_element,
    "reset_parameters": lambda module, x: module.reset_parameters(),
    "vector_to_parameters": lambda module, x: torch.nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in module.parameters())) / 8, module.parameters()
    ),
    "foreach": lambda module, x: torch._foreach_mul_(list(module.parameters()), 2.0),
    "shared memory": lambda module, x: (module.share_memory(), first(module)[1].data.mul_(2)),
    "prune": lambda module, x: prune.random_unstructured(module, first(module)[0], 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@forms
def test_a_change_is_seen(form: str, change: str) -> None:
    module, x = make(form)
    before = warm(module, x)
    with torch.no_grad() if change == "foreach" else torch.enable_grad():
        CHANGES[change](module, x)
    assert_seen(module, x, before)
    assert_seen(module, x, before)  # nor does the second call, which packs, take the old ones


@forms
def test_a_copy_has_its_own(form: str) -> None:
    module, x = make(form)
    before = warm(module, x)
    for twin in (copy.deepcopy(module), copy.copy(module)):
        warm(twin, x)
        with torch.no_grad():
            first(twin)[1].mul_(2)
        assert_seen(twin, x, before)
        with torch.no_grad(), rnnkern.backend("eager"):
            expected = tree_leaves(module(x))[0]
        with torch.no_grad():
            torch.testing.assert_close(tree_leaves(module(x))[0], expected)


def rebuilt(form: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A module with a weight that a hook makes anew for every call, at the address of the last one's if it can."""
    module, x = make(form)
    name, _ = first(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, name)
    return module, x, getattr(module, f"{name}_g")


@forms
def test_a_weight_that_a_hook_makes_is_never_that_of_an_earlier_call(form: str) -> None:
    """Its address and version are those of an earlier one; a row less than a tenth of it escapes the sample."""
    module, x, magnitude = rebuilt(form)
    for row in range(0, H, 3):  # of the first gate: an LSTM's second one is without effect while c is zero
        with torch.no_grad():
            for _ in range(4):
                before = tree_leaves(module(x))[0]
            magnitude[row] += 1
        assert_seen(module, x, before)


@forms
def test_parametrized_weights_follow_their_parameters(form: str) -> None:
    module, x = make(form)
    name, _ = first(module)
    torch.nn.utils.parametrizations.weight_norm(module, name)
    magnitude = module.parametrizations[name].original0
    with torch.no_grad():
        for row in range(5):
            for _ in range(4):
                before = tree_leaves(module(x))[0]
            magnitude[row] += 1
            assert_seen(module, x, before)
    torch.nn.utils.parametrize.remove_parametrizations(module, name)
    assert_seen(module, x, torch.zeros(()))
    before = warm(module, x)
    one_element(module, x)
    assert_seen(module, x, before)


def test_memory_of_weights_is_given_back() -> None:
    """The cache keeps no weight alive; with one, its pack goes."""
    module, x = make("deep LSTM")
    warm(module, x)
    weight = weakref.ref(module.weight_hh_l1.untyped_storage())
    pack = weakref.ref(module._packs._entries[1].packed)
    assert module._packs.short is not None
    module.weight_hh_l1 = torch.nn.Parameter(other(module.weight_hh_l1.detach()))
    assert weight() is None
    assert module._packs.short is None
    assert pack() is None
    assert list(module._packs._entries) == [0]
    module.double()
    assert not module._packs._entries


@pytest.mark.parametrize("steps", [0, 1, 3, 20])
@pytest.mark.parametrize(("kind", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_other_strides_at_the_same_address_are_seen(kind: str, gates: int, steps: int) -> None:
    """A transposed weight has the address, version and sizes that it had before."""
    module = getattr(rnnkern.nn, kind if steps else f"{kind}Cell")(gates * H, H).eval()
    x = torch.randn(steps, B, gates * H) if steps else torch.randn(B, gates * H)
    before = warm(module, x)
    name, weight = first(module)
    setattr(module, name, torch.nn.Parameter(weight.t()))
    assert_seen(module, x, before)
    assert_seen(module, x, before)
