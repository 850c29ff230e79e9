"""grad_clip and grad_clip_norm: what arrives where, by hand, on every backend, and of any order."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.cells import CELLS
from tests.helpers import DTYPES, assert_as_accurate, assert_same_bits, make_layer, needs_kernels, threads

KINDS = ["RNN", "LSTM", "GRU"]
T, B, I, H = 6, 4, 3, 5


def test_by_hand() -> None:
    """An Elman network, its backward written out."""
    limit = 0.1
    rnn = rnnkern.nn.RNN(I, H, grad_clip=limit, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h_0 = torch.randn(1, B, H, dtype=torch.float64, requires_grad=True)
    y, _ = rnn(x, h_0)
    dy = torch.randn_like(y)
    dh = torch.zeros(B, H, dtype=torch.float64)
    dx, dw_ih, dw_hh = torch.zeros_like(x), torch.zeros_like(rnn.weight_ih_l0), torch.zeros_like(rnn.weight_hh_l0)
    limited = 0
    with torch.no_grad():
        for t in reversed(range(T)):
            gate = (dh + dy[t]) * (1 - y[t] ** 2)
            limited += int((gate.abs() > limit).sum())
            gate = gate.clamp(-limit, limit)
            dx[t] = gate @ rnn.weight_ih_l0
            dw_ih += gate.T @ x[t]
            dw_hh += gate.T @ (y[t - 1] if t else h_0[0])
            dh = gate @ rnn.weight_hh_l0
    assert 0 < limited < T * B * H
    y.backward(dy)
    for actual, expected in ((x.grad, dx), (h_0.grad, dh[None]), (rnn.weight_ih_l0.grad, dw_ih)):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(rnn.weight_hh_l0.grad, dw_hh)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("poison")
def test_kernels_and_reference(cell: str, dtype: torch.dtype, isa: str) -> None:
    for H in (1, 33):
        layer = make_layer(
            cell,
            7,
            3,
            10,
            H,
            D=2,
            dtype=dtype,
            lengths=torch.tensor([7, 0, 4]),
            resets=torch.rand(7, 3) < 0.2,
            every_c=True,
            grad_clip=0.05,
        )
        found = layer.run("cpu")
        assert_as_accurate(found, layer.run_reference(), layer.run("eager"), dtype)
        layer.grad_clip = 0.0
        without = layer.run("cpu")
        assert not torch.equal(found["dx"], without["dx"])
        layer.grad_clip = 1e6
        assert_same_bits(layer.run("cpu"), without)


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_threads_change_no_bit(cell: str) -> None:
    layer = make_layer(cell, 33, 4, 20, 64, D=2, grad_clip=0.05)
    expected = layer.run("cpu")
    with threads(2):
        assert_same_bits(layer.run("cpu"), expected)


@needs_kernels
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_nan_stays_and_what_is_huge_does_not(backend: str) -> None:
    layer = make_layer("gru", 3, 2, 4, 5, grad_clip=0.5)
    layer.cotangents[0][1, 0, 2] = math.nan
    layer.cotangents[0][1, 1, 2] = 1e30
    found = layer.run(backend)
    assert found["dx"][1, 0].isnan().all()
    assert found["dx"][:, 1].abs().max() < 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_what_is_huge_or_nan(dtype: torch.dtype) -> None:
    """A gradient of which only the direction counts arrives with the limit's norm, however large; NaN stays."""
    limit, largest = 0.5, min(torch.finfo(dtype).max / 4, 1e100)
    module = rnnkern.nn.GRU(I, H, grad_clip_norm=limit, dtype=dtype)
    plain = rnnkern.nn.GRU(I, H, dtype=dtype)
    plain.load_state_dict(module.state_dict())
    x, h_0 = torch.randn(T, 3, I, dtype=dtype), torch.zeros(1, 3, H, dtype=dtype)
    direction = torch.zeros(T, 3, H, dtype=dtype)
    direction[1, :, 2] = 1
    scales = torch.tensor([largest, 1e3, 1.0], dtype=dtype)[:, None]
    given = direction * scales
    given[0, 2, 0] = math.nan
    none = torch.zeros_like(h_0)
    found, expected = (backward(m, x, h_0, [d, none])["x"] for m, d in ((module, given), (plain, direction * limit)))
    assert expected[:2, :2].any()
    torch.testing.assert_close(found[:, :2], expected[:, :2])
    assert found[0, 2].isnan().all()


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell: str) -> None:
    """What passes back through the gates is limited in the second backward, too, on the kernels as on the reference."""
    layer = make_layer(cell, 5, 2, 3, 4, D=2, dtype=torch.float64, grad_clip=0.1)
    found: dict[str, list[Tensor]] = {}
    for backend in ("cpu", "eager"):
        inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in layer.inputs.items()}
        with rnnkern.backend(backend):
            y = layer.forward(inputs)[0]
            (dx,) = torch.autograd.grad(y, inputs["x"], layer.cotangents[0], create_graph=True)
            gradients = torch.autograd.grad(dx.sum(), list(inputs.values()), materialize_grads=True)
        found[backend] = list(gradients)
    assert sum(int(gradient.any()) for gradient in found["cpu"]) > 3
    torch.testing.assert_close(found["cpu"], found["eager"], rtol=1e-10, atol=1e-12)


