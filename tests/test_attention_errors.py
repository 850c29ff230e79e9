"""Malformed input to attention: the exception, the argument it names, the expected and the given shape."""

import re
from typing import Any

import pytest
import torch

import rnnkern
from rnnkern.functional import Additive, General, attention
from rnnkern.nn import AdditiveAttention, GeneralAttention
from tests.attention_problem import BACKENDS

B, TQ, TK, D = 2, 3, 5, 4


def case(error: type[Exception], message: str, id: str, **arguments: Any) -> Any:
    return pytest.param(error, message, arguments, id=id)


CASES = [
    case(TypeError, "query: expected a Tensor, got list", "query list", query=[1.0]),
    case(TypeError, "key: expected a Tensor, got NoneType", "key None", key=None),
    case(TypeError, "value: expected a Tensor, got float", "value float", value=1.0),
    case(RuntimeError, "query: expected shape [B, Tq, D] or [B, D], got [4]", "query rank", query=torch.randn(4)),
    case(RuntimeError, "query: expected a floating-point dtype, got torch.int64", "query integers",
         query=torch.ones(B, TQ, D, dtype=torch.int64), key=torch.ones(B, TK, D, dtype=torch.int64)),
    case(RuntimeError, "key: expected shape [B, Tk, D], got [5, 4]", "key rank", key=torch.randn(TK, D)),
    case(RuntimeError, "key: expected shape [2, 5, 4] to fit query [2, 3, 4], got [2, 5, 6]", "key size",
         key=torch.randn(B, TK, 6)),
    case(RuntimeError, "key: expected shape [2, 5, 4] to fit query [2, 3, 4], got [1, 5, 4]", "key batch",
         key=torch.randn(1, TK, D)),
    case(RuntimeError, "value: expected shape [B, Tk, Dv] with B = 2 and Tk = 5, got [5, 4]", "value rank",
         value=torch.randn(TK, D)),
    case(RuntimeError, "value: expected shape [2, 5, 7] to fit query [2, 3, 4], got [2, 6, 7]", "value time",
         value=torch.randn(B, 6, 7)),
    case(RuntimeError, "key: expected dtype torch.float32 of query, got torch.float64", "key dtype",
         key=torch.randn(B, TK, D).double()),
    case(RuntimeError, "value: expected dtype torch.float32 of query, got torch.bfloat16", "value dtype",
         value=torch.randn(B, TK, D).bfloat16()),
    case(RuntimeError, "key: expected device cpu of query, got meta", "key device",
         key=torch.randn(B, TK, D, device="meta")),
    case(ValueError, "score: expected 'dot', 'scaled_dot', General(...) or Additive(...), got 'cosine'", "score",
         score="cosine"),
    case(RuntimeError, "vector: expected shape [4] to fit query [2, 3, 4], got [3]", "vector",
         score=Additive(torch.randn(3))),
    case(TypeError, "vector: expected a Tensor, got NoneType", "vector None", score=Additive(None)),
    case(RuntimeError, "vector: expected dtype torch.float32 of query, got torch.float64", "vector dtype",
         score=Additive(torch.randn(4).double())),
    case(RuntimeError, "query_weight: expected shape [A, 4] to fit query [2, 3, 4], got [3, 5]", "query_weight",
         score=Additive(torch.randn(3), torch.randn(3, 5), torch.randn(3, 4))),
    case(RuntimeError, "key_weight: expected shape [A, 4] to fit key [2, 5, 4], got [3, 5]", "key_weight",
         score=Additive(torch.randn(3), torch.randn(3, 4), torch.randn(3, 5))),
    case(RuntimeError, "bias: expected shape [4] to fit query [2, 3, 4], got [1]", "bias",
         score=Additive(torch.randn(4), bias=torch.randn(1))),
    case(RuntimeError, "query: expected last size 7 to fit vector, got shape [2, 3, 4]", "bias on unprojected query",
         score=Additive(torch.randn(7), bias=torch.randn(7))),
    case(RuntimeError, "weight: expected shape [4, Dk] to fit query [2, 3, 4], got [5, 4]", "weight rows",
         score=General(torch.randn(5, 4))),
    case(RuntimeError, "weight: expected shape [A, 4] to fit key [2, 5, 4], got [4, 5]", "weight columns",
         score=General(torch.randn(4, 5))),
    case(ValueError, "lengths, key_padding_mask: expected at most one of them, got both", "both",
         lengths=torch.tensor([1, 2]), key_padding_mask=torch.zeros(B, TK, dtype=torch.bool)),
    case(TypeError, "lengths: expected a Tensor, got list", "lengths list", lengths=[1, 2]),
    case(RuntimeError, "lengths: expected dtype torch.int64, got torch.float32", "lengths float",
         lengths=torch.tensor([1.0, 2.0])),
    case(RuntimeError, "lengths: expected shape [2], one entry per row, got [3]", "lengths count",
         lengths=torch.tensor([1, 2, 3])),
    case(RuntimeError, "lengths: expected shape [2], one entry per row, got [2, 1]", "lengths rank",
         lengths=torch.tensor([[1], [2]])),
    case(RuntimeError, "lengths: expected values in 0..5, the number of keys, got 6", "lengths too long",
         lengths=torch.tensor([1, 6])),
    case(RuntimeError, "lengths: expected values in 0..5, the number of keys, got -1", "lengths negative",
         lengths=torch.tensor([-1, 5])),
    case(TypeError, "key_padding_mask: expected a Tensor, got list", "mask list", key_padding_mask=[True]),
    case(RuntimeError, "key_padding_mask: expected shape [2, 5], got [5, 2]", "mask shape",
         key_padding_mask=torch.zeros(TK, B, dtype=torch.bool)),
    case(RuntimeError, "key_padding_mask: expected dtype torch.bool, got torch.float32", "mask dtype",
         key_padding_mask=torch.zeros(B, TK)),
    case(RuntimeError, "key_padding_mask: expected device cpu of query, got meta", "mask device",
         key_padding_mask=torch.zeros(B, TK, dtype=torch.bool, device="meta")),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("error", "message", "arguments"), CASES)
