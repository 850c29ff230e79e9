"""What programs do with a torch module besides calling it, done to ours: hooks, tied weights, sharing, old pickles."""

import collections
import copy
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import needs_kernels

T, B, I, H = 4, 3, 5, 6
LAYERS = ["RNN", "LSTM", "GRU"]
KINDS = [*LAYERS, "RNNCell", "LSTMCell", "GRUCell"]
kinds = pytest.mark.parametrize("kind", KINDS)
layers = pytest.mark.parametrize("kind", LAYERS)


def pair(kind: str, *args: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, built from the same seed."""
    modules = []
    for library in (rnnkern.nn, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(library, kind)(*(args or (I, H)), **options))
    return modules[0], modules[1]


def input_of(kind: str, **options: Any) -> Tensor:
    return torch.randn(B, I, **options) if kind.endswith("Cell") else torch.randn(T, B, I, **options)


def weight_name(kind: str, part: str = "hh") -> str:
    return f"weight_{part}" if kind.endswith("Cell") else f"weight_{part}_l0"


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def assert_same_training(ours: torch.nn.Module, peer: torch.nn.Module, x: Tensor) -> None:
    """The same outputs, and gradients of every parameter."""
    gradients = []
    for module in (ours, peer):
        module.zero_grad()
        outputs = tree_leaves(module(x))
        sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert_same(ours(x), peer(x))
    ours.eval()
    peer.eval()
    with torch.no_grad():
        for _ in range(3):
            assert_same(ours(x), peer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@kinds
def test_a_state_left_out_has_dtype_and_device_of_the_input(kind: str, dtype: torch.dtype) -> None:
    for device in ("cpu", "meta"):
        ours, peer = pair(kind, device=device, dtype=dtype)
        x = input_of(kind, device=device, dtype=dtype)
        for a, b in zip(tree_leaves(ours(x)), tree_leaves(peer(x)), strict=True):
            assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@layers
def test_empty_batch(kind: str, bidirectional: bool, training: bool) -> None:
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": True}
    ours, peer = (m.train(training) for m in pair(kind, **options))
    x = torch.ones(0, T, I)
    assert_same(ours(x), peer(x))
    results = []
    for module in (ours, peer):
        sum(leaf.sum() for leaf in tree_leaves(module(x))).backward()
        results.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*results)
    with torch.no_grad():
        for _ in range(3):
            assert_same(ours(x), peer(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_input_size_of_zero(kind: str) -> None:
    ours, peer = pair(kind, 0, H)
    assert_same_training(ours, peer, torch.ones(B, 0))
    for library in (rnnkern.nn, torch.nn):
        with pytest.raises(ValueError, match="input_size must be greater than zero"):
            getattr(library, kind.removesuffix("Cell"))(0, H)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@layers
def test_input_without_features(kind: str) -> None:
    """The constructor refuses it, as torch's does; the calculation does not."""
    modules = pair(kind)
    for module in modules:
        module.input_size = 0
        module.weight_ih_l0 = torch.nn.Parameter(module.weight_ih_l0.detach()[:, :0].clone())
    assert_same_training(*modules, torch.ones(T, B, 0))


@pytest.mark.parametrize("make", [list, tuple, collections.namedtuple("State", "h c")._make])
def test_the_states_of_an_lstm_may_be_any_pair(make: Callable[..., Any]) -> None:
    for kind in ("LSTM", "LSTMCell"):
        ours, peer = pair(kind)
        x = input_of(kind)
        shape = (1, B, H) if kind == "LSTM" else (B, H)
        hx = make([torch.randn(shape), torch.randn(shape)])
        assert_same(ours(x, hx), peer(x, hx))
        ours.eval()
        with torch.no_grad():
            for _ in range(3):
                assert_same(ours(x[:1] if kind == "LSTM" else x, hx), peer(x[:1] if kind == "LSTM" else x, hx))


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps", [1, T])
@layers
def test_outputs_share_no_memory(kind: str, steps: int, batch_first: bool, grad_mode: bool) -> None:
    module, _ = pair(kind, batch_first=batch_first)
    module.train(grad_mode)
    x = torch.randn(B, steps, I) if batch_first else torch.randn(steps, B, I)
    h = torch.randn(1, B, H)
    hx = (h, torch.randn(1, B, H)) if kind == "LSTM" else h
    kept = [t.clone() for t in (x, *tree_leaves(hx))]
    with torch.set_grad_enabled(grad_mode):
        for lengths in (None, torch.zeros(B, dtype=torch.long)):
            for _ in range(3):
                outputs = tree_leaves(module(x, hx, lengths=lengths))
                storages = [t.untyped_storage().data_ptr() for t in (x, *tree_leaves(hx), *outputs)]
                assert len(set(storages)) == len(storages)
    assert all(torch.equal(a, b) for a, b in zip((x, *tree_leaves(hx)), kept))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_state_may_be_written_over_between_steps(kind: str) -> None:
    """As `h *= mask` does at the end of an episode: gradients are those of the state as it was."""
    results = []
    for in_place in (True, False):
        module, _ = pair(kind)
        mask = torch.tensor([[1.0], [0.0], [1.0]])
        state, x = None, torch.randn(2, B, I, generator=torch.Generator().manual_seed(3)).requires_grad_()
        for frame in x:
            state = module(frame, state)
            if in_place:
                for s in tree_leaves(state):
                    s.mul_(mask)
            else:
                state = tuple(s * mask for s in state) if kind == "LSTMCell" else state * mask
        sum(s.pow(2).sum() for s in tree_leaves(state)).backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


@layers
def test_what_backward_reads_cannot_be_changed_unseen(kind: str) -> None:
    """The output, as in torch's LSTM and cuDNN; final states are free."""
    module, _ = pair(kind)
    x = input_of(kind)
    output, state = module(x)
    (state[0] if kind == "LSTM" else state).mul_(2)
    output.sum().backward()
    output, _ = module(x)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


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


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_transforms_of_cells(kind: str) -> None:
    module, _ = pair(kind, dtype=torch.float64)
    x = input_of(kind, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(leaf.pow(2).sum() for leaf in tree_leaves(functional_call(module, parameters, (x,))))

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for b in range(B):
        module.zero_grad()
        loss(dict(module.named_parameters()), x[b]).backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(per_sample[name][b], p.grad)
    direction = torch.randn_like(x)
    _, tangent = jvp(lambda x: loss(parameters, x), (x,), (direction,))
    torch.testing.assert_close(tangent, (grad(loss, argnums=1)(parameters, x) * direction).sum())


@kinds
def test_jacobians(kind: str) -> None:
    """By torch.func, and by batches of cotangents through a graph that was recorded without it."""
    ours, peer = pair(kind, dtype=torch.float64)
    x = input_of(kind, dtype=torch.float64)
    results = [jacrev(lambda x, m=m: tree_leaves(m(x))[0])(x) for m in (ours, peer)]
    torch.testing.assert_close(*results)
    for vectorize in (False, True):
        jacobian = torch.autograd.functional.jacobian(lambda x: tree_leaves(ours(x))[0], x, vectorize=vectorize)
        torch.testing.assert_close(jacobian, results[1])


@pytest.mark.parametrize("cold", [True, False])
@kinds
def test_hooks(kind: str, cold: bool) -> None:
    """Forward hooks with and without keywords, global ones, and hooks of the backward pass."""
    modules = pair(kind)
    x = input_of(kind)[:1]
    logs: list[list[Any]] = []
    for module in modules:
        module.train(cold)
        log: list[Any] = []
        with torch.set_grad_enabled(cold):
            for _ in range(3):
                module(x)
            handles = [
                module.register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:])),
                module.register_forward_hook(lambda m, args, out: log.append(("out", out)) or out),  # noqa: B023
                module.register_forward_hook(
                    lambda m, args, kwargs, out: log.append(("kwargs", sorted(kwargs))),  # noqa: B023
                    with_kwargs=True,
                ),
                torch.nn.modules.module.register_module_forward_hook(
                    lambda m, args, out: log.append(("global", type(m).__name__))  # noqa: B023
                ),
            ]
            if cold:
                handles.append(
                    module.register_full_backward_hook(lambda m, gi, go: log.append(("gradients", gi, go)))  # noqa: B023
                )
            given = x.clone().requires_grad_(cold)
            out = module(given, hx=None)
            if cold:
                tree_leaves(out)[0].sum().backward()
            for handle in handles:
                handle.remove()
        log.append(("grad", given.grad))
        logs.append(log)
    for a, b in zip(*logs, strict=True):
        assert a[0] == b[0]
        for u, v in zip(tree_leaves(a[1:]), tree_leaves(b[1:]), strict=True):
            torch.testing.assert_close(u, v) if isinstance(u, Tensor) else None
            assert isinstance(u, Tensor) or u == v