@needs_kernels
def test_opcheck() -> None:
    layer = make_layer("gru", 3, 2, 4, 5, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in layer.inputs.values()]
    arguments = ("gru", *inputs[:2], None, *inputs[2:], *[None] * 6, False, 0.1)
    torch.library.opcheck(torch.ops.rnnkern.layer.default, arguments)


def row_norms(y: Tensor, h_n: Tensor, c_n: Tensor | None) -> Tensor:
    """Of the gradient of sum(weights * outputs), for each sequence: the weights' own."""
    squares = y.square().sum((0, 2)) + h_n.square().sum((0, 2))
    return (squares if c_n is None else squares + c_n.square().sum((0, 2))).sqrt()


def backward(
    module: torch.nn.RNNBase, x: Tensor, hx: Any, cotangents: list[Tensor], **options: Any
) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    outputs = torch.utils._pytree.tree_leaves(module(x, hx, **options))
    torch.autograd.backward(outputs, cotangents)
    assert x.grad is not None
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", [None, [3, T, 0, 5]], ids=["", "lengths"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_of_each_sequence(kind: str, lengths: list[int] | None) -> None:
    """As if the gradients of the outputs had come scaled, row by row; what comes for padding counts for nothing."""
    limit = 1.0
    torch.manual_seed(0)
    plain = getattr(rnnkern.nn, kind)(I, H, bidirectional=True, dtype=torch.float64)
    module = getattr(rnnkern.nn, kind)(I, H, bidirectional=True, dtype=torch.float64, grad_clip_norm=limit)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    options = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    shapes = [leaf.shape for leaf in torch.utils._pytree.tree_leaves(plain(x))]
    small = torch.tensor([1.0, 1e-3, 1.0, 1.0], dtype=torch.float64)[:, None]  # one sequence stays below the limit
    cotangents = [torch.randn(shape, dtype=torch.float64) * small for shape in shapes]
    alive = torch.arange(T)[:, None] < torch.tensor(lengths or [T] * B)
    y, h_n, *c_n = cotangents
    norms = row_norms(y * alive[:, :, None], h_n, c_n[0] if c_n else None)
    assert ((norms > limit).tolist()) == [True, False, True, True]
    factors = (limit / norms).clamp(max=1)[:, None]
    expected = backward(plain, x, None, [d * factors for d in cotangents], **options)
    found = backward(module, x, None, cotangents, **options)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_of_packed_sequences(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2, dtype=torch.float64, grad_clip_norm=0.5)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([3, T, 1, 5])
    results = []
    for packed in (False, True):
        data = x.clone().requires_grad_()
        if packed:
            y = module(pack_padded_sequence(data, lengths, enforce_sorted=False))[0].data
        else:
            y = module(data, lengths=lengths)[0]
        y.sum().backward()
        results.append(data.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options", [{"grad_clip": 0.2}, {"grad_clip_norm": 0.5}, {"grad_clip": 0.1, "grad_clip_norm": 1}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind: str, options: dict[str, Any]) -> None:
    """Eval mode, second derivatives, every dtype, no gradients, repr; and nothing changes forward."""
    plain = getattr(rnnkern.nn, kind)(I, H, 2, dtype=torch.float64)
    module = getattr(rnnkern.nn, kind)(I, H, 2, dtype=torch.float64, **options).eval()
    module.load_state_dict(plain.state_dict())
    assert all(f"{name}={float(limit)}" in repr(module) for name, limit in options.items())
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=0)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.pow(2).sum(), x)[0].isfinite().all()
    for dtype in (torch.float32, torch.bfloat16):
        low = module.to(dtype)
        y, _ = low(x.to(dtype))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.isfinite().all()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(low(x.to(dtype))[0], y.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("option", ["grad_clip", "grad_clip_norm"])
def test_per_sample_gradients(option: str) -> None:
    module = rnnkern.nn.LSTM(I, H, dtype=torch.float64, **{option: 0.1})
    x = torch.randn(T, B, I, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (row,))[0].sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(B):
        expected = torch.autograd.grad(loss(parameters, x[:, b]), list(parameters.values()))
        for gradient, value in zip(found.values(), expected):
            torch.testing.assert_close(gradient[b], value)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("option", ["grad_clip", "grad_clip_norm"])
def test_forward_mode_is_refused_by_name(option: str, training: bool) -> None:
    gru = rnnkern.nn.GRU(I, H, num_layers=2, **{option: 0.1}).train(training)
    x = torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match=f"{option} limits gradients"):
        torch.func.jvp(gru, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"{option} limits gradients"):
            gru(forward_ad.make_dual(x, x))
        gru(x)[0].sum().backward()  # nothing has a tangent here
    with pytest.raises(NotImplementedError, match=f"{option} limits gradients"):
        torch.func.jacfwd(lambda x: gru(x)[0])(x)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
