"""Attention of one query per row, a step of a decoder, forward and backward.

A program has BLOCK_K keys of one row, whatever the batch, so that one query fills a GPU and a row's result does not
depend on the batch around it: scores, their softmax, their part of the context; a second kernel joins a row's parts in
order. One part is no part: then the first kernel does all. Backward the same way: scores and dL/dweights of the part's
keys first, then, once every part's largest score and sums are known, gradients of its keys and values and its part of
the query's.

Memory-bound: forward reads keys and values once, 2 (D + Dv) bytes per key in 16 bits, with 4 Dv / BLOCK_K of parts
beside; backward reads them twice and writes as much. B = 64, Tk = 1000, D = Dv = 512 in bfloat16 is 131 MB forward.
The additive score takes an exponential and a reciprocal per element of a key, from the sum q + k as it is: there is no
other query to share e^2k with, and no guard to want.
"""

import triton
import triton.language as tl

from rnnkern.triton.attention_parts import (
    UNALIGNED,
    are_valid,
    batch_pointer,
    count_keys,
    finite_base,
    guarded_denominator,
    invert,
    invert_sum,
    load_rows,
    row_pointers,
)

_STRIDES = [f"{name}_{which}" for name in ("key", "value") for which in ("batch", "row")]
_BATCHES = ["query_batch", "dcontext_batch"]


