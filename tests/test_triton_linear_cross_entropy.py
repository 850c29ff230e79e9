"""The cross entropy of Triton, interpreted: losses and gradients against float64, chunk by chunk."""

import pytest
import torch

import rnnkern
from rnnkern import triton as kernels
from rnnkern.functional import linear_cross_entropy
from rnnkern.ops import linear_cross_entropy as ops
from tests.helpers import assert_as_accurate
from tests.test_linear_cross_entropy import (
    NAMES,
    REDUCTIONS,
    assert_strides_do_not_matter,
    make_inputs,
    results,
    torch_loss,
)

_why = kernels.missing_on("cpu")
pytestmark = [pytest.mark.skipif(bool(_why), reason=_why), pytest.mark.usefixtures("torch_poison")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 rows."""
    monkeypatch.setattr(ops, "chunk_rows", lambda *_: 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("V", [1, 17, 4101])  # one block and two, with a tail
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(dtype: torch.dtype, V: int, reduction: str, smoothing: float) -> None:
    inputs = make_inputs((2, 4), 5, V, dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    with rnnkern.backend("triton"):
        actual = results(linear_cross_entropy, inputs, **options)
    assert all(tensor.dtype == dtype for tensor in actual.values())
    expected, peer = (results(torch_loss, inputs, d, **options) for d in (torch.float64, dtype))
    assert_as_accurate(actual, expected, peer, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_of_both_orders(reduction: str) -> None:
    x, weight, bias, target = make_inputs((5,), 2, 3, torch.float32)
    outcomes = []
    for backend in ("triton", "eager"):
        with rnnkern.backend(backend):
            loss = linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction).sum()
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            outcomes.append(torch.autograd.grad(first.square().sum(), (x, weight, bias)))
    torch.testing.assert_close(*outcomes)


def test_a_row_that_does_not_count_and_one_that_is_no_class() -> None:
    x, weight, bias, target = make_inputs((6,), 3, 4, torch.float32)
    target[:] = torch.tensor([1, -100, 4, -1, 0, 3])
    with rnnkern.backend("triton"):
        loss = linear_cross_entropy(x, weight, target, linear_bias=bias, reduction="none")
        nothing = results(linear_cross_entropy, [x, weight, bias, torch.full((6,), -100)])
        empty = linear_cross_entropy(x[:0], weight, target[:0])
    assert loss.isnan().tolist() == [False, False, True, True, False, False]
    assert loss[1] == 0
    assert nothing["loss"].isnan()
    assert not any(nothing[name].any() for name in NAMES[1:])
    assert empty.isnan()


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_infinite_and_undefined_logits(value: float) -> None:
    inputs = make_inputs((9,), 3, 5, torch.float32)
    inputs[2].data[:4] = value
    inputs[3][:] = 4
    expected = results(torch_loss, inputs, reduction="none")
    with rnnkern.backend("triton"):
        actual = results(linear_cross_entropy, inputs, reduction="none")
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], equal_nan=True)


@pytest.mark.parametrize(("first", "second"), [(0.0, 9.0), (-torch.inf, 0.0), (0.0, -torch.inf)])
def test_blocks_of_different_size(first: float, second: float) -> None:
    inputs = make_inputs((4,), 3, 4101, torch.float32)
    inputs[2].data[:4096] += first
    inputs[2].data[4096:] += second
    inputs[3][:] = torch.tensor([4100, 3, -100, 4096]) if first == 0 else 4100
    expected = results(torch_loss, inputs, reduction="none")
    with rnnkern.backend("triton"):
        actual = results(linear_cross_entropy, inputs, reduction="none")
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], equal_nan=True)


def test_opcheck() -> None:
    x, weight, bias, target = make_inputs((4,), 2, 3, torch.float32)
    operators = torch.ops.rnnkern
    torch.library.opcheck(operators.triton_linear_cross_entropy.default, (x, weight, bias, target, -100, 0.1))
    arguments = (None, x, weight, bias, target, -100, 0.1, True, True, True)
    torch.library.opcheck(operators.triton_linear_cross_entropy_gradients.default, arguments)


def test_float64_is_refused() -> None:
    x, weight, _, target = make_inputs((4,), 2, 3, torch.float64)
    with rnnkern.backend("triton"), pytest.raises(rnnkern.BackendUnavailable, match="float64"):
        linear_cross_entropy(x, weight, target)


def test_strided_inputs() -> None:
    with rnnkern.backend("triton"):
        assert_strides_do_not_matter()