@pytest.mark.parametrize("option", ["grad_clip", "grad_clip_norm"])
def test_limits_are_positive(option: str, limit: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be greater than zero, got {limit}"):
        rnnkern.nn.GRU(I, H, **{option: limit})
    with pytest.raises(ValueError, match=f"QuantizedGRU has no gradients, got {option}=1"):
        rnnkern.nn.QuantizedGRU(I, H, **{option: 1})
    for given in ("a", True, torch.ones(2)):
        with pytest.raises(TypeError, match=f"{option} must be a number, got {type(given).__name__}"):
            rnnkern.nn.GRU(I, H, **{option: given})


@pytest.mark.parametrize("what", ["plain", "packed", "resets"])
def test_compiled(what: str) -> None:
    options = {"learn_initial_state": True} if what == "resets" else {}
    module = rnnkern.nn.GRU(I, H, grad_clip=0.1, grad_clip_norm=1.0, dtype=torch.float64, **options)
    data = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    given = {"resets": torch.rand(T, B) < 0.3} if what == "resets" else {}

    def gradient(f: Any) -> Tensor:
        x: Any = pack_padded_sequence(data, torch.tensor([T, 5, 5, 1])) if what == "packed" else data
        y = torch.utils._pytree.tree_leaves(f(x, **given))[0]
        return torch.autograd.grad(y.sum(), data)[0]

    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(run), gradient(module), rtol=0, atol=0)


@pytest.mark.parametrize("option", ["grad_clip", "grad_clip_norm"])
def test_batches_of_cotangents(option: str) -> None:
    module = rnnkern.nn.LSTM(I, H, dtype=torch.float64, **{option: 0.1})
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    y, (h_n, _) = module(x, lengths=torch.tensor([T, 0, 2, 3]))
    inputs = [x, *module.parameters()]
    dy, dh = torch.randn(3, *y.shape, dtype=torch.float64), torch.randn(3, *h_n.shape, dtype=torch.float64)
    found = torch.autograd.grad((y, h_n), inputs, (dy, dh), retain_graph=True, is_grads_batched=True)
    for i in range(3):
        expected = torch.autograd.grad((y, h_n), inputs, (dy[i], dh[i]), retain_graph=True)
        torch.testing.assert_close([gradient[i] for gradient in found], list(expected))


@pytest.mark.parametrize("grad", [True, False])
def test_states_of_a_limited_layer_may_be_changed_in_place(grad: bool) -> None:
    lstm = rnnkern.nn.LSTM(3, 4, grad_clip_norm=1.0)
    with torch.set_grad_enabled(grad):
        y, (h, c) = lstm(torch.randn(5, 2, 3))
        h.mul_(0.5)
        if grad:
            (y.sum() + h.sum()).backward()
        h.detach_()
        c.detach_()
    assert not h.requires_grad


def test_a_trace_with_a_limit_can_be_saved() -> None:
    gru, x = rnnkern.nn.GRU(3, 4, grad_clip_norm=1.0), torch.randn(5, 2, 3)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(gru, x), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x)[0], gru(x)[0])
