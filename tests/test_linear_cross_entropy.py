"""Linear layer and cross entropy in one: against torch's two functions in float64, chunk by chunk and whole."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rnnkern
from rnnkern.functional import linear_cross_entropy
from rnnkern.ops import cross_entropy
from rnnkern.ops import linear_cross_entropy as ops
from rnnkern.ops._dispatch import Choice
from tests.helpers import BACKENDS, DTYPES, assert_as_accurate, assert_same_bits
from tests.seq2seq_models import make_batch, make_model

REDUCTIONS = ["mean", "sum", "none"]
NAMES = ("loss", "dinput", "dweight", "dbias")


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's operators run everything, in chunks of 7 rows."""
    monkeypatch.setattr(ops, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(ops, "_choose", lambda *_: Choice("cpu", ""))


@pytest.fixture(params=["chunks", "reference"])
def path(request: pytest.FixtureRequest) -> None:
    """Both ways to compute it; the reference takes what is small."""
    if request.param == "chunks":
        request.getfixturevalue("chunks")


def make_inputs(shape: tuple[int, ...], D: int, V: int, dtype: torch.dtype, ignored: int = -100) -> list[Any]:
    """input [*, D], weight [V, D], bias [V], target [*] of which every third is ignored."""
    generator = torch.Generator().manual_seed(D * V)
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((*shape, D), (V, D), (V,))]
    target = torch.randint(V, shape, generator=generator)
    target.view(-1)[1::3] = ignored
    return [*(tensor.to(dtype).requires_grad_() for tensor in made), target]


