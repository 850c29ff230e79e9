"""What programs do to the weights of a torch module, done to ours: reassigned, tied, computed, given for one call."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.twins import B, H, I, T, assert_same, assert_same_training, input_of, kinds, layers, pair, weight_name


@kinds
def test_weights_deleted_and_reassigned(kind: str) -> None:
    modules = pair(kind)
    for module in modules:
        for name in [name for name, _ in module.named_parameters()]:
            value = getattr(module, name).detach() * 2
            delattr(module, name)
            setattr(module, name, value.requires_grad_())
    ours, peer = modules
    assert not list(ours.parameters())
    x = input_of(kind)
    assert_same(ours(x), peer(x))
    gradients = []
    for module in modules:
        tree_leaves(module(x))[0].sum().backward()
        gradients.append(getattr(module, weight_name(kind)).grad)
    torch.testing.assert_close(*gradients)
    for module in modules:
        for part in ("ih", "hh"):
            name = weight_name(kind, part)
            value = getattr(module, name).detach().clone()
            delattr(module, name)
            setattr(module, name, torch.nn.Parameter(value))
    assert_same(ours(x), peer(x))


def test_a_missing_weight_is_named() -> None:
    for kind in ("GRU", "GRUCell"):
        module, _ = pair(kind)
        delattr(module, weight_name(kind))
        with pytest.raises(AttributeError, match=weight_name(kind)):
            module(input_of(kind))


WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_ih_l1_reverse", "bias_hh_l1")


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
@layers
def test_a_weight_of_none_is_refused_as_torch_refuses_it(kind: str, name: str, warm: bool) -> None:
    deep = not name.endswith("l0")
    modules = pair(kind, num_layers=2 if deep else 1, bidirectional=deep)
    for module in modules:
        module.train(not warm)
        with torch.set_grad_enabled(not warm):
            for _ in range(4 * warm):
                module(input_of(kind))
            setattr(module, name, None)
            theirs = AttributeError if name == "weight_ih_l0" else TypeError
            with pytest.raises(theirs, match=name if module is modules[0] else None):
                module(input_of(kind))


@pytest.mark.parametrize(
    "make",
    [
        lambda: rnnkern.nn.GRU(I, H, checkpoint_every=2),
        lambda: rnnkern.nn.GRU(I, H, reset_after=False),
        lambda: rnnkern.nn.LSTM(I, H, proj_size=2),
        lambda: rnnkern.nn.LSTM(I, H, learn_initial_state=True),
        lambda: rnnkern.nn.QuantizedGRU(I, H),
        lambda: rnnkern.nn.GRU(I, H, bias=False),
    ],
    ids=["checkpoint_every", "reset_after", "proj_size", "learn_initial_state", "int8", "no bias"],
)
def test_a_weight_of_none_is_named_whatever_runs(make: Callable[[], Any]) -> None:
    for name in [name for names in make()._all_weights for name in names]:
        module = make()
        setattr(module, name, None)
        with pytest.raises((AttributeError, TypeError), match=f"{name} must be a tensor, got NoneType"):
            module(torch.zeros(T, B, I))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_weights_of_none_in_a_cell(kind: str) -> None:
    x = input_of(kind)
    for name in ("weight_ih", "weight_hh"):
        modules = pair(kind)
        for module in modules:
            setattr(module, name, None)
            with pytest.raises(TypeError, match=name if module is modules[0] else None):
                module(x)
    for names in (("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")):  # torch's cells run without
        modules = pair(kind)
        for module in modules:
            module.eval()
            for name in names:
                setattr(module, name, None)
        with torch.no_grad():
            for _ in range(4):
                assert_same(*[module(x) for module in modules])
        assert_same(*[module(x) for module in modules])


@layers
def test_tied_weights(kind: str) -> None:
    modules = pair(kind, H, H, num_layers=2, bidirectional=True)
    for module in modules:
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.bias_hh_l1_reverse = module.bias_ih_l1
    ours, peer = modules
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in peer.named_parameters()]
    assert_same_training(ours, peer, torch.randn(T, B, H))
    clone = copy.deepcopy(ours)
    assert clone.weight_hh_l1 is clone.weight_hh_l0
    assert len(list(clone.parameters())) == len(list(peer.parameters()))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_tied_weights_of_a_cell(kind: str) -> None:
    modules = pair(kind, H, H)
    for module in modules:
        module.weight_ih = module.weight_hh
        module.bias_ih = module.bias_hh
    assert_same_training(*modules, torch.randn(B, H))


def second_derivative(module: torch.nn.Module, x: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(tree_leaves(module(x))[0].pow(2).sum(), module.weight_hh_l0, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), module.weight_hh_l0)[0]


@layers
def test_second_derivatives_of_tied_weights(kind: str) -> None:
    modules = pair(kind, H, H, num_layers=2, dtype=torch.float64)
    for module in modules:
        module.weight_hh_l1 = module.weight_ih_l0 = module.weight_hh_l0
    x = torch.randn(T, B, H, dtype=torch.float64)
    torch.testing.assert_close(*(second_derivative(module, x) for module in modules))


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def weight_norm_by_hook(module: torch.nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, name)


REPARAMETRIZATIONS: dict[str, Callable[[torch.nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by hook": weight_norm_by_hook,
    # Until it converges: torch's layers, unlike ours, evaluate a parametrization several times in a call.
    "spectral_norm": lambda module, name: parametrizations.spectral_norm(module, name, n_power_iterations=100),
    "spectral_norm by hook": torch.nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrize": lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}


@pytest.mark.parametrize("what", REPARAMETRIZATIONS)
@kinds
def test_reparametrized_weights(kind: str, what: str) -> None:
    modules = pair(kind)
    for module in modules:
        for part in ("ih", "hh"):
            torch.manual_seed(1)  # of the vectors of spectral_norm
            REPARAMETRIZATIONS[what](module, weight_name(kind, part))
    ours, peer = modules
    assert_same_training(ours, peer, input_of(kind))
    assert ours.state_dict().keys() == peer.state_dict().keys()
    peer.load_state_dict(ours.state_dict())
    if parametrize.is_parametrized(ours):
        for module in modules:
            parametrize.remove_parametrizations(module, weight_name(kind))
            assert isinstance(module._parameters[weight_name(kind)], torch.nn.Parameter)
        x = input_of(kind)
        assert_same(ours(x), peer(x))


@kinds
def test_functional_call(kind: str) -> None:
    ours, peer = pair(kind)
    x = input_of(kind)
    state = {name: value.detach() * 0.5 for name, value in ours.named_parameters()}
    some = {weight_name(kind): state[weight_name(kind)]}
    for given in (state, some):
        assert_same(functional_call(ours, given, (x,)), functional_call(peer, given, (x,)))
    ours.eval()
    with torch.no_grad():
        for _ in range(3):
            before = tree_leaves(ours(x))[0]
        assert_same(functional_call(ours, state, (x,)), functional_call(peer, state, (x,)))
        assert torch.equal(tree_leaves(ours(x))[0], before)  # and its own weights are back


@kinds
def test_an_ensemble_under_vmap(kind: str) -> None:
    modules = [getattr(rnnkern.nn, kind)(I, H) for _ in range(3)]
    x = input_of(kind)
    parameters, buffers = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    results = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for i, module in enumerate(modules):
        for a, b in zip(tree_leaves(results), tree_leaves(module(x)), strict=True):
            torch.testing.assert_close(a[i], b)