def test_message(error: type[Exception], message: str, arguments: dict[str, Any], backend: str) -> None:
    good = {"query": torch.randn(B, TQ, D), "key": torch.randn(B, TK, D), "score": "dot"}
    with rnnkern.backend(backend), pytest.raises(error, match=f"^{re.escape(message)}$"):
        attention(**(good | arguments))


def test_modules_name_their_weights() -> None:
    query, key = torch.randn(B, TQ, D), torch.randn(B, TK, 6)
    with pytest.raises(RuntimeError, match=re.escape("weight: expected shape [A, 6] to fit key [2, 5, 6], got [4, 5]")):
        GeneralAttention(4, 5)(query, key)
    with pytest.raises(RuntimeError, match=re.escape("weight: expected shape [4, Dk] to fit query [2, 3, 4]")):
        GeneralAttention(5, 6)(query, key)
    with pytest.raises(RuntimeError, match="query_projection: expected shape"):
        AdditiveAttention(5, 6, 7)(query, key)
    with pytest.raises(RuntimeError, match="key_projection: expected shape"):
        AdditiveAttention(4, 5, 7)(query, key)
    with pytest.raises(TypeError, match="projected_key: expected a Tensor, got int"):
        AdditiveAttention(4, 6, 7)(query, key, projected_key=1)


@pytest.mark.parametrize("bad", [[6, 1], [0, -1]])
def test_compiled_lengths_are_checked_by_the_kernel(bad: list[int]) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled kernels")
    query, key = torch.randn(B, TQ, D), torch.randn(B, TK, D)
    with pytest.raises(RuntimeError, match=re.escape("lengths: expected values in 0..5, the number of keys")):
        torch.ops.rnnkern.attention_inference(query, key, key, None, torch.tensor(bad), None, "dot", 1.0, False)
