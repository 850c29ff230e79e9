"""Inputs, states and outputs at the edges, and derivatives by torch.func, where ours behave as torch's modules do."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.twins import B, H, I, T, assert_same, assert_same_training, input_of, kinds, layers, pair


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