@kinds
def test_hooks_of_state_dicts(kind: str) -> None:
    modules = pair(kind)
    states = []
    for module in modules:
        seen: list[str] = []
        module.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append(f"pre {prefix}"))  # noqa: B023
        module.register_state_dict_post_hook(
            lambda m, state, prefix, meta: state.__setitem__(prefix + "extra", torch.ones(1))
        )
        module.register_load_state_dict_pre_hook(lambda m, state, prefix, *rest: state.pop(prefix + "extra"))
        module.register_load_state_dict_post_hook(lambda m, keys: seen.append(str(keys)))  # noqa: B023
        model = torch.nn.Sequential(module)
        state = {name: value + 1 for name, value in model.state_dict().items()}
        assert not any(model.load_state_dict(state))
        states.append((seen, state, dict(model.state_dict())))
    assert states[0][0] == states[1][0] != []
    torch.testing.assert_close(states[0][1:], states[1][1:])


@layers
def test_old_pickles(kind: str) -> None:
    """Modules saved before torch 1.8 have no proj_size, older ones tensors where names of weights are."""
    module, _ = pair(kind, num_layers=2)
    x = input_of(kind)
    expected = module(x)
    state = module.__getstate__()
    assert "_packs" not in state
    for change in (lambda s: s.pop("proj_size"), lambda s: s.update(all_weights=s.pop("_all_weights"))):
        old = dict(state)
        change(old)
        other = type(module).__new__(type(module))
        other.__setstate__(pickle.loads(pickle.dumps(old)))
        assert other.proj_size == 0
        assert_same(other(x), expected)


