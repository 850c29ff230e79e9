"""Attention of several queries: forward with an online softmax, and what its gradient takes of all pairs.

Forward: a program has BLOCK_Q queries of one row and BLOCK_V columns of the context, and goes over the keys once; a
tile of scores lives in registers alone. Backward: scores and dL/dweights = dcontext value^T are computed twice, once
for the softmax's largest score, sum and mean gradient of each query, once for weights and dscores of each pair, which
are written [B, Tq, Tk] in the storage type, for as many batch rows at a time as an L2 cache holds; then dvalue =
weights^T dcontext, dkey = dscores^T query and dquery = dscores key are products of their own, whose factors are of that
type: in float16 a dscore below 6e-5 loses digits and one below 3e-8 is zero, unless the loss is scaled. So no result
takes atomics, and the sizes D and Dv of an RNN, 256 to 1024, whose sums no program could hold, cost no scores a third
time.

The scores are scale query key^T or, of the additive score, given [B, Tq, Tk]. A pair takes 2 (D + Dv) flops forward (a
second block of columns: 2 D more) and 4 (D + Dv) + 2 (2 D + Dv) backward; against that stand 12 bytes through the L2
cache: at D = Dv = 256 tensor cores are the bound, 1024 flops forward, 3584 backward.

Tk' is Tk rounded up to PAIR_UNIT. Shapes are run-time, sizes of rows D and Dv compile-time.
"""

import triton
import triton.language as tl

from rnnkern.triton.arithmetic import multiply
from rnnkern.triton.attention_parts import (
    PAIR_UNIT,
    UNALIGNED,
    are_valid,
    count_keys,
    finite_base,
    invert_sum,
    load_rows,
    multiply_rows,
    pair_pointers,
    pair_row,
    row_pointers,
    some_are_valid,
)

_LENGTHS = ["Tq", "Tk"]
_STRIDES = [f"{name}_{which}" for name in ("query", "key", "value") for which in ("batch", "row")]
_GRADIENT_STRIDES = ["dcontext_batch", "dcontext_row"]


