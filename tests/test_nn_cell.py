"""RNNCell, LSTMCell and GRUCell in the place of torch's."""

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import BACKENDS

KINDS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})]
B, I, H = 3, 4, 5


def pair(kind: str, **options: Any) -> tuple[torch.nn.RNNCellBase, torch.nn.RNNCellBase]:
    modules = []
    for library in (rnnkern.nn, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(library, kind)(I, H, **options))
    return modules[0], modules[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "more"), KINDS, ids=lambda v: v if isinstance(v, str) else "-".join(v.values()))
def test_same_as_torch(kind: str, more: dict[str, str], bias: bool, backend: str) -> None:
    ours, peer = pair(kind, bias=bias, **more)
    assert repr(ours) == repr(peer)
    assert isinstance(ours, torch.nn.RNNCellBase)
    ours.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(ours.state_dict(), strict=True)
    for shape in ((B,), ()):
        states = [torch.randn(*shape, H) for _ in range(2 if kind == "LSTMCell" else 1)]
        for given in (None, states):
            results = []
            for module in (ours, peer):
                module.zero_grad()
                x = torch.randn(*shape, I, generator=torch.Generator().manual_seed(2)).requires_grad_()
                hx = None if given is None else [s.clone().requires_grad_() for s in given]
                with rnnkern.backend(backend):
                    out = module(x, None if hx is None else hx[0] if len(hx) == 1 else tuple(hx))
                leaves = tree_leaves(out)
                sum((leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in leaves).backward()
                results.append([*leaves, x.grad, *(s.grad for s in hx or ()), *(p.grad for p in module.parameters())])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "more"), KINDS, ids=lambda v: v if isinstance(v, str) else "-".join(v.values()))
def test_same_weights_from_the_same_seed(kind: str, more: dict[str, str]) -> None:
    ours, peer = pair(kind, **more)
    for (name, value), (peer_name, peer_value) in zip(
        ours.state_dict().items(), peer.state_dict().items(), strict=True
    ):
        assert name == peer_name
        assert torch.equal(value, peer_value)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_steps_equal_the_layer_bit_for_bit(kind: str) -> None:
    layer, cell = getattr(rnnkern.nn, kind)(I, H), getattr(rnnkern.nn, f"{kind}Cell")(I, H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.randn(6, B, I)
    with torch.no_grad():
        expected, state = layer(x)[0], None
        for t in range(6):
            state = cell(x[t], state)
            assert torch.equal(state[0] if kind == "LSTM" else state, expected[t])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    ours, peer = pair(kind, dtype=dtype)
    x = torch.randn(B, I, dtype=dtype)
    for a, b in zip(tree_leaves(ours(x)), tree_leaves(peer(x)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_copies_leave_the_cache_behind(kind: str) -> None:
    module = pair(kind)[0].eval()
    x = torch.randn(1, I)
    with torch.no_grad():
        for _ in range(3):
            expected = module(x)
        assert "cpu" not in BACKENDS or module._packs._entries
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert not other._packs._entries
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(other(x)), tree_leaves(expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_states_can_be_detached_in_place(kind: str, wanted: bool, dtype: torch.dtype) -> None:
    module, state = pair(kind, dtype=dtype)[0], None
    with torch.set_grad_enabled(wanted):
        for _ in range(3):
            state = module(torch.randn(B, I, dtype=dtype), state)
            for tensor in tree_leaves(state):
                assert not tensor._is_view()  # as in torch
                tensor.detach_()


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_empty_batch_and_meta(kind: str) -> None:
    ours, peer = pair(kind)
    for a, b in zip(tree_leaves(ours(torch.ones(0, I))), tree_leaves(peer(torch.ones(0, I))), strict=True):
        assert a.shape == b.shape
    meta = getattr(rnnkern.nn, kind)(I, H, device="meta")
    assert all(leaf.shape == (B, H) for leaf in tree_leaves(meta(torch.ones(B, I, device="meta"))))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_hidden_size_of_zero(kind: str, rows: int) -> None:
    ours, peer = getattr(rnnkern.nn, kind)(I, 0), getattr(torch.nn, kind)(I, 0)
    results = [tree_leaves(module(torch.ones(rows, I))) for module in (ours, peer)]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape == (rows, 0)
        a.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert tree_leaves(ours.eval()(torch.ones(rows, I)))[0].shape == (rows, 0)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_compiled_without_a_graph_break(kind: str) -> None:
    module, _ = pair(kind)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, I)
    torch.testing.assert_close(run(x), module(x), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(run(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_gradients_past_the_dispatcher_are_those_of_the_operator(kind: str, dtype: torch.dtype) -> None:
    module = pair(kind, dtype=dtype)[0]
    states = [torch.randn(B, H, dtype=dtype) for _ in range(2 if kind == "LSTMCell" else 1)]
    x = torch.randn(B, I, dtype=dtype)
    results = []
    for forced in (None, *BACKENDS[1:]):
        for wanted in ("all", "input", "weights"):
            leaves = [t.clone().requires_grad_(wanted != "weights") for t in (x, *states)]
            module.requires_grad_(wanted != "input")
            with contextlib.nullcontext() if forced is None else rnnkern.backend(forced):
                out = tree_leaves(module(leaves[0], leaves[1] if len(states) == 1 else tuple(leaves[1:])))
                sum(o.float().sum() for o in out).backward()  # a gradient that is not contiguous
            grads = [t.grad for t in (*leaves, *module.parameters())]
            module.zero_grad()
            results.append([*(o.detach() for o in out), *grads])
    for alone, operator in zip(results[:3], results[3:]):
        for a, b in zip(alone, operator, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_derivatives_of_any_order(kind: str) -> None:
    module = pair(kind, dtype=torch.float64)[0]
    states = [torch.randn(B, H, dtype=torch.float64, requires_grad=True) for _ in range(2 if kind == "LSTMCell" else 1)]
    x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tree_leaves(module(x, states[0] if len(states) == 1 else states)))

    assert torch.autograd.gradcheck(run, (x, *states))
    assert torch.autograd.gradgradcheck(run, (x, *states))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])  # torch's RNNCell refuses
def test_the_new_state_may_be_written_over(kind: str) -> None:
    """As torch's may, `h *= 1 - done` for example: backward needs what a step read, not what it gave."""
    found = []
    for cell in pair(kind):
        x = torch.linspace(-1, 1, B * I).view(B, I).requires_grad_()
        for state in tree_leaves(cell(x)):
            state.mul_(0.5)
            state.sum().backward(retain_graph=True)
        found.append([x.grad, *(p.grad for p in cell.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_sparse_input(kind: str, layout: torch.layout) -> None:
    cell, peer = pair(kind)
    x = torch.randn(3, cell.input_size).relu()
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            for _ in range(3):  # also where dense calls were packed before
                cell.eval()(x)
            actual, expected = (tree_leaves(module(x.to_sparse(layout=layout))) for module in (cell, peer))
        torch.testing.assert_close(actual, expected)