@layers
def test_flat_weights(kind: str) -> None:
    """`_flat_weights`, `all_weights` and `flatten_parameters` are there for programs that reach for them."""
    ours, peer = pair(kind, num_layers=2, bidirectional=True)
    x = input_of(kind)
    expected = ours(x)

    def check(module: torch.nn.Module) -> None:
        assert module._flat_weights_names == peer._flat_weights_names
        assert [id(w) for w in module._flat_weights] == [id(p) for p in module.parameters()]
        assert [[id(w) for w in ws] for ws in module.all_weights] == [
            [id(getattr(module, name)) for name in names] for names in peer._all_weights
        ]
        assert module.flatten_parameters() is None

    check(ours)
    assert_same(ours(x), expected)
    check(copy.deepcopy(ours))
    check(pickle.loads(pickle.dumps(ours)))
    ours.weight_hh_l1 = torch.nn.Parameter(ours.weight_hh_l1.detach() + 1)
    check(ours)
    ours.double().float()
    check(ours)
    ours.load_state_dict(peer.state_dict(), assign=True)
    check(ours)
    assert_same(ours(x), expected)


@kinds
def test_replicas_of_data_parallel(kind: str) -> None:
    """What `torch.nn.parallel.replicate` does to a module, which itself needs several GPUs."""
    module, _ = pair(kind)
    x = input_of(kind)
    expected = tree_leaves(module(x))[0]
    expected.sum().backward()
    gradient = getattr(module, weight_name(kind)).grad.clone()
    module.zero_grad()
    total = 0
    for rows in (slice(0, 1), slice(1, B)):
        replica = module._replicate_for_data_parallel()
        replica._former_parameters = {}
        for name, parameter in module._parameters.items():
            copied = parameter * 1  # a function of the original, as Broadcast makes
            setattr(replica, name, copied)
            replica._former_parameters[name] = copied
        assert not list(replica.parameters())
        part = x[rows] if kind.endswith("Cell") else x[:, rows]
        output = tree_leaves(replica(part))[0]
        torch.testing.assert_close(output, expected[rows] if kind.endswith("Cell") else expected[:, rows])
        total = total + output.sum()
    total.backward()
    torch.testing.assert_close(getattr(module, weight_name(kind)).grad, gradient)


def double_weights(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)


def evaluate(module: torch.nn.Module, x: Tensor, results: Any) -> None:
    with torch.no_grad():
        results.put([tree_leaves(module(x))[0].numpy() for _ in range(3)])


@needs_kernels
@kinds
def test_weights_in_shared_memory(kind: str) -> None:
    """Another process writes them: the next call sees it, though no version counts it here."""
    module, peer = (m.eval().share_memory() for m in pair(kind))
    assert all(p.is_shared() for p in module.parameters())
    x = input_of(kind)
    with torch.no_grad():
        for _ in range(3):
            before = module(x)
        assert_same(before, peer(x))
        context = multiprocessing.get_context("fork")
        for changed in (module, peer):
            process = context.Process(target=double_weights, args=(changed,))
            process.start()
            process.join(60)
            assert process.exitcode == 0
        assert_same(module(x), peer(x))
        assert not torch.equal(tree_leaves(module(x))[0], tree_leaves(before)[0])


@needs_kernels
@kinds
def test_a_forked_child_computes_the_same(kind: str) -> None:
    module, _ = pair(kind)
    module.eval()
    x = input_of(kind)
    with torch.no_grad():
        for _ in range(3):
            expected = tree_leaves(module(x))[0]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=evaluate, args=(module, x, results))
    process.start()
    got = results.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    assert all(torch.equal(torch.from_numpy(value), expected) for value in got)