@triton.jit
def _score_tile(
    query_rows,
    query_there,
    key_rows,
    valid,
    given,
    given_there,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[queries, keys], -inf where a key is padding; given: pointers to these scores, or None.

    Given scores are read beyond the valid keys, up to the end of their row: aligned, 16 bytes at a time.
    """
    if given is None:
        scores = scale * multiply_rows(query_rows, query_there, key_rows, valid, D, BLOCK_D, PRECISION)
    else:
        scores = tl.load(given, mask=query_there[:, None] & given_there[None, :], other=0.0)
    return tl.where(valid[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=[*_LENGTHS, *_STRIDES], do_not_specialize_on_alignment=UNALIGNED)
def attend(
    query,  # S [B, Tq, D]
    key,  # S [B, Tk, D]
    value,  # S [B, Tk, Dv]
    scores,  # float [B, Tq, Tk'], or None: dot
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    context,  # S [B, Tq, Dv]
    stats,  # float [B, Tq, 2] or None: largest score, 1 / sum of exponentials
    Tq,
    Tk,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    scale,
    D: tl.constexpr,
    Dv: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a tile of queries and columns: the context, by an online softmax over all keys."""
    across: tl.constexpr = (Dv + BLOCK_V - 1) // BLOCK_V
    down = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    b = (program // (across * down)).to(tl.int64)
    first_query = program // across % down * BLOCK_Q
    queries = first_query + tl.arange(0, BLOCK_Q)
    columns = program % across * BLOCK_V + tl.arange(0, BLOCK_V)
    there = queries < Tq
    query_rows = row_pointers(query, b, queries, query_batch, query_row, UNIT)

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    result = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    count = count_keys(lengths, b, Tk)
    row = pair_row(Tk, PAIR_UNIT)
    for first in range(0, count, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        valid = are_valid(mask, b, keys, count, Tk)
        key_rows = row_pointers(key, b, keys, key_batch, key_row, UNIT)
        given = None
        if scores is not None:
            given = pair_pointers(scores, b, Tq, first_query, first, row, BLOCK_Q, BLOCK_K)
        tile = _score_tile(query_rows, there, key_rows, valid, given, keys < row, scale, D, BLOCK_D, PRECISION)
        before = largest
        largest = tl.maximum(before, tl.max(tile, 1))
        base = finite_base(largest)
        power = tl.exp(tile - base[:, None])
        shrink = tl.exp(before - base)
        total = total * shrink + tl.sum(power, 1)
        values = load_rows(row_pointers(value, b, keys, value_batch, value_row, UNIT), valid, columns, Dv)
        result = multiply(power.to(value.dtype.element_ty), values, result * shrink[:, None], PRECISION)
    inverse = invert_sum(total, some_are_valid(mask, b, count, Tk, BLOCK_K))
    out = context + (b * Tq + queries[:, None]) * Dv + columns[None, :]
    tl.store(
        out, (result * inverse[:, None]).to(context.dtype.element_ty), mask=there[:, None] & (columns < Dv)[None, :]
    )
    if stats is not None and program % across == 0:
        tl.store(stats + (b * Tq + queries) * 2, largest, mask=there)
        tl.store(stats + (b * Tq + queries) * 2 + 1, inverse, mask=there)


@triton.jit
def _gradient_tile(
    dcontext_rows,
    query_there,
    value_rows,
    valid,
    dweights,
    Dv: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dweights of a tile, by way of the context and of itself: pointers [queries], [queries, keys]; None is zero."""
    gradient = tl.zeros((query_there.shape[0], valid.shape[0]), tl.float32)
    if dcontext_rows is not None:
        gradient = multiply_rows(dcontext_rows, query_there, value_rows, valid, Dv, BLOCK_D, PRECISION)
    if dweights is not None:
        gradient += tl.load(dweights, mask=query_there[:, None] & valid[None, :], other=0.0).to(tl.float32)
    return gradient


@triton.jit(do_not_specialize=[*_LENGTHS, *_STRIDES, *_GRADIENT_STRIDES], do_not_specialize_on_alignment=UNALIGNED)
def gradient_stats(
    query,  # S [B, Tq, D]
    key,  # S [B, Tk, D]
    value,  # S [B, Tk, Dv]
    scores,  # float [B, Tq, Tk'], or None: dot
    dcontext,  # S [B, Tq, Dv], or None: zero
    dweights,  # S [B, Tq, Tk], or None: zero
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    stats,  # float [B, Tq, 3]: largest score, 1 / sum of exponentials, sum of weights dL/dweights
    Tq,
    Tk,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    dcontext_batch,
    dcontext_row,
    scale,
    D: tl.constexpr,
    Dv: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a tile of queries: what their softmax and its gradient take of all keys."""
    down = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    b = (program // down).to(tl.int64)
    first_query = program % down * BLOCK_Q
    queries = first_query + tl.arange(0, BLOCK_Q)
    there = queries < Tq
    query_rows = row_pointers(query, b, queries, query_batch, query_row, UNIT)

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    mean = tl.zeros((BLOCK_Q,), tl.float32)
    count = count_keys(lengths, b, Tk)
    row = pair_row(Tk, PAIR_UNIT)
    for first in range(0, count, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        valid = are_valid(mask, b, keys, count, Tk)
        given = None
        if scores is not None:
            given = pair_pointers(scores, b, Tq, first_query, first, row, BLOCK_Q, BLOCK_K)
        key_rows = row_pointers(key, b, keys, key_batch, key_row, UNIT)
        tile = _score_tile(query_rows, there, key_rows, valid, given, keys < row, scale, D, BLOCK_D, PRECISION)
        dcontext_rows = None
        if dcontext is not None:
            dcontext_rows = row_pointers(dcontext, b, queries, dcontext_batch, dcontext_row, UNIT)
        weight_gradients = None
        if dweights is not None:
            weight_gradients = pair_pointers(dweights, b, Tq, first_query, first, Tk, BLOCK_Q, BLOCK_K)
        value_rows = row_pointers(value, b, keys, value_batch, value_row, UNIT)
        gradient = _gradient_tile(dcontext_rows, there, value_rows, valid, weight_gradients, Dv, BLOCK_D, PRECISION)
        before = largest
        largest = tl.maximum(before, tl.max(tile, 1))
        base = finite_base(largest)
        power = tl.exp(tile - base[:, None])
        shrink = tl.exp(before - base)
        total = total * shrink + tl.sum(power, 1)
        mean = mean * shrink + tl.sum(power * gradient, 1)
    inverse = invert_sum(total, some_are_valid(mask, b, count, Tk, BLOCK_K))
    at = stats + (b * Tq + queries) * 3
    tl.store(at, largest, mask=there)
    tl.store(at + 1, inverse, mask=there)
    tl.store(at + 2, mean * inverse, mask=there)


@triton.jit(do_not_specialize=[*_LENGTHS, *_STRIDES, *_GRADIENT_STRIDES], do_not_specialize_on_alignment=UNALIGNED)
def pair_weights(
    query,  # S [B, Tq, D]
    key,  # S [B, Tk, D]
    value,  # S [B, Tk, Dv]
    scores,  # float [B, Tq, Tk'], or None: dot
    dcontext,  # S [B, Tq, Dv], or None: zero
    dweights,  # S [B, Tq, Tk], or None: zero
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    stats,  # float [B, Tq, STATS], of `attend` or `gradient_stats`
    weights,  # S [B, Tq, Tk rounded up to WEIGHTS_UNIT]
    dscores,  # S or float [B, Tq, Tk'], before their scale; or None: weights alone
    Tq,
    Tk,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    dcontext_batch,
    dcontext_row,
    scale,
    D: tl.constexpr,
    Dv: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHTS_UNIT: tl.constexpr,  # PAIR_UNIT, or 1: rows of Tk
    STATS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a tile of pairs: zero where a key is padding."""
    across = tl.cdiv(Tk, BLOCK_K)
    down = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    b = (program // across // down).to(tl.int64)
    first_query = program // across % down * BLOCK_Q
    first_key = program % across * BLOCK_K
    queries = first_query + tl.arange(0, BLOCK_Q)
    keys = first_key + tl.arange(0, BLOCK_K)
    there = queries < Tq
    valid = are_valid(mask, b, keys, count_keys(lengths, b, Tk), Tk)

    row = pair_row(Tk, PAIR_UNIT)
    given = None
    if scores is not None:
        given = pair_pointers(scores, b, Tq, first_query, first_key, row, BLOCK_Q, BLOCK_K)
    query_rows = row_pointers(query, b, queries, query_batch, query_row, UNIT)
    key_rows = row_pointers(key, b, keys, key_batch, key_row, UNIT)
    tile = _score_tile(query_rows, there, key_rows, valid, given, keys < row, scale, D, BLOCK_D, PRECISION)
    at = stats + (b * Tq + queries) * STATS
    base = finite_base(tl.load(at, mask=there, other=0.0))
    inverse = tl.load(at + 1, mask=there, other=0.0)
    weight = tl.where(valid[None, :], tl.exp(tile - base[:, None]) * inverse[:, None], 0.0)
    weights_row = pair_row(Tk, WEIGHTS_UNIT)
    out = pair_pointers(weights, b, Tq, first_query, first_key, weights_row, BLOCK_Q, BLOCK_K)
    tl.store(out, weight.to(weights.dtype.element_ty), mask=there[:, None] & (keys < weights_row)[None, :])
    if dscores is not None:
        dcontext_rows = None
        if dcontext is not None:
            dcontext_rows = row_pointers(dcontext, b, queries, dcontext_batch, dcontext_row, UNIT)
        weight_gradients = None
        if dweights is not None:
            weight_gradients = pair_pointers(dweights, b, Tq, first_query, first_key, Tk, BLOCK_Q, BLOCK_K)
        value_rows = row_pointers(value, b, keys, value_batch, value_row, UNIT)
        gradient = _gradient_tile(dcontext_rows, there, value_rows, valid, weight_gradients, Dv, BLOCK_D, PRECISION)
        mean = tl.load(at + 2, mask=there, other=0.0)
        dscore = tl.where(valid[None, :], weight * (gradient - mean[:, None]) * scale, 0.0)
        out = pair_pointers(dscores, b, Tq, first_query, first_key, row, BLOCK_Q, BLOCK_K)
        tl.store(out, dscore.to(dscores.dtype.element_ty), mask=there[:, None] & (keys < row)[None, :])


@triton.jit(
    do_not_specialize=["rows", "terms", "Tk", "right_batch", "right_row"], do_not_specialize_on_alignment=UNALIGNED
)
def sum_pairs(
    pairs,  # S [B, Tq, Tk']: weights or dscores, zero where a key is padding
    right,  # S [B, terms, COLUMNS]: what belongs to the keys, or to the queries
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    result,  # S [B, rows, COLUMNS]
    rows,  # Tq if the terms are keys, or Tk if they are queries
    terms,
    Tk,
    right_batch,
    right_row,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    OVER_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """result[i] = sum_j pairs[i, j] right[j]; or result[j] = sum_i pairs[i, j] right[i], zero where j is padding."""
    across: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    down = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0)
    b = (program // (across * down)).to(tl.int64)
    first_row = program // across % down * BLOCK_ROWS
    own = first_row + tl.arange(0, BLOCK_ROWS)
    columns = program % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    own_there = own < rows
    count = count_keys(lengths, b, Tk)
    row = pair_row(Tk, PAIR_UNIT)
    end = count
    if not OVER_KEYS:
        own_valid = are_valid(mask, b, own, count, Tk)
        end = tl.where(first_row < count, terms, 0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, end, BLOCK_TERMS):
        others = first + tl.arange(0, BLOCK_TERMS)
        if OVER_KEYS:
            there = are_valid(mask, b, others, count, Tk)
            tile = pair_pointers(pairs, b, rows, first_row, first, row, BLOCK_ROWS, BLOCK_TERMS)
            left = tl.load(tile, mask=own_there[:, None] & (others < row)[None, :], other=0.0)
        else:
            there = others < terms
            tile = pair_pointers(pairs, b, terms, first, first_row, row, BLOCK_TERMS, BLOCK_ROWS)
            left = tl.trans(tl.load(tile, mask=there[:, None] & (own < row)[None, :], other=0.0))
        values = load_rows(row_pointers(right, b, others, right_batch, right_row, UNIT), there, columns, COLUMNS)
        total = multiply(left, values, total, PRECISION)
    if not OVER_KEYS:
        total = tl.where(own_valid[:, None], total, 0.0)
    out = result + (b * rows + own[:, None]) * COLUMNS + columns[None, :]
    tl.store(out, total.to(result.dtype.element_ty), mask=own_there[:, None] & (columns < COLUMNS)[None, :])
