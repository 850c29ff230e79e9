"""Launches of attention of several queries: the kernels of `attention_pairs` and `attention_additive`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.triton import attention_additive as additive
from rnnkern.triton import attention_pairs as pairs
from rnnkern.triton.attention_call import PAIR_UNIT, Call, Gradients, Rows, fit, pair_row
from rnnkern.triton.config import divide_up
from rnnkern.triton.launch import launch

_FACTOR_ROWS, _FACTOR_COLUMNS = int(additive.FACTOR_ROWS.value), int(additive.FACTOR_COLUMNS.value)


class _Factors(NamedTuple):
    """Exponentials of rows [B, T, A]; T' is T padded to tiles, A' likewise."""

    by_column: Tensor | None  # float [B, A', T']
    by_row: Tensor | None  # float [B, T', A']
    large: Tensor  # int32 [B, T' / 64, A' / 32]


def _factorize(call: Call, rows: Rows, *, keys: bool, by_row: bool) -> _Factors:
    assert rows.tensor is not None
    B, T, A = rows.tensor.shape
    down, across = divide_up(T, _FACTOR_ROWS), divide_up(A, _FACTOR_COLUMNS)
    height, width = down * _FACTOR_ROWS, across * _FACTOR_COLUMNS
    found = _Factors(
        call.floats(B, width, height),
        call.floats(B, height, width) if by_row else None,
        call.empty(B, down, across, dtype=torch.int32),
    )
    launch(
        additive.factorize,
        (B * down * across,),
        rows.tensor,
        call.lengths if keys else None,
        call.mask if keys else None,
        *found,
        T,
        down,
        rows.batch // call.unit,
        rows.row // call.unit,
        A=A,
        UNIT=call.unit,
        num_warps=4,
    )
    return found


def _additive_scores(call: Call, query: _Factors, key: _Factors) -> Tensor:
    """float [B, Tq, Tk']."""
    scores = call.floats(call.B, call.Tq, pair_row(call.Tk))
    block = min(_FACTOR_ROWS, 16 if call.Tq <= 16 else 64)
    launch(
        additive.additive_scores,
        (call.B * divide_up(call.Tq, block) * divide_up(call.Tk, _FACTOR_ROWS),),
        call.query.tensor,
        call.key.tensor,
        query.by_column,
        key.by_column,
        query.large,
        key.large,
        call.vector,
        call.lengths,
        call.mask,
        scores,
        call.Tq,
        call.Tk,
        *call.strides[:4],
        A=call.D,
        UNIT=call.unit,
        BLOCK_Q=block,
        BLOCK_K=_FACTOR_ROWS,
        APPROXIMATE=call.approximate,
        num_warps=block // 8,
    )
    return scores


def pair_bytes(call: Call, backward: bool) -> int:
    """Of what passes between kernels, for one batch row."""
    pairs_bytes = call.Tq * pair_row(call.Tk) * call.dtype.itemsize * 2 if backward else 0
    if call.vector is None:
        return pairs_bytes
    tiles = divide_up(call.Tq, _FACTOR_ROWS) + divide_up(call.Tk, _FACTOR_ROWS)
    floats = call.Tq * pair_row(call.Tk) + tiles * _FACTOR_ROWS * (call.D + _FACTOR_COLUMNS)
    return pairs_bytes + 4 * floats * (2 if backward else 1)


def attend_many(call: Call, context: Tensor, weights: Tensor | None) -> None:
    """Writes the context [B, Tq, Dv] and, where they are wanted, the weights [B, Tq, Tk]."""
    blocks = call.blocks
    scores = None
    if call.vector is not None:
        query = _factorize(call, call.query, keys=False, by_row=False)
        scores = _additive_scores(call, query, _factorize(call, call.key, keys=True, by_row=False))
    stats = None if weights is None else call.floats(call.B, call.Tq, 2)
    sizes: dict[str, Any] = {
        "D": call.D,
        "Dv": call.Dv,
        "UNIT": call.unit,
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
        "BLOCK_D": blocks.inner,
        "PRECISION": call.precision,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    down = divide_up(call.Tq, blocks.queries)
    launch(
        pairs.attend,
        (call.B * down * divide_up(call.Dv, blocks.columns),),
        *call.tensors,
        scores,
        call.lengths,
        call.mask,
        context,
        stats,
        call.Tq,
        call.Tk,
        *call.strides,
        call.scale,
        BLOCK_V=blocks.columns,
        **sizes,
    )
    if weights is None:
        return
    launch(
        pairs.pair_weights,
        (call.B * down * divide_up(call.Tk, blocks.keys),),
        *call.tensors,
        scores,
        None,
        None,
        call.lengths,
        call.mask,
        stats,
        weights,
        None,
        call.Tq,
        call.Tk,
        *call.strides,
        0,
        0,
        call.scale,
        WEIGHTS_UNIT=1,
        STATS=2,
        **sizes,
    )


def _sum_pairs(call: Call, pair: Tensor, right: Rows, result: Tensor, *, over_keys: bool) -> None:
    rows, terms = (call.Tq, call.Tk) if over_keys else (call.Tk, call.Tq)
    columns = result.shape[2]
    block, inner, across = 32 if rows > 16 else 16, 32, fit(columns, call.blocks.columns)
    if call.dtype != torch.float32:
        block, inner = 2 * block if rows > 16 else block, 2 * inner
    launch(
        pairs.sum_pairs,
        (call.B * divide_up(rows, block) * divide_up(columns, across),),
        pair,
        right.tensor,
        call.lengths,
        call.mask,
        result,
        rows,
        terms,
        call.Tk,
        right.batch // call.unit,
        right.row // call.unit,
        COLUMNS=columns,
        UNIT=call.unit,
        OVER_KEYS=over_keys,
        BLOCK_ROWS=block,
        BLOCK_TERMS=inner,
        BLOCK_COLUMNS=across,
        PRECISION=call.precision,
        num_warps=4,
        num_stages=2,
    )


def _additive_gradient(
    call: Call,
    own: Rows,
    other: Rows,
    own_factors: _Factors,
    other_factors: _Factors,
    dscores: Tensor,
    down: Tensor,
    *,
    own_keys: bool,
) -> Tensor | None:
    """Writes the gradient of `own`; returns the parts of the vector's [B, tiles, A] where own are the keys."""
    T, T_other = (call.Tk, call.Tq) if own_keys else (call.Tq, call.Tk)
    block = 16 if T <= 16 else 64
    tiles = divide_up(T, block)
    parts = call.floats(call.B, tiles, call.D) if own_keys else None
    launch(
        additive.additive_gradient,
        (call.B * tiles * divide_up(call.D, _FACTOR_COLUMNS),),
        own.tensor,
        other.tensor,
        own_factors.by_row,
        other_factors.by_row,
        own_factors.large,
        other_factors.large,
        call.vector,
        dscores,
        call.lengths,
        call.mask,
        down,
        parts,
        T,
        T_other,
        call.Tk,
        *(stride // call.unit for rows in (own, other) for stride in (rows.batch, rows.row)),
        A=call.D,
        UNIT=call.unit,
        OWN_KEYS=own_keys,
        BLOCK=block,
        APPROXIMATE=call.approximate,
        num_warps=4,
    )
    return parts


def gradients_many(call: Call, out: Gradients) -> Tensor | None:
    """Writes the gradients; returns the vector's, float [D], for the additive score."""
    blocks, B, Tq, Tk = call.blocks, call.B, call.Tq, call.Tk
    scores = query_factors = key_factors = None
    if call.vector is not None:
        query_factors = _factorize(call, call.query, keys=False, by_row=True)
        key_factors = _factorize(call, call.key, keys=True, by_row=True)
        scores = _additive_scores(call, query_factors, key_factors)
    stats = call.floats(B, Tq, 3)
    sizes: dict[str, Any] = {
        "D": call.D,
        "Dv": call.Dv,
        "UNIT": call.unit,
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
        "BLOCK_D": blocks.inner,
        "PRECISION": call.precision,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    inputs = (*call.tensors, scores, call.dcontext.tensor, call.dweights, call.lengths, call.mask, stats)
    shape = (Tq, Tk, *call.strides, *call.gradient_strides)
    down = divide_up(Tq, blocks.queries)
    launch(pairs.gradient_stats, (B * down,), *inputs, *shape, call.scale, **sizes)
    weights = call.empty(B, Tq, pair_row(Tk))
    dscores = call.empty(B, Tq, pair_row(Tk), dtype=None if call.vector is None else torch.float32)
    launch(
        pairs.pair_weights,
        (B * down * divide_up(Tk, blocks.keys),),
        *inputs,
        weights,
        dscores,
        *shape,
        call.scale,
        WEIGHTS_UNIT=PAIR_UNIT,
        STATS=3,
        **sizes,
    )
    if call.dcontext.tensor is None:
        out.value.zero_()
    else:
        _sum_pairs(call, weights, call.dcontext, out.value, over_keys=False)
    if query_factors is None or key_factors is None:
        _sum_pairs(call, dscores, call.key, out.query, over_keys=True)
        _sum_pairs(call, dscores, call.query, out.key, over_keys=False)
        return None
    of_query, of_key = (call.query, query_factors), (call.key, key_factors)
    (q, q_factors), (k, k_factors) = of_query, of_key
    _additive_gradient(call, q, k, q_factors, k_factors, dscores, out.query, own_keys=False)
    parts = _additive_gradient(call, k, q, k_factors, q_factors, dscores, out.key, own_keys=True)
    assert parts is not None
    return parts.sum((0, 1))
