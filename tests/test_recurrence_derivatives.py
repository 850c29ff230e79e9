"""Which gradients of the layer are asked for, in which order and how often; and derivatives of them."""

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.cells import CELLS
from tests.helpers import make_layer, needs_kernels

pytestmark = pytest.mark.usefixtures("poison")


@needs_kernels
@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "w_ih", "b_hh"])
def test_each_gradient_alone(wanted: str) -> None:
    layer = make_layer("lstm", 5, 3, 4, 6)
    expected = layer.run("cpu")[f"d{wanted}"]
    inputs = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in layer.inputs.items()}
    y, h_n, c_n, _ = layer.forward(inputs)
    outputs = [(y, layer.cotangents[0]), (h_n, layer.cotangents[1]), (c_n, layer.cotangents[2])]
    (actual,) = torch.autograd.grad([o for o, _ in outputs], [inputs[wanted]], [g for _, g in outputs])
    assert torch.equal(actual, expected)


@needs_kernels
@pytest.mark.parametrize("used", ["y", "h_n", "c_n", "c_all"])
def test_gradient_of_each_output_alone(used: str) -> None:
    layer = make_layer("lstm", 5, 3, 4, 6, D=2, dtype=torch.float64)
    found = []
    for backend_name in ("cpu", "eager"):
        zeros = tuple(torch.zeros_like(g) for g in layer.cotangents)
        i = ("y", "h_n", "c_n", "c_all").index(used)
        layer.cotangents = (*zeros[:i], torch.ones_like(zeros[i]), *zeros[i + 1 :])
        found.append(layer.run(backend_name))
        inputs = {name: t.detach().clone().requires_grad_() for name, t in layer.inputs.items()}
        if backend_name == "cpu":  # outputs that nobody uses give no gradient at all, rather than zeros
            alone = torch.autograd.grad(layer.forward(inputs)[i].sum(), list(inputs.values()))
            for name, value in zip(inputs, alone):
                assert torch.equal(value, found[0][f"d{name}"]), name
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
@needs_kernels
def test_gradcheck_and_gradgradcheck(cell: str, D: int) -> None:
    layer = make_layer(
        cell,
        3,
        2,
        2,
        3,
        D=D,
        dtype=torch.float64,
        lengths=torch.tensor([3, 2]),
        resets=torch.tensor([[0, 0], [1, 0], [0, 0]]).bool(),
    )
    inputs = {name: tensor.requires_grad_() for name, tensor in layer.inputs.items()}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(out for out in layer.forward(dict(zip(inputs, tensors))) if out.numel())

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()), fast_mode=True)


@needs_kernels
def test_double_backward_counts_a_tensor_in_two_places_once_each() -> None:
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def run(w: Tensor) -> Tensor:
        layer = make_layer("rnn_tanh", 4, 2, 5, 5, dtype=torch.float64)
        inputs = layer.inputs | {"w_ih": w, "w_hh": w * 0.5, "h0": w[None, :2]}
        return layer.forward(inputs)[0].pow(2).sum()

    assert torch.autograd.gradgradcheck(run, (w,))


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_third_derivative(cell: str) -> None:
    layer = make_layer(cell, 3, 2, 4, 4, D=2, dtype=torch.float64)
    x = layer.x.requires_grad_()
    derivatives: dict[str, list[Tensor]] = {}
    for backend in ("cpu", "eager"):
        inputs = {**layer.inputs, "x": x, "h0": x[:2] * 0.5}  # one a function of the other: each path counts once
        with rnnkern.backend(backend):
            value = layer.forward(inputs)[0]
        derivatives[backend] = []
        for _ in range(3):
            (value,) = torch.autograd.grad(value.pow(2).sum(), x, create_graph=True)
            derivatives[backend].append(value.detach())
    assert derivatives["eager"][2].any()
    for ours, expected in zip(derivatives["cpu"], derivatives["eager"]):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice(cell: str) -> None:
    layer = make_layer(cell, 5, 3, 4, 6, D=2)
    inputs = {name: tensor.requires_grad_() for name, tensor in layer.inputs.items()}
    y = layer.forward(inputs)[0]
    first, second = (torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_kernels
def test_changing_a_saved_output_in_place_is_noticed() -> None:
    layer = make_layer("gru", 3, 2, 4, 5)
    y = layer.forward({name: tensor.requires_grad_() for name, tensor in layer.inputs.items()})[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
