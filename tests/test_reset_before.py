"""GRU and GRUCell with reset_after=False, against the formula written out."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern

T, B, I, H = 5, 3, 4, 6


def formula(gru: torch.nn.Module, x: Tensor, h: Tensor, suffix: str = "_l0") -> Tensor:
    """y [T, B, H] of one layer in one direction."""
    W, U = (getattr(gru, f"weight_{name}{suffix}").chunk(3) for name in ("ih", "hh"))
    b, b_ = (
        getattr(gru, f"bias_{name}{suffix}").chunk(3) if gru.bias else (torch.zeros(()),) * 3 for name in ("ih", "hh")
    )
    y = []
    for x_t in x:
        r, z = (torch.sigmoid(x_t @ W[i].T + b[i] + h @ U[i].T + b_[i]) for i in range(2))
        n = torch.tanh(x_t @ W[2].T + b[2] + (r * h) @ U[2].T + b_[2])
        h = (1 - z) * n + z * h
        y.append(h)
    return torch.stack(y)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_formula(bias: bool) -> None:
    gru = rnnkern.nn.GRU(I, H, bias=bias, bidirectional=True, reset_after=False, dtype=torch.float64)
    x, h = torch.randn(T, B, I, dtype=torch.float64), torch.randn(2, B, H, dtype=torch.float64)
    expected = torch.cat([formula(gru, x, h[0]), formula(gru, x.flip(0), h[1], "_l0_reverse").flip(0)], dim=-1)
    y, h_n = gru(x, h)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h_n, torch.stack([expected[-1, :, :H], expected[0, :, H:]]))
    other = rnnkern.nn.GRU(I, H, bias=bias, bidirectional=True, dtype=torch.float64)
    other.load_state_dict(gru.state_dict())
    assert not torch.allclose(other(x, h)[0], y)


def test_every_way_to_call_it() -> None:
    gru = rnnkern.nn.GRU(I, H, num_layers=2, batch_first=True, reset_after=False)
    x, lengths = torch.randn(B, T, I), torch.tensor([T, 0, 2])
    y, h_n = gru(x, lengths=lengths)
    for b, length in enumerate(lengths):
        if length:
            alone, last = gru(x[b, :length])
            torch.testing.assert_close(y[b, :length], alone)
            torch.testing.assert_close(h_n[:, b], last)
    _, packed_last = gru(pack_padded_sequence(x[::2], lengths[::2], batch_first=True))
    torch.testing.assert_close(packed_last, h_n[:, ::2])
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[:, 2] = True
    torch.testing.assert_close(gru(x, resets=resets)[0][:, 2:], gru(x[:, 2:])[0])
    gru.eval()
    with torch.no_grad():
        state, expected = None, gru(x)[0]
        for t in range(T):
            y, state = gru.step(x[:, t], state)
            torch.testing.assert_close(y, expected[:, t])


def test_cell_is_a_step_of_the_layer() -> None:
    gru, cell = rnnkern.nn.GRU(I, H, reset_after=False), rnnkern.nn.GRUCell(I, H, reset_after=False)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in gru.state_dict().items()})
    x, h = torch.randn(T, B, I), torch.zeros(B, H)
    expected = gru(x)[0]
    for train in (True, False):
        cell.train(train)
        with torch.set_grad_enabled(train):
            h = torch.zeros(B, H)
            for t in range(T):
                h = cell(x[t], h)
                torch.testing.assert_close(h, expected[t])


def test_derivatives_of_any_order() -> None:
    gru = rnnkern.nn.GRU(2, 3, reset_after=False, dtype=torch.float64)
    names, parameters = zip(*gru.named_parameters())
    x, h = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 2), (1, 2, 3)))

    def run(x: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(gru, dict(zip(names, values)), (x, h))[0]

    assert torch.autograd.gradcheck(run, (x, h, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, h, *parameters))


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_what_a_module_tells_of_itself(kind: str) -> None:
    module, peer = getattr(rnnkern.nn, kind)(I, H, reset_after=False), getattr(torch.nn, kind)(I, H)
    assert repr(module) == f"{kind}({I}, {H}, reset_after=False)"
    assert repr(getattr(rnnkern.nn, kind)(I, H)) == f"{kind}({I}, {H})"
    assert list(module.state_dict()) == list(peer.state_dict())
    x = torch.randn(2, I)
    assert "before they know r" in str(rnnkern.explain(module, x))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not twin.reset_after
        assert torch.equal(twin(x)[0], module(x)[0])
    with rnnkern.backend("cpu"), pytest.raises(rnnkern.BackendUnavailable, match="gru_reset_before"):
        module(x)
    if kind == "GRU":
        module.flatten_parameters()
        with pytest.raises(ValueError, match="QuantizedGRU has no reset_after=False"):
            rnnkern.quantize_dynamic(module)
    with pytest.raises(TypeError):
        getattr(rnnkern.nn, kind)(*(I, H, 1, True, True, 0.0, False, None, None, False)[: 10 if kind == "GRU" else 6])


def test_compiled_without_a_graph_break() -> None:
    gru, x = rnnkern.nn.GRU(I, H, reset_after=False), torch.randn(2, B, I)
    run = torch.compile(gru, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), gru(x))
