"""Attention modules: dot, general and additive scores with their parameters."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from rnnkern._checks import check_tensor
from rnnkern.functional import attend_checked, check_matrix, zero_padding
from rnnkern.nn._graphs import Leaf

Output = tuple[Tensor, Tensor | None]


class _Attention(Leaf):
    """What the modules share: forward's arguments, and keys that are projected once per source."""

    _multiplies_keys = False  # whether project_keys has a weight

    def project_keys(self, key: Tensor) -> Tensor:
        """Brings keys to the form in which the score reads them; pass it to ``forward`` as ``projected_key``.

        It does not know which keys are padding: these must be finite, or a NaN there reaches the weight's gradient.
        (``forward`` zeros them before it projects.)

        Args:
            key: keys.  # [B, Tk, Dk]

        Raises:
            RuntimeError: its last size, dtype or device does not fit the module.
        """
        return key

    def project_queries(self, query: Tensor) -> Tensor:
        """Brings queries to the form in which the score reads them."""
        return query

    def _score(self, query: Tensor) -> dict[str, Any]:
        """The operator's score, and its vector or scale, for projected queries."""
        return {"score": "dot"}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        projected_key: Tensor | None = None,
    ) -> Output:
        """Attends; see `rnnkern.functional.attention` for the maths.

        Args:
            query: queries.  # [B, Tq, Dq], or [B, Dq] for one query per row
            key: keys.  # [B, Tk, Dk]
            value: values; by default the keys.  # [B, Tk, Dv]
            lengths: number of valid keys of each row, 0..Tk, on the CPU or where query is.  # [B]
            key_padding_mask: True marks a key that is padding.  # bool [B, Tk]
            need_weights: return the weights too.
            projected_key: what ``project_keys(key)`` gave, so that a decoder projects once per source.

        Returns:
            context  # [B, Tq, Dv], or [B, Dv]
            weights, or None unless asked for.  # [B, Tq, Tk], or [B, Tk]

        Raises:
            TypeError: an argument that should be a tensor is not.
            ValueError: both lengths and key_padding_mask are given.
            RuntimeError: rank, size, dtype or device of a tensor does not fit; a length on the CPU is not within 0..Tk.
        """
        if isinstance(query, Proxy):
            return self._traced(
                query,
                key,
                value,
                lengths=lengths,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                projected_key=projected_key,
            )
        check_tensor("query", query)
        check_tensor("key", key)
        if projected_key is None:
            projected_key = self.project_keys(
                zero_padding(key, lengths, key_padding_mask) if self._multiplies_keys else key
            )
        else:
            check_tensor("projected_key", projected_key)
        query = self.project_queries(query)
        return attend_checked(
            query,
            projected_key,
            key if value is None else value,
            **self._score(query),
            lengths=lengths,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
        )


class DotAttention(_Attention):
    r"""Dot-product attention: score(q, k) = q . k, or q . k / sqrt(D) when scaled.

    Args:
        scaled: divide by the square root of the size of a query.

    Shapes: query [B, Tq, D] or [B, D], key [B, Tk, D], value [B, Tk, Dv]; see ``forward`` for its errors.

    Source: Luong et al. 2015, https://arxiv.org/abs/1508.04025; scaled: Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762.

    Example:
        >>> import torch
        >>> from rnnkern.nn import DotAttention
        >>> context, weights = DotAttention(scaled=True)(torch.randn(2, 5, 8), torch.randn(2, 7, 8), need_weights=True)
        >>> context.shape, weights.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 7]))
    """

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.scaled = scaled

    def _score(self, query: Tensor) -> dict[str, Any]:
        return {"score": "dot", "scale": 1 / math.sqrt(max(1, query.shape[-1])) if self.scaled else 1.0}

    def extra_repr(self) -> str:
        """Tells whether the score is scaled."""
        return f"scaled={self.scaled}"