def torch_loss(x: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any) -> Any:
    loss = F.cross_entropy(F.linear(x, weight, linear_bias).flatten(0, -2), target.flatten(), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def results(function: Any, inputs: list[Any], dtype: torch.dtype | None = None, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients, of the same values in another dtype on demand."""
    *floats, target = inputs
    x, weight, bias = (t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in floats)
    loss = function(x, weight, target, linear_bias=bias, **options)
    cotangent = torch.linspace(-1, 2, max(loss.numel(), 2), dtype=torch.float64)[-loss.numel() or 2 :].view(loss.shape)
    gradients = torch.autograd.grad(loss, (x, weight, bias), cotangent.to(loss.dtype))
    return dict(zip(NAMES, (loss.detach(), *gradients)))


def assert_as_torch(inputs: list[Any], **options: Any) -> None:
    dtype = inputs[0].dtype
    actual = results(linear_cross_entropy, inputs, **options)
    assert all(tensor.dtype == dtype for tensor in actual.values())
    expected = results(torch_loss, inputs, torch.float64, **options)
    assert_as_accurate(actual, expected, results(torch_loss, inputs, **options), dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(path: None, dtype: torch.dtype, reduction: str, smoothing: float) -> None:
    inputs = make_inputs((6, 5), 9, 17, dtype)
    assert_as_torch(inputs, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize(("dtype", "chunks"), [(torch.float32, [256, 256, 88]), (torch.bfloat16, [419, 181])])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_large_vocabulary_goes_by_in_chunks(
    monkeypatch: pytest.MonkeyPatch, reduction: str, dtype: torch.dtype, chunks: list[int]
) -> None:
    seen, addmm = [], torch.addmm

    def watched(*tensors: Tensor, out: Tensor) -> Tensor:
        seen.append(len(out))
        return addmm(*tensors, out=out)

    monkeypatch.setattr(torch, "addmm", watched)
    inputs = make_inputs((900,), 5, 20011, dtype)
    assert_as_torch(inputs, reduction=reduction)
    assert seen == chunks * (2 if reduction == "none" else 1)  # of the 600 rows that are not ignored


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_wanted_gradients(chunks: None, reduction: str, needed: tuple[int, ...]) -> None:
    x, weight, bias, target = make_inputs((15,), 4, 6, torch.float64)
    floats = [t.detach().requires_grad_(i in needed) for i, t in enumerate((x, weight, bias))]
    linear_cross_entropy(*floats[:2], target, linear_bias=floats[2], reduction=reduction).sum().backward()
    torch_loss(x, weight, target, linear_bias=bias, reduction=reduction).sum().backward()
    for i, (ours, theirs) in enumerate(zip(floats, (x, weight, bias))):
        if i in needed:
            torch.testing.assert_close(ours.grad, theirs.grad)
        else:
            assert ours.grad is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_of_both_orders(path: None, reduction: str, bias: bool) -> None:
    *floats, target = make_inputs((8,), 2, 3, torch.float64)

    def function(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        linear_bias = bias[0] if bias else None
        return linear_cross_entropy(
            x, weight, target, linear_bias=linear_bias, reduction=reduction, label_smoothing=0.1
        )

    inputs = floats if bias else floats[:2]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_that_counts(path: None, rows: int, smoothing: float, reduction: str) -> None:
    inputs = make_inputs((rows,), 3, 4, torch.float32)
    inputs[3] = torch.full((rows,), -100)
    actual = results(linear_cross_entropy, inputs, reduction=reduction, label_smoothing=smoothing)
    expected = results(torch_loss, inputs, reduction=reduction, label_smoothing=smoothing)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], equal_nan=True, rtol=0, atol=0, msg=name)
        assert name == "loss" or not tensor.any()


def test_an_ignored_class(path: None) -> None:
    inputs = make_inputs((20,), 3, 5, torch.float32, ignored=0)
    assert_as_torch(inputs, ignore_index=0)


def test_what_is_ignored_may_hold_anything(chunks: None) -> None:
    inputs = make_inputs((20,), 3, 5, torch.float32)
    expected = results(linear_cross_entropy, inputs)
    inputs[0].data[1::3] = torch.nan
    assert_same_bits(results(linear_cross_entropy, inputs), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_certain(path: None, dtype: torch.dtype, smoothing: float) -> None:
    inputs = make_inputs((20,), 3, 5, dtype)
    with torch.no_grad():
        inputs[1] *= 0.1
        inputs[2][2] = 12  # of the right class in some rows: exp(-12) and less for all others
    inputs[3][:6] = 2
    assert_as_torch(inputs, reduction="none", label_smoothing=smoothing)
    inputs[2].data[2] = 200  # past float32's exponentials
    assert_as_torch(inputs, reduction="none", label_smoothing=smoothing)


def test_rows_in_blocks(chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", 2 * 17)
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            inputs = make_inputs((6, 5), 9, 17, dtype)
            assert_as_torch(inputs, reduction=reduction, label_smoothing=0.2)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_infinite_and_undefined_logits(path: None, value: float) -> None:
    inputs = make_inputs((9,), 3, 5, torch.float32)
    inputs[2].data[4] = value
    inputs[3] %= 4
    actual, expected = (results(f, inputs, reduction="none") for f in (linear_cross_entropy, torch_loss))
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], equal_nan=True)


def test_the_mean_of_many_rows_does_not_overflow(path: None) -> None:
    x, weight = torch.ones(30000, 1, dtype=torch.float16), torch.tensor([[4.0], [-4.0]], dtype=torch.float16)
    loss = linear_cross_entropy(x, weight, torch.ones(30000, dtype=torch.long))
    assert loss.item() == pytest.approx(8, rel=1e-3)


def test_every_size_of_one(path: None) -> None:
    for inputs in (make_inputs((), 3, 4, torch.float32), make_inputs((3,), 0, 4, torch.float32)):
        x, weight, bias, target = inputs
        loss = linear_cross_entropy(x, weight, target, linear_bias=bias, reduction="sum")
        expected = F.cross_entropy(F.linear(x, weight, bias), target, reduction="sum")
        torch.testing.assert_close(loss, expected)
    assert linear_cross_entropy(torch.ones(3, 2), torch.ones(1, 2), torch.zeros(3, dtype=torch.long)) == 0


def assert_strides_do_not_matter() -> None:
    x, weight, bias, target = make_inputs((4, 5), 3, 6, torch.float32)
    outcomes = []
    for strided in (False, True):
        inputs = [x.transpose(0, 1), weight, bias, target.t()]
        if strided:
            inputs[1] = weight.detach().t().clone().t()
            inputs[2] = torch.stack((bias, bias), 1)[:, 0]
        else:
            inputs = [tensor.contiguous() for tensor in inputs]
        outcomes.append(results(linear_cross_entropy, inputs, reduction="none"))
    torch.testing.assert_close(*outcomes)
    losses = linear_cross_entropy(x.flatten(0, 1)[::2], weight, target.flatten()[::2], reduction="none")
    (actual,) = torch.autograd.grad(losses.sum(), x)  # of each loss the same gradient, which lies in memory once
    torch_losses = torch_loss(x.flatten(0, 1)[::2], weight, target.flatten()[::2], reduction="sum")
    torch.testing.assert_close(actual, *torch.autograd.grad(torch_losses, x))


def test_strided_inputs(path: None) -> None:
    assert_strides_do_not_matter()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(chunks: None, reduction: str) -> None:
    x, weight, bias, target = make_inputs((20,), 3, 5, torch.float32)
    loss = linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    weight.grad.zero_()
    loss.backward()
    assert torch.equal(weight.grad, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast(path: None, dtype: torch.dtype) -> None:
    inputs = make_inputs((20,), 3, 5, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, peer = (results(f, inputs) for f in (linear_cross_entropy, torch_loss))
    assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in peer.items()}
    assert_as_accurate(actual, results(torch_loss, inputs, torch.float64), peer, torch.bfloat16)


def test_autocast_takes_mixed_dtypes() -> None:
    x, weight, bias, target = make_inputs((20,), 3, 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x.bfloat16(), weight, target, linear_bias=bias)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, torch_loss(x, weight, target, linear_bias=bias), rtol=0.02, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile(chunks: None, reduction: str) -> None:
    def function(x: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor, **options: Any) -> Tensor:
        return linear_cross_entropy(2 * x, weight, target, linear_bias=linear_bias, reduction=reduction, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 11):
        inputs = make_inputs((rows,), 3, 5, torch.float32)
        actual, expected = (results(f, inputs, label_smoothing=0.1) for f in (compiled, function))
        for name in NAMES:
            torch.testing.assert_close(actual[name], expected[name])
        with torch.no_grad():
            assert compiled(*inputs[:2], inputs[3], inputs[2]).shape == expected["loss"].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias, target = make_inputs((8,), 2, 3, dtype)
    scale = torch.rand(8, dtype=torch.float32)
    torch.library.opcheck(torch.ops.rnnkern.linear_cross_entropy.default, (x, weight, bias, target, -100, 0.1))
    operator = torch.ops.rnnkern.linear_cross_entropy_gradients.default
    torch.library.opcheck(operator, (None, x, weight, bias, target, -100, 0.1, True, True, True))
    torch.library.opcheck(operator, (scale, x, weight.detach(), None, target, -100, 0.0, True, False, False))


def test_function_transforms() -> None:
    x, weight, _, target = make_inputs((4, 5), 3, 6, torch.float64)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight.detach(), target)

    actual = torch.func.vmap(torch.func.grad(loss))(x.detach(), target)
    for row in range(4):
        expected = torch.func.grad(loss)(x.detach()[row], target[row])
        torch.testing.assert_close(actual[row], expected)


def test_flops(chunks: None) -> None:
    x, weight, bias, target = make_inputs((10,), 3, 5, torch.float32)
    for reduction, products in (("mean", 3), ("none", 4)):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction).sum().backward()
        assert counter.get_total_flops() == products * 2 * 10 * 3 * 5


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_arguments_are_those_of_torch() -> None:
    x, weight, bias, target = make_inputs((9,), 3, 5, torch.float32)
    options = {"linear_bias": bias, "reduction": "sum", "ignore_index": 2, "label_smoothing": 0.3}
    target[1::3] = 2
    torch.testing.assert_close(
        linear_cross_entropy(x, weight, target, **options), F.linear_cross_entropy(x, weight, target, **options)
    )


@pytest.mark.parametrize(("changed", "error", "message"), [
    ({"input": [1.0]}, TypeError, "input: expected a Tensor, got list"),
    ({"target": None}, TypeError, "target: expected a Tensor, got NoneType"),
    ({"linear_weight": 3}, TypeError, "linear_weight: expected a Tensor, got int"),
    ({"linear_bias": 3}, TypeError, "linear_bias: expected a Tensor, got int"),
    ({"input": torch.tensor(1.0)}, RuntimeError, r"input: expected a floating-point tensor \[\*, D\]"),
    ({"input": torch.ones(6, 3, dtype=torch.long)}, RuntimeError, "input: .*torch.int64"),
    ({"linear_weight": torch.ones(5, 4)}, RuntimeError, r"linear_weight: expected shape \[V, 3\].*got \[5, 4\]"),
    ({"linear_weight": torch.ones(3)}, RuntimeError, r"linear_weight: expected shape \[V, 3\].*got \[3\]"),
    ({"linear_weight": torch.ones(0, 3)}, RuntimeError, "V > 0"),
    ({"linear_weight": torch.ones(5, 3).double()}, RuntimeError, "linear_weight: expected dtype torch.float32"),
    ({"linear_weight": torch.ones(5, 3, device="meta")}, RuntimeError, "linear_weight: expected device cpu"),
    ({"linear_bias": torch.ones(4)}, RuntimeError, r"linear_bias: expected shape \[5\].*got \[4\]"),
    ({"linear_bias": torch.ones(5).half()}, RuntimeError, "linear_bias: expected dtype torch.float32"),
    ({"target": torch.ones(6, dtype=torch.int32)}, RuntimeError, "target: expected classes of dtype torch.int64"),
    ({"target": torch.ones(6, 5)}, RuntimeError, "target: expected classes of dtype torch.int64, got torch.float32"),
    ({"target": torch.ones(5, dtype=torch.long)}, RuntimeError, r"target: expected shape \[6\].*got \[5\]"),
    ({"target": torch.ones(6, dtype=torch.long, device="meta")}, RuntimeError, "target: expected device cpu"),
    ({"reduction": "max"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'max'"),
    ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
    ({"target": torch.tensor([0, 1, 5, 0, 0, 0])}, IndexError, "Target 5 is out of bounds."),
    ({"target": torch.tensor([0, 1, -1, 0, 0, 0])}, IndexError, "Target -1 is out of bounds."),
])  # fmt: skip
def test_bad_input(path: None, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight, bias, target = make_inputs((6,), 3, 5, torch.float32)
    arguments = {"input": x, "linear_weight": weight, "linear_bias": bias, "target": target % 5} | changed
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_a_forced_backend() -> None:
    x, weight, _, target = make_inputs((6,), 3, 5, torch.float32)
    with rnnkern.backend("eager"):
        assert torch.equal(linear_cross_entropy(x, weight, target), torch_loss(x, weight, target))
    meta = [t.to("meta") for t in (x, weight, target)]
    if BACKENDS[-1] == "cpu":
        with rnnkern.backend("cpu"), pytest.raises(rnnkern.BackendUnavailable, match=r"linear_cross_entropy.*meta"):
            linear_cross_entropy(*meta)
    assert linear_cross_entropy(*meta).is_meta


@pytest.mark.parametrize("batch_first", [False, True])
def test_loss_of_a_model(chunks: None, batch_first: bool) -> None:
    model, (source, target, lengths) = make_model(batch_first=batch_first), make_batch()
    if batch_first:
        source, target = source.t(), target.t()
    dim = int(batch_first)
    outcomes: list[dict[str, Tensor]] = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            loss = model.loss(source, target, lengths)
        else:
            expected = target.narrow(dim, 1, target.shape[dim] - 1)
            logits = model(source, target, lengths).flatten(0, 1)
            loss = F.cross_entropy(logits, expected.flatten(), ignore_index=model.decoder.padding_index)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append({"loss": loss.detach(), **gradients})
    torch.testing.assert_close(*outcomes)


def test_a_changed_output_layer_is_used() -> None:
    model, batch = make_model(), make_batch()
    expected = model.loss(*batch)
    called = []
    handle = model.decoder.output.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(model.loss(*batch), expected)  # all logits at once sum in another order
    assert called
    handle.remove()
    model.decoder.output = torch.nn.Sequential(model.decoder.output, torch.nn.ReLU())
    assert model.loss(*batch) != expected
