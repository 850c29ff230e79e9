"""What programs do with a torch module besides calling it, done to ours: hooks, sharing, old pickles, forks."""

import copy
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers import needs_kernels
from tests.twins import B, assert_same, input_of, kinds, layers, pair, weight_name

SECONDS = 300  # for a child, on a busy machine


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
            if isinstance(u, Tensor):
                torch.testing.assert_close(u, v)
            else:
                assert u == v


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
            process.join(SECONDS)
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
    got = results.get(timeout=SECONDS)
    process.join(SECONDS)
    assert process.exitcode == 0
    assert all(torch.equal(torch.from_numpy(value), expected) for value in got)