@triton.jit
def _find_part(lengths, mask, Tk, BLOCK_K: tl.constexpr):
    """Of this program: its number, its row, its keys, which of them are valid, and whether any is."""
    parts = tl.cdiv(Tk, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    b = program // parts
    first = (program % parts * BLOCK_K).to(tl.int32)
    keys = first + tl.arange(0, BLOCK_K)
    count = count_keys(lengths, b, Tk)
    valid = are_valid(mask, b, keys, count, Tk)
    some = first < count
    if mask is not None:
        some = tl.max(valid.to(tl.int32), 0) > 0
    return program, b, keys, valid, some


@triton.jit
def _mark_valid(largest, some):
    """A part's largest score, finite where all of its valid keys have -inf: -inf tells that there are none."""
    LOWEST: tl.constexpr = -3.4028234663852886e38
    return tl.where((largest == float("-inf")) & some, LOWEST, largest)


@triton.jit
def _part_scores(
    query,
    key_rows,
    vector,
    valid,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """[keys], -inf where padding; query points to the row's elements."""
    terms = tl.zeros((valid.shape[0], BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        q = tl.load(query + columns, mask=columns < D, other=0.0).to(tl.float32)
        k = load_rows(key_rows, valid, columns, D).to(tl.float32)
        if vector is None:
            terms += q[None, :] * k
        else:
            v = tl.load(vector + columns, mask=columns < D, other=0.0).to(tl.float32)
            terms += v[None, :] * (0.5 - invert(guarded_denominator(q[None, :], k), APPROXIMATE))
    factor = scale if vector is None else 2.0
    return tl.where(valid, factor * tl.sum(terms, 1), float("-inf"))


@triton.jit(do_not_specialize=["Tk", "query_batch", *_STRIDES], do_not_specialize_on_alignment=UNALIGNED)
def attend_part(
    query,  # S [B, 1, D]
    key,  # S [B, Tk, D]
    value,  # S [B, Tk, Dv]
    vector,  # S [D], or None: dot
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    context,  # ALONE: S [B, 1, Dv], else float [B, parts, Dv]: sums of exponentials times values
    weights,  # ALONE: S [B, 1, Tk], else float [B, 1, Tk]: scores; or None
    stats,  # float [B, parts, 2]: largest score, sum of exponentials; not ALONE
    Tk,
    query_batch,
    key_batch,
    key_row,
    value_batch,
    value_row,
    scale,
    D: tl.constexpr,
    Dv: tl.constexpr,
    UNIT: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Of a part of a row's keys: its share of the context, or all of it."""
    program, b, keys, valid, some = _find_part(lengths, mask, Tk, BLOCK_K)
    key_rows = row_pointers(key, b, keys, key_batch, key_row, UNIT)
    scores = _part_scores(
        batch_pointer(query, b, query_batch, UNIT), key_rows, vector, valid, scale, D, BLOCK_D, APPROXIMATE
    )
    largest = tl.max(scores, 0)
    power = tl.exp(scores - finite_base(largest))
    total = tl.sum(power, 0)
    if ALONE:
        power = tl.where(valid, power * invert_sum(total, some), 0.0)
    else:
        tl.store(stats + program * 2, _mark_valid(largest, some))
        tl.store(stats + program * 2 + 1, total)
    if weights is not None:
        out = power if ALONE else scores
        tl.store(weights + b * Tk + keys, out.to(weights.dtype.element_ty), mask=keys < Tk)
    value_rows = row_pointers(value, b, keys, value_batch, value_row, UNIT)
    for start in range(0, Dv, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        values = load_rows(value_rows, valid, columns, Dv).to(tl.float32)
        sums = tl.sum(power[:, None] * values, 0)
        tl.store(context + program * Dv + columns, sums.to(context.dtype.element_ty), mask=columns < Dv)


@triton.jit
def _join_stats(stats, parts, STATS: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """A row's largest score, 1 / sum of exponentials and, of three stats, mean gradient; stats points to the row's.

    The largest is that of `_mark_valid`.
    """
    largest = tl.full((BLOCK_PARTS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_PARTS,), tl.float32)
    mean = tl.zeros((BLOCK_PARTS,), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        there = part < parts
        of_part = tl.load(stats + part * STATS, mask=there, other=float("-inf"))
        before = largest
        largest = tl.maximum(before, of_part)
        base = finite_base(largest)
        shrink = tl.exp(before - base)
        power = tl.exp(of_part - base)
        total = total * shrink + power * tl.load(stats + part * STATS + 1, mask=there, other=0.0)
        if STATS == 3:
            mean = mean * shrink + power * tl.load(stats + part * STATS + 2, mask=there, other=0.0)
    most = tl.max(largest, 0)
    power = tl.exp(largest - finite_base(most))
    inverse = invert_sum(tl.sum(total * power, 0), most != float("-inf"))
    return most, inverse, tl.sum(mean * power, 0) * inverse


@triton.jit(do_not_specialize=["Tk", "parts"], do_not_specialize_on_alignment=UNALIGNED)
def join_parts(
    stats,  # float [B, parts, 2]
    context_parts,  # float [B, parts, Dv]
    scores,  # float [B, Tk], or None: no weights
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    context,  # S [B, Dv]
    weights,  # S [B, Tk] or None
    Tk,
    parts,
    Dv: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of the context, or keys of the weights
):
    """Of some columns of a row's context, or keys of its weights: the sum over parts."""
    across: tl.constexpr = (Dv + BLOCK - 1) // BLOCK
    blocks = across
    if weights is not None:
        blocks += tl.cdiv(Tk, BLOCK)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    block = program % blocks
    largest, inverse, _ = _join_stats(stats + b * parts * 2, parts, 2, BLOCK_PARTS)
    base = finite_base(largest)
    if block < across:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK_PARTS, BLOCK), tl.float32)
        for first in range(0, parts, BLOCK_PARTS):
            part = first + tl.arange(0, BLOCK_PARTS)
            power = tl.exp(tl.load(stats + (b * parts + part) * 2, mask=part < parts, other=float("-inf")) - base)
            places = (b * parts + part[:, None]) * Dv + columns[None, :]
            inside = (part < parts)[:, None] & (columns < Dv)[None, :]
            total += power[:, None] * tl.load(context_parts + places, mask=inside, other=0.0)
        result = tl.sum(total, 0) * inverse
        tl.store(context + b * Dv + columns, result.to(context.dtype.element_ty), mask=columns < Dv)
    elif weights is not None:
        keys = (block - across) * BLOCK + tl.arange(0, BLOCK)
        valid = are_valid(mask, b, keys, count_keys(lengths, b, Tk), Tk)
        score = tl.load(scores + b * Tk + keys, mask=valid, other=float("-inf"))
        weight = tl.where(valid, tl.exp(score - base) * inverse, 0.0)
        tl.store(weights + b * Tk + keys, weight.to(weights.dtype.element_ty), mask=keys < Tk)


@triton.jit(do_not_specialize=["Tk", *_BATCHES, *_STRIDES], do_not_specialize_on_alignment=UNALIGNED)
def score_part(
    query,  # S [B, 1, D]
    key,  # S [B, Tk, D]
    value,  # S [B, Tk, Dv]
    vector,  # S [D], or None: dot
    dcontext,  # S [B, 1, Dv], or None: zero
    dweights,  # S [B, 1, Tk], or None: zero
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    scores,  # float [B, Tk], -inf where padding
    gradients,  # float [B, Tk]: dL/dweights, by way of the context too
    stats,  # float [B, parts, 3]: largest score, sum of exponentials, and of these times dL/dweights
    Tk,
    query_batch,
    key_batch,
    key_row,
    value_batch,
    value_row,
    dcontext_batch,
    scale,
    D: tl.constexpr,
    Dv: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Of a part of a row's keys: scores, dL/dweights, and what the softmax takes of them."""
    program, b, keys, valid, some = _find_part(lengths, mask, Tk, BLOCK_K)
    key_rows = row_pointers(key, b, keys, key_batch, key_row, UNIT)
    of_keys = _part_scores(
        batch_pointer(query, b, query_batch, UNIT), key_rows, vector, valid, scale, D, BLOCK_D, APPROXIMATE
    )
    gradient = tl.zeros((BLOCK_K,), tl.float32)
    if dcontext is not None:
        value_rows = row_pointers(value, b, keys, value_batch, value_row, UNIT)
        gradient = _part_scores(
            batch_pointer(dcontext, b, dcontext_batch, UNIT), value_rows, None, valid, 1.0, Dv, BLOCK_D, APPROXIMATE
        )
        gradient = tl.where(valid, gradient, 0.0)
    if dweights is not None:
        gradient += tl.load(dweights + b * Tk + keys, mask=valid, other=0.0).to(tl.float32)
    largest = tl.max(of_keys, 0)
    power = tl.exp(of_keys - finite_base(largest))
    tl.store(stats + program * 3, _mark_valid(largest, some))
    tl.store(stats + program * 3 + 1, tl.sum(power, 0))
    tl.store(stats + program * 3 + 2, tl.sum(power * gradient, 0))
    tl.store(scores + b * Tk + keys, of_keys, mask=keys < Tk)
    tl.store(gradients + b * Tk + keys, gradient, mask=keys < Tk)


@triton.jit(do_not_specialize=["Tk", *_BATCHES, "key_batch", "key_row"], do_not_specialize_on_alignment=UNALIGNED)
def gradient_part(
    query,  # S [B, 1, D]
    key,  # S [B, Tk, D]
    vector,  # S [D], or None: dot
    dcontext,  # S [B, 1, Dv], or None: zero
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    scores,  # float [B, Tk]
    gradients,  # float [B, Tk]
    stats,  # float [B, parts, 3]
    dquery_parts,  # float [B, parts, D]
    dkey,  # S [B, Tk, D]
    dvalue,  # S [B, Tk, Dv]
    dvector_parts,  # float [B, parts, D]; additive
    Tk,
    query_batch,
    key_batch,
    key_row,
    dcontext_batch,
    scale,
    D: tl.constexpr,
    Dv: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Of a part of a row's keys: the gradients of key and value, and shares of those of query and vector."""
    program, b, keys, valid, _ = _find_part(lengths, mask, Tk, BLOCK_K)
    parts = tl.cdiv(Tk, BLOCK_K)
    inside = keys < Tk
    largest, inverse, mean = _join_stats(stats + b * parts * 3, parts, 3, BLOCK_PARTS)
    score = tl.load(scores + b * Tk + keys, mask=valid, other=float("-inf"))
    weight = tl.where(valid, tl.exp(score - finite_base(largest)) * inverse, 0.0)
    gradient = tl.load(gradients + b * Tk + keys, mask=valid, other=0.0)
    dscore = tl.where(valid, weight * (gradient - mean), 0.0)

    key_rows = row_pointers(key, b, keys, key_batch, key_row, UNIT)
    out_rows = b * Tk + keys
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        q = tl.load(batch_pointer(query, b, query_batch, UNIT) + columns, mask=columns < D, other=0.0).to(tl.float32)
        k = load_rows(key_rows, valid, columns, D).to(tl.float32)
        if vector is None:
            by_query = (scale * dscore)[:, None] * k
            by_key = (scale * dscore)[:, None] * q[None, :]
        else:
            v = tl.load(vector + columns, mask=columns < D, other=0.0).to(tl.float32)
            half = 0.5 - invert(guarded_denominator(q[None, :], k), APPROXIMATE)
            by_query = dscore[:, None] * (4.0 * v)[None, :] * (0.25 - half * half)
            by_key = by_query
            of_vector = 2.0 * tl.sum(dscore[:, None] * half, 0)
            tl.store(dvector_parts + program * D + columns, of_vector, mask=columns < D)
        tl.store(dquery_parts + program * D + columns, tl.sum(by_query, 0), mask=columns < D)
        by_key = tl.where(valid[:, None], by_key, 0.0)
        places = out_rows[:, None] * D + columns[None, :]
        tl.store(dkey + places, by_key.to(dkey.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])
    for start in range(0, Dv, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        by_value = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        if dcontext is not None:
            dc = tl.load(batch_pointer(dcontext, b, dcontext_batch, UNIT) + columns, mask=columns < Dv, other=0.0)
            by_value = tl.where(valid[:, None], weight[:, None] * dc.to(tl.float32)[None, :], 0.0)
        places = out_rows[:, None] * Dv + columns[None, :]
        tl.store(dvalue + places, by_value.to(dvalue.dtype.element_ty), mask=inside[:, None] & (columns < Dv)[None, :])
