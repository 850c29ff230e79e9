"""Attention, and a decoder's loss over its vocabulary, as functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkern._checks import autocast_dtype, check_kind, check_tensor
from rnnkern._linear_cross_entropy import linear_cross_entropy
from rnnkern.ops.attention import Score, attend, place_lengths

__all__ = ["Additive", "General", "attention", "linear_cross_entropy"]


@dataclass(frozen=True, eq=False)
class General:
    """The general or bilinear score, q . W k.

    Attributes:
        weight: W.  # [Dq, Dk]

    Source: Luong et al. 2015, https://arxiv.org/abs/1508.04025.
    """

    weight: Tensor


@dataclass(frozen=True, eq=False)
class Additive:
    """The additive or MLP score, v . tanh(W_q q + W_k k + b).

    Attributes:
        vector: v.  # [A]
        query_weight: W_q; None: queries are already projected, Dq = A.  # [A, Dq]
        key_weight: W_k; None: keys are already projected, Dk = A.  # [A, Dk]
        bias: b; None: zero.  # [A]

    Source: Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473.
    """

    vector: Tensor
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    bias: Tensor | None = None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    score: str | General | Additive,
    lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Weights every value by how well its key matches the query, and sums.

    .. math::
        \mathrm{context}_i = \sum_j w_{ij} \, \mathrm{value}_j, \qquad
        w_{ij} = \mathrm{softmax}_j \, \mathrm{score}(\mathrm{query}_i, \mathrm{key}_j)

    over the valid keys j of the row. Scores:

    - ``"dot"``: q . k
    - ``"scaled_dot"``: q . k / sqrt(D)
    - ``General(weight)``: q . W k
    - ``Additive(vector, query_weight, key_weight, bias)``: v . tanh(W_q q + W_k k + b)

    The CPU kernels never hold a B x Tq x Tk x A tensor, nor keep a B x Tq x Tk one for the backward pass. Sums are
    float32 for bfloat16 and float16. Results do not depend on the number of threads, but for torch's own products with
    the weights of `General` and `Additive`. tanh comes from the exponentials
    of query and key apart where both lie within +-10 (float64: +-80), and from their sum elsewhere.

    A row without a valid key (a length of zero, a mask that is all True, or Tk = 0) has zero weights, zero context and
    zero gradients. What is padding may hold NaN and reaches neither results nor gradients; a NaN elsewhere propagates.
    Valid keys whose scores are all minus infinity give NaN, as torch.softmax does (but for one query per row on a GPU
    with the compiled CUDA kernels: zero weights and context, and NaN for gradients).

    Under ``torch.autocast`` query, key, value and the parameters of the score may have different dtypes: all but
    float64 are brought to autocast's dtype, which is that of the results; sums stay float32.

    Args:
        query: queries.  # [B, Tq, Dq], or [B, Dq] for one query per row
        key: keys; Dk = Dq for the dot scores.  # [B, Tk, Dk]
        value: values; by default the keys, as they are given.  # [B, Tk, Dv]
        score: how a query and a key are compared, see above.
        lengths: the number of valid keys of each row, 0..Tk, integers, on the CPU or where query is. On a GPU both
            may be captured in a CUDA graph: it keeps the values of those on the CPU, and reads those on the GPU anew at
            each replay. Both come without a wait; but where the compiled CUDA kernels cannot run, those on the CPU are
            copied, which may wait for the GPU.  # [B]
        key_padding_mask: True marks a key that is padding, as in torch.nn.MultiheadAttention.  # bool [B, Tk]
        need_weights: return the weights too.

    Returns:
        context  # [B, Tq, Dv], or [B, Dv]
        weights, or None unless asked for.  # [B, Tq, Tk], or [B, Tk]

    Raises:
        TypeError: an argument that should be a tensor is not.
        ValueError: an unknown score; both lengths and key_padding_mask are given.
        RuntimeError: rank, size, dtype or device of a tensor does not fit; a length on the CPU is not within 0..Tk. (On
            a GPU nobody looks, since that would wait for it, nor do programs of torch.compile without compiled kernels:
            the nearest of these is taken.)

    Source: Luong et al. 2015, https://arxiv.org/abs/1508.04025 (dot, general); Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762 (scaled dot); Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473 (additive).

    Example:
        >>> import torch
        >>> from rnnkern.functional import Additive, attention
        >>> query, key = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
        >>> score = Additive(torch.randn(4), torch.randn(4, 8), torch.randn(4, 6))
        >>> context, weights = attention(query, key, score=score, lengths=torch.tensor([7, 3]), need_weights=True)
        >>> context.shape, weights.shape
        (torch.Size([2, 5, 6]), torch.Size([2, 5, 7]))
    """
    check_tensor("query", query)
    check_tensor("key", key)
    value = key if value is None else value
    vector = None
    if isinstance(score, Additive):
        vector = score.vector
        query, key = project_additive(query, key, score, lengths, key_padding_mask)
    elif isinstance(score, General):
        check_matrix("weight", score.weight, query, "query", 0)
        check_matrix("weight", score.weight, key, "key", 1)
        query = query @ score.weight
    elif score not in ("dot", "scaled_dot"):
        raise ValueError(f"score: expected 'dot', 'scaled_dot', General(...) or Additive(...), got {score!r}")
    return attend_checked(
        query,
        key,
        value,
        score="dot" if vector is None else "additive",
        vector=vector,
        scale=1 / math.sqrt(max(1, query.shape[-1])) if score == "scaled_dot" else 1.0,
        lengths=lengths,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
    )


