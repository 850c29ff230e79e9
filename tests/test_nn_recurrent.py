"""RNN, LSTM and GRU in the place of torch's: the same weights from a seed, outputs, gradients, checkpoints."""

import copy
import inspect
import io
import itertools
import pickle
import typing
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

import rnnkern
from tests.helpers import BACKENDS

KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("LSTM", {"proj_size": 3}), ("GRU", {})]
T, B, I, H = 6, 3, 4, 5
FLAGS = ("bidirectional", "bias", "batch_first")


def pair(kind: str, *, seed: int = 0, **options: Any) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    """Ours and torch's, built from the same seed."""
    modules = []
    for library in (rnnkern.nn, torch.nn):
        torch.manual_seed(seed)
        modules.append(getattr(library, kind)(I, H, **options))
    return modules[0], modules[1]


def initial_state(module: torch.nn.RNNBase, batch: int | None, dtype: torch.dtype = torch.float32) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows,) if batch is None else (rows, batch)
    h = torch.randn(*shape, module.proj_size or H, dtype=dtype)
    return (h, torch.randn(*shape, H, dtype=dtype)) if module.mode == "LSTM" else h


def assert_equal_runs(ours: torch.nn.Module, peer: torch.nn.Module, x: Any, hx: Any = None) -> None:
    """The same outputs in shape, stride and value, and the same gradients of the input, hx and every parameter."""
    results = []
    for module in (ours, peer):
        module.zero_grad()
        data = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
        given = x._replace(data=data) if isinstance(x, PackedSequence) else data
        state = None if hx is None else torch.utils._pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), hx)
        torch.manual_seed(1)  # for dropout
        out = module(given, state)
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        floats = [leaf for leaf in leaves if leaf.is_floating_point()]
        sum((leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in floats).backward()
        gradients = [
            data.grad,
            *(leaf.grad for leaf in ([] if state is None else tree_leaves(state))),
            *(p.grad for p in module.parameters()),
        ]
        results.append((out, leaves, gradients))
    (out, leaves, gradients), (peer_out, peer_leaves, peer_gradients) = results
    assert type(out[0]) is type(peer_out[0])
    for a, b in zip(leaves, peer_leaves, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, peer_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags", list(itertools.product([False, True], repeat=3)), ids=lambda f: "".join("ft"[v] for v in f)
)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    ("kind", "more"), KINDS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_same_as_torch(kind: str, more: dict[str, Any], num_layers: int, flags: tuple[bool, bool, bool]) -> None:
    ours, peer = pair(kind, num_layers=num_layers, **dict(zip(FLAGS, flags)), **more)
    assert repr(ours) == repr(peer)
    assert isinstance(ours, torch.nn.RNNBase)
    for (name, value), (peer_name, peer_value) in zip(
        ours.state_dict().items(), peer.state_dict().items(), strict=True
    ):
        assert name == peer_name
        assert torch.equal(value, peer_value)
    x = torch.randn(T, B, I)
    batch = T if ours.batch_first else B
    assert_equal_runs(ours, peer, x)
    assert_equal_runs(ours, peer, x, initial_state(ours, batch))
    assert_equal_runs(ours, peer, x[:, 0])
    assert_equal_runs(ours, peer, x[:, 0], initial_state(ours, None))
    packed = pack_padded_sequence(x, torch.tensor([2, T, 4]), enforce_sorted=False)
    assert_equal_runs(ours, peer, packed)
    assert_equal_runs(ours, peer, packed, initial_state(ours, B))
    assert_equal_runs(ours, peer, pack_padded_sequence(x, torch.tensor([T, 1, 1])), initial_state(ours, B))
    peer.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(peer.state_dict(), strict=True)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_dropout_draws_as_torch_does(kind: str) -> None:
    ours, peer = pair(kind, num_layers=3, dropout=0.4, bidirectional=True)
    x = torch.randn(T, B, I)
    assert_equal_runs(ours, peer, x)
    assert_equal_runs(ours, peer, pack_padded_sequence(x, torch.tensor([2, T, 4]), enforce_sorted=False))
    assert_equal_runs(ours.eval(), peer.eval(), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    ours, peer = pair(kind, num_layers=2, dtype=dtype)
    x, hx = torch.randn(T, B, I, dtype=dtype), initial_state(ours, B, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for a, b in zip(tree_leaves(ours(x, hx)), tree_leaves(peer(x, hx)), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    sum(leaf.sum() for leaf in tree_leaves(ours(x, hx))).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_lengths_equal_a_packed_sequence(kind: str, batch_first: bool) -> None:
    ours, _ = pair(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, lengths = torch.randn(T, B, I), torch.tensor([2, T, 4], dtype=torch.int32)
    hx = initial_state(ours, B)
    given = x.transpose(0, 1) if batch_first else x
    packed = pack_padded_sequence(given, lengths, batch_first=batch_first, enforce_sorted=False)
    expected, expected_state = ours(packed, hx)
    output, state = ours(given, hx, lengths=lengths)
    padded, _ = pad_packed_sequence(expected, batch_first=batch_first)
    torch.testing.assert_close(output, padded, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("proj_size", [0, 2])
def test_lengths_of_zero_and_resets_through_the_module(backend: str, proj_size: int) -> None:
    lstm = rnnkern.nn.LSTM(I, H, 2, bidirectional=True, batch_first=True, proj_size=proj_size, dtype=torch.float64)
    x = torch.randn(1, T, I, dtype=torch.float64)
    resets = torch.zeros(1, T, dtype=torch.bool)
    resets[0, [0, 4]] = True
    with rnnkern.backend("eager" if proj_size else backend):
        output, _ = lstm(x.expand(2, T, I), lengths=torch.tensor([0, T]), resets=resets.expand(2, T))
        first, second = lstm(x[:, :4])[0], lstm(x[:, 4:])[0]
    assert not output[0].any()
    # The reverse direction of the first layer feeds the second: the episodes stay apart only if no direction leaks.
    torch.testing.assert_close(output[1:], torch.cat([first, second], 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "options"), [("RNN", {}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 3})])
def test_every_state(kind: str, options: dict[str, Any], batch_first: bool) -> None:
    """What belongs to step t is the state that the call on the steps up to t ends in, and continues as hx."""
    module = getattr(rnnkern.nn, kind)(I, H, 2, batch_first=batch_first, **options)
    x = torch.randn(T, B, I)
    given = x.transpose(0, 1) if batch_first else x
    time = 1 if batch_first else 0
    output, final, states = module(given, return_sequence_states=True)
    torch.testing.assert_close(output, module(given)[0], rtol=0, atol=0)
    assert isinstance(states, tuple) == (kind == "LSTM")
    at = [tree_map(lambda s, t=t: s[t], states) for t in range(T)]
    torch.testing.assert_close(at[-1], final, rtol=0, atol=0)
    for t in range(T):
        torch.testing.assert_close(at[t], module(given.narrow(time, 0, t + 1))[1])
    rest, _ = module(given.narrow(time, 2, T - 2), at[1])
    torch.testing.assert_close(rest, output.narrow(time, 2, T - 2))

    packed = pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False)
    _, final, states_packed = module(packed, return_sequence_states=True)
    for end, every, padded in zip(tree_leaves(final), _sequences(states_packed), _sequences(states)):
        unpacked, lengths = pad_packed_sequence(every)
        assert lengths.tolist() == [2, T]
        torch.testing.assert_close(unpacked[[1, T - 1], [0, 1]], end.transpose(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(unpacked[:, 1], padded[:, :, 1])
    one = module(x[:, 0], return_sequence_states=True)[2]
    torch.testing.assert_close(one, tree_map(lambda s: s[:, :, 0], states))


def _sequences(states: Any) -> list[Any]:
    """h alone or (h, c) as a list; a PackedSequence is a tuple, too."""
    return [states] if isinstance(states, Tensor | PackedSequence) else list(states)


def test_every_state_of_both_directions() -> None:
    """The reverse one's at t is what it has made of the steps from t on."""
    lstm = rnnkern.nn.LSTM(I, H, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([T, 2, 0])
    output, (_, c_n), (h, c) = lstm(x, lengths=lengths, return_sequence_states=True)
    assert h.shape == c.shape == (T, 2, B, H)
    torch.testing.assert_close(h.transpose(1, 2).flatten(2), output, rtol=0, atol=0)
    assert not c[2:, :, 1].any()
    torch.testing.assert_close(c[[T - 1, 0], [0, 1], 0], c_n[:, 0])
    for t in range(T):
        torch.testing.assert_close(c[t, 1, 0], lstm(x[t:, 0])[1][1][1])


def test_hx_may_be_a_list() -> None:
    ours, peer = pair("LSTM")
    x, hx = torch.randn(T, B, I), initial_state(ours, B)
    torch.testing.assert_close(ours(x, list(hx))[0], peer(x, hx)[0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_backward_in_eval_mode_and_twice(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2).eval()
    x = torch.randn(T, B, I, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.dim() == 2)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_pickle_and_copies(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2).eval()
    x = torch.randn(1, B, I)
    with torch.no_grad():
        for _ in range(3):
            expected = module(x)[0]  # fills the cache of packed weights
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    if "cpu" in BACKENDS:
        assert module._packs._entries.keys() == {0, 1}
    for other in [*copies, copy.deepcopy(copies[0])]:
        assert not other._packs._entries
        assert torch.equal(other(x)[0], expected)
    assert not any("pack" in name for name in module.state_dict())
    with torch.no_grad():
        copies[0].weight_hh_l0.zero_()
        assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_weights_that_are_not_parameters(kind: str) -> None:
    ours, peer = pair(kind)
    x = torch.randn(T, B, I)
    state = {name: value.detach() * 0.5 for name, value in ours.state_dict().items()}
    for a, b in zip(*(tree_leaves(torch.func.functional_call(m, state, (x,))) for m in (ours, peer)), strict=True):
        torch.testing.assert_close(a, b)
    for module in (ours, peer):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(ours(x)[0], peer(x)[0])
    ours(x)[0].sum().backward()
    assert ours.parametrizations.weight_hh_l0.original0.grad is not None
    ours, peer = pair(kind)
    for module in (ours, peer):
        value = module.weight_ih_l0.detach() * 2
        del module.weight_ih_l0
        module.weight_ih_l0 = value
    torch.testing.assert_close(ours(x)[0], peer(x)[0])


def test_weights_changed_between_steps_are_seen() -> None:
    ours, peer = (module.eval() for module in pair("GRU", num_layers=2))
    x = torch.randn(1, 1, I)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (ours, peer)]
    for _ in range(3):
        for module, optimizer in zip((ours, peer), optimizers):
            with torch.no_grad():
                for _ in range(3):
                    module(x)
            optimizer.zero_grad()
            module(x)[0].sum().backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(ours(x)[0], peer(x)[0])
    other, other_peer = pair("GRU", num_layers=2, seed=9)
    ours.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], other_peer(x)[0])
        torch.testing.assert_close(ours.double()(x.double())[0], other_peer.double()(x.double())[0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_inference_mode(kind: str) -> None:
    ours, peer = pair(kind)
    x = torch.randn(1, 1, I)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(ours(x)[0], peer(x)[0])
        made_here = getattr(rnnkern.nn, kind)(I, H)  # its weights have no version
        for _ in range(3):
            torch.testing.assert_close(made_here(x)[0], made_here(x)[0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_meta_device(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2, bidirectional=True, device="meta")
    output, _ = module(torch.empty(T, B, I, device="meta"))
    assert output.device.type == "meta"
    assert output.shape == (T, B, 2 * H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_autocast_runs(kind: str, dtype: torch.dtype) -> None:
    module = getattr(rnnkern.nn, kind)(I, H)
    with torch.autocast("cpu", dtype):
        x = torch.nn.Linear(I, I)(torch.randn(T, B, I))
        assert x.dtype == dtype
        output, _ = module(x)
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_constructor_refuses_what_torch_refuses() -> None:
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("GRU", (I, H), {"proj_size": 2}),
        ("RNN", (I, H), {"proj_size": 2}),
        ("RNN", (I, H), {"nonlinearity": "sigmoid"}),
        ("RNN", (I, H, 1, "step"), {}),
        ("LSTM", (I, H), {"proj_size": H}),
        ("LSTM", (I, H), {"proj_size": -1}),
        ("LSTM", (I, 0), {}),
        ("LSTM", (0, H), {}),
        ("LSTM", (I, 2.5), {}),
        ("GRU", (I, H, 0), {}),
        ("GRU", (I, H), {"dropout": 1.5}),
        ("GRU", (I, H), {"dropout": True}),
        ("GRU", (I, H), {"bias": 1}),
        ("GRU", (I, H), {"batch_first": 1}),
        ("GRU", (I,), {}),
    ]
    for kind, args, options in cases:
        errors = []
        for library in (torch.nn, rnnkern.nn):
            with pytest.raises((ValueError, TypeError)) as caught:
                getattr(library, kind)(*args, **options)
            # Python names the function that misses an argument: ours is the class's own.
            errors.append((type(caught.value), str(caught.value).replace("RNNBase.__init__", f"{kind}.__init__")))
        assert errors[0] == errors[1], (kind, args, options)


def test_dropout_of_a_single_layer_warns_as_torch_does() -> None:
    messages = []
    for library in (torch.nn, rnnkern.nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            library.GRU(I, H, dropout=0.5)
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1] != []


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="Python 3.11 tells what torch's stubs document")
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_signature(kind: str) -> None:
    """torch documents names, order and defaults in overloads; its own signature is `*args, **kwargs`."""
    ours, peer = getattr(rnnkern.nn, kind), getattr(torch.nn, kind)
    documented = inspect.signature([*typing.get_overloads(peer.__init__), peer.__init__][0])
    parameters = list(inspect.signature(ours.__init__).parameters.values())
    positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in documented.parameters.values()]

    class Subclass(ours):
        pass

    assert inspect.signature(Subclass) == inspect.signature(ours)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_positional_arguments(kind: str) -> None:
    arguments = [
        I,
        H,
        2,
        *(["relu"] if kind == "RNN" else []),
        False,
        True,
        0.25,
        True,
        *([3] if kind == "LSTM" else []),
    ]
    ours, peer = (getattr(library, kind)(*arguments) for library in (rnnkern.nn, torch.nn))
    assert repr(ours) == repr(peer)
    assert ours.mode == peer.mode
    more = getattr(rnnkern.nn, kind)(*arguments, "meta", torch.float64)
    assert {(p.device.type, p.dtype) for p in more.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_packed_rows_without_steps(kind: str, backend: str) -> None:
    ours, peer = pair(kind, bidirectional=True)
    packed = PackedSequence(torch.zeros(0, I), torch.tensor([0, 0]))
    with rnnkern.backend(backend):
        for a, b in zip(tree_leaves(ours(packed)), tree_leaves(peer(packed)), strict=True):
            assert a is b is None or (a.shape == b.shape and a.dtype == b.dtype)