class GeneralAttention(_Attention):
    r"""General (bilinear) attention: score(q, k) = q . W k.

    ``project_keys`` gives W k, so that a step against projected keys multiplies by no weight.

    Args:
        query_size: size Dq of a query.
        key_size: size Dk of a key.

    Attributes:
        weight: W, initialised uniformly in +-1/sqrt(Dk).  # [Dq, Dk]

    Shapes: query [B, Tq, Dq] or [B, Dq], key [B, Tk, Dk], value [B, Tk, Dv]; see ``forward`` for its errors.

    Source: Luong et al. 2015, https://arxiv.org/abs/1508.04025.

    Example:
        >>> import torch
        >>> from rnnkern.nn import GeneralAttention
        >>> attention, key = GeneralAttention(8, 6), torch.randn(2, 7, 6)
        >>> projected = attention.project_keys(key)
        >>> context, _ = attention(torch.randn(2, 8), key, projected_key=projected)
        >>> context.shape
        torch.Size([2, 6])
    """

    _multiplies_keys = True

    def __init__(
        self,
        query_size: int,
        key_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size = query_size, key_size
        self.weight = nn.Parameter(torch.empty(query_size, key_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew."""
        bound = 1 / math.sqrt(max(1, self.key_size))
        nn.init.uniform_(self.weight, -bound, bound)

    def project_keys(self, key: Tensor) -> Tensor:
        """W k; padding must be finite.  # [B, Tk, Dk] -> [B, Tk, Dq]"""
        check_tensor("key", key)
        check_matrix("weight", self.weight, key, "key", 1)
        return nn.functional.linear(key, self.weight)

    def project_queries(self, query: Tensor) -> Tensor:
        """Queries as they are."""
        check_matrix("weight", self.weight, query, "query", 0)
        return query

    def extra_repr(self) -> str:
        """The sizes."""
        return f"query_size={self.query_size}, key_size={self.key_size}"


class AdditiveAttention(_Attention):
    r"""Additive (MLP) attention: score(q, k) = v . tanh(W_q q + W_k k + b).

    ``project_keys`` gives W_k k + b.

    Args:
        query_size: size Dq of a query.
        key_size: size Dk of a key.
        alignment_size: size A of the sum.
        bias: whether there is a b.

    Attributes:
        query_projection: W_q, a torch.nn.Linear.  # [A, Dq]
        key_projection: W_k and b, a torch.nn.Linear.  # [A, Dk], [A]
        vector: v, initialised uniformly in +-1/sqrt(A).  # [A]

    Shapes: query [B, Tq, Dq] or [B, Dq], key [B, Tk, Dk], value [B, Tk, Dv]; see ``forward`` for its errors.

    Source: Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473.

    Example:
        >>> import torch
        >>> from rnnkern.nn import AdditiveAttention
        >>> attention = AdditiveAttention(8, 6, 4)
        >>> context, _ = attention(torch.randn(2, 5, 8), torch.randn(2, 7, 6), lengths=torch.tensor([7, 0]))
        >>> context.shape, context[1].abs().max().item()
        (torch.Size([2, 5, 6]), 0.0)
    """

    _multiplies_keys = True

    def __init__(
        self,
        query_size: int,
        key_size: int,
        alignment_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size, self.alignment_size = query_size, key_size, alignment_size
        self.query_projection = nn.Linear(query_size, alignment_size, bias=False, device=device, dtype=dtype)
        self.key_projection = nn.Linear(key_size, alignment_size, bias=bias, device=device, dtype=dtype)
        self.vector = nn.Parameter(torch.empty(alignment_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        self.query_projection.reset_parameters()
        self.key_projection.reset_parameters()
        bound = 1 / math.sqrt(max(1, self.alignment_size))
        nn.init.uniform_(self.vector, -bound, bound)

    def project_keys(self, key: Tensor) -> Tensor:
        """W_k k + b; padding must be finite.  # [B, Tk, Dk] -> [B, Tk, A]"""
        check_tensor("key", key)
        check_matrix("key_projection", self.key_projection.weight, key, "key", 1)
        projected: Tensor = self.key_projection(key)
        return projected

    def project_queries(self, query: Tensor) -> Tensor:
        """W_q q.  # [B, Tq, Dq] -> [B, Tq, A], or [B, Dq] -> [B, A]"""
        check_matrix("query_projection", self.query_projection.weight, query, "query", 1)
        projected: Tensor = self.query_projection(query)
        return projected

    def _score(self, query: Tensor) -> dict[str, Any]:
        return {"score": "additive", "vector": self.vector}