def project_additive(
    query: Tensor, key: Tensor, score: Additive, lengths: Tensor | None, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Brings query and key to A elements; the bias goes with the projected one of them."""
    check_tensor("vector", score.vector)
    if score.query_weight is not None:
        check_matrix("query_weight", score.query_weight, query, "query", 1)
        query = linear(query, score.query_weight)
    if score.key_weight is not None:
        check_matrix("key_weight", score.key_weight, key, "key", 1)
        key = linear(zero_padding(key, lengths, key_padding_mask), score.key_weight)
    if score.bias is None:
        return query, key
    A = score.vector.numel()
    if query.shape[-1:] != (A,):
        raise RuntimeError(f"query: expected last size {A} to fit vector, got shape {list(query.shape)}")
    check_fit("bias", score.bias, (A,), query)
    return query + score.bias, key


def attend_checked(
    query: Tensor,  # [B, Tq, D] or [B, D]
    key: Tensor,  # [B, Tk, D]
    value: Tensor,  # [B, Tk, Dv]
    *,
    score: Score,
    vector: Tensor | None = None,  # [D]
    scale: float = 1.0,
    lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Checks projected queries and keys, and what goes with them, and runs the operator, in autocast's dtype if any."""
    check_tensor("value", value)
    if torch._C._is_any_autocast_enabled():
        query, key, value = (tensor.to(autocast_dtype(tensor)) for tensor in (query, key, value))
        vector = vector.to(autocast_dtype(vector)) if isinstance(vector, Tensor) else vector
    if query.dim() not in (2, 3):
        raise RuntimeError(f"query: expected shape [B, Tq, D] or [B, D], got {list(query.shape)}")
    if not query.dtype.is_floating_point:
        raise RuntimeError(f"query: expected a floating-point dtype, got {query.dtype}")
    single = query.dim() == 2
    if single:
        query = query.unsqueeze(1)
    B, _, D = query.shape
    if key.dim() != 3:
        raise RuntimeError(f"key: expected shape [B, Tk, D], got {list(key.shape)}")
    Tk = key.shape[1]
    check_fit("key", key, (B, Tk, D), query)
    if value.dim() != 3:
        raise RuntimeError(f"value: expected shape [B, Tk, Dv] with B = {B} and Tk = {Tk}, got {list(value.shape)}")
    check_fit("value", value, (B, Tk, value.shape[2]), query)
    if vector is not None:
        check_fit("vector", vector, (D,), query)
    lengths = check_padding(lengths, key_padding_mask, key)
    context, weights = attend(
        query,
        key,
        value,
        score=score,
        vector=vector,
        scale=scale,
        lengths=lengths,
        mask=key_padding_mask,
        need_weights=need_weights,
    )
    if single:
        return context.squeeze(1), None if weights is None else weights.squeeze(1)
    return context, weights


def zero_padding(key: Tensor, lengths: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    """Keys for a projection: zero where they are padding, since the weight's gradient is a product over all keys."""
    if key.dim() != 3 or (lengths is None and key_padding_mask is None) or not torch.is_grad_enabled():
        return key
    lengths = check_padding(lengths, key_padding_mask, key)
    if lengths is not None:
        key_padding_mask = torch.arange(key.shape[1], device=key.device) >= lengths[:, None]
    assert key_padding_mask is not None
    return key.masked_fill(key_padding_mask[..., None], 0)


def check_fit(name: str, tensor: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """Raises unless the tensor has this shape, and dtype and device of the query."""
    check_tensor(name, tensor)
    if tensor.shape != shape:
        raise RuntimeError(
            f"{name}: expected shape {list(shape)} to fit query {list(query.shape)}, got {list(tensor.shape)}"
        )
    check_kind(name, tensor, query, "query")


def check_matrix(name: str, weight: Tensor, operand: Tensor, operand_name: str, dim: int) -> None:
    """Raises unless the weight is a matrix whose size along dim is the last size of what it multiplies."""
    check_tensor(name, weight)
    if operand.dim() not in (2, 3):
        raise RuntimeError(f"{operand_name}: expected a tensor of 2 or 3 dimensions, got shape {list(operand.shape)}")
    if weight.dim() != 2 or weight.shape[dim] != operand.shape[-1]:
        expected = "[A, {}]" if dim == 1 else "[{}, Dk]"
        raise RuntimeError(
            f"{name}: expected shape {expected.format(operand.shape[-1])} to fit {operand_name} "
            f"{list(operand.shape)}, got {list(weight.shape)}"
        )
    check_kind(name, weight, operand, operand_name)


def check_padding(
    lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    key: Tensor,  # [B, Tk, D]
) -> Tensor | None:
    """Raises unless at most one of them is given and fits; returns the lengths as int64 on the device of the keys."""
    B, Tk, _ = key.shape
    if lengths is not None:
        if key_padding_mask is not None:
            raise ValueError("lengths, key_padding_mask: expected at most one of them, got both")
        return place_lengths(check_lengths(lengths, B), key)
    if key_padding_mask is not None:
        check_mask(key_padding_mask, B, Tk, key.device)
    return None


def check_lengths(lengths: Tensor, B: int) -> Tensor:
    """Returns the lengths as int64; their values are checked where they are read."""
    check_tensor("lengths", lengths)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise RuntimeError(f"lengths: expected dtype torch.int64, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise RuntimeError(f"lengths: expected shape [{B}], one entry per row, got {list(lengths.shape)}")
    return lengths.to(torch.int64)


def check_mask(mask: Tensor, B: int, Tk: int, device: torch.device) -> None:
    """Raises unless it is a bool mask of every key."""
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"key_padding_mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.shape != (B, Tk):
        raise RuntimeError(f"key_padding_mask: expected shape [{B}, {Tk}], got {list(mask.shape)}")
    if mask.device != device:
        raise RuntimeError(f"key_padding_mask: expected device {device} of query, got {mask.device}")
