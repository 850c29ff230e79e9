"""Additive scores of many queries and keys, score(q, k) = sum_a vector_a tanh(q_a + k_a), and their gradients.

tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k): a kernel of its own takes the exponentials, once per element, into
float32 "factors"; what is left for each term of each pair is a multiply-add, half a reciprocal and a multiply-add, and
three more multiplications for every reciprocal that two terms share. Where a tile of FACTOR_ROWS x FACTOR_COLUMNS
elements has one beyond FACTOR_LIMIT, it is flagged, and whoever needs it takes e^2(q + k) anew for each pair.

Scores: a program has a tile of pairs in registers and goes over a; the factors lie [B, A, T], so that those of an a are
consecutive. Gradients: the two are one function of (own, other), called with (query, key) and with (key, query): a
program has a tile [own rows, columns] of factors and of sums in registers and goes over the other's rows, whose factors
lie [B, T, A]. So no sum crosses threads within the loops, and none takes atomics; the reciprocals are taken twice.

Napkin: 3 multiply-adds and half a reciprocal per term forward, 4.5 for the queries and 5.5 for the keys backward, which
at 128 multiply-adds and 16 reciprocals per clock of a multiprocessor is 32, 28 and 23 terms per clock. Factors are 4
bytes per element, [B, T, A] once forward, twice backward, for as many batch rows at a time as an L2 cache holds.
"""

import triton
import triton.language as tl

from rnnkern.triton.attention_parts import (
    FACTOR_LIMIT,
    PAIR_UNIT,
    UNALIGNED,
    are_valid,
    batch_pointer,
    count_keys,
    exp_twice,
    guarded_denominator,
    invert,
    invert_both,
    pair_pointers,
    pair_row,
    row_pointers,
)

FACTOR_ROWS = tl.constexpr(64)
FACTOR_COLUMNS = tl.constexpr(32)
_ROWS = [f"{name}_{which}" for name in ("own", "other") for which in ("batch", "row")]
_STRIDES = [f"{name}_{which}" for name in ("query", "key") for which in ("batch", "row")]


@triton.jit(do_not_specialize=["T", "row_tiles", "batch", "row"], do_not_specialize_on_alignment=UNALIGNED)
def factorize(
    rows,  # S [B, T, A]
    lengths,  # int64 [B] or None: all rows are valid
    mask,  # bool [B, T] or None: True is padding
    by_column,  # float [B, column tiles * 32, row tiles * 64], or None
    by_row,  # float [B, row tiles * 64, column tiles * 32], or None
    large,  # int32 [B, row tiles, column tiles]
    T,
    row_tiles,
    batch,
    row,
    A: tl.constexpr,
    UNIT: tl.constexpr,
):
    """e^2x, in both layouts; 1 outside the tensor, for padding and beyond FACTOR_LIMIT. Flags tiles that go beyond."""
    across: tl.constexpr = (A + FACTOR_COLUMNS - 1) // FACTOR_COLUMNS
    program = tl.program_id(0).to(tl.int64)
    b = program // (across * row_tiles)
    i = (program // across % row_tiles * FACTOR_ROWS).to(tl.int32) + tl.arange(0, FACTOR_ROWS)
    columns = (program % across * FACTOR_COLUMNS).to(tl.int32) + tl.arange(0, FACTOR_COLUMNS)
    valid = are_valid(mask, b, i, count_keys(lengths, b, T), T)
    pointers = row_pointers(rows, b, i, batch, row, UNIT)[:, None] + columns[None, :]
    x = tl.load(pointers, mask=valid[:, None] & (columns < A)[None, :], other=0.0).to(tl.float32)
    beyond = (x > FACTOR_LIMIT) | (x < -FACTOR_LIMIT)
    factors = exp_twice(tl.where(beyond, 0.0, x))
    if by_row is not None:
        tl.store(
            by_row + (b * row_tiles * FACTOR_ROWS + i[:, None]) * (across * FACTOR_COLUMNS) + columns[None, :],
            factors,
        )
    if by_column is not None:
        places = (b * (across * FACTOR_COLUMNS) + columns[:, None]) * (row_tiles * FACTOR_ROWS) + i[None, :]
        tl.store(by_column + places, tl.trans(factors))
    tl.store(large + program, tl.max(tl.max(beyond.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=["Tq", "Tk", *_STRIDES], do_not_specialize_on_alignment=UNALIGNED)
def additive_scores(
    query,  # S [B, Tq, A]
    key,  # S [B, Tk, A]
    query_factors,  # float [B, A', Tq'], by column
    key_factors,  # float [B, A', Tk']
    query_large,  # int32 [B, Tq' / 64, A' / 32]
    key_large,  # int32 [B, Tk' / 64, A' / 32]
    vector,  # S [A]
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    scores,  # float [B, Tq, Tk rounded up to PAIR_UNIT]; tiles that are all padding are not written
    Tq,
    Tk,
    query_batch,
    query_row,
    key_batch,
    key_row,
    A: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # divides 64
    BLOCK_K: tl.constexpr,  # divides 64
    APPROXIMATE: tl.constexpr,
):
    """Of a tile of pairs: -2 sum_a vector_a (r - 1/2)."""
    chunks: tl.constexpr = (A + FACTOR_COLUMNS - 1) // FACTOR_COLUMNS
    across = tl.cdiv(Tk, BLOCK_K)
    down = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    b = (program // across // down).to(tl.int64)
    first_query = program // across % down * BLOCK_Q
    first_key = program % across * BLOCK_K
    queries = first_query + tl.arange(0, BLOCK_Q)
    keys = first_key + tl.arange(0, BLOCK_K)
    there = queries < Tq
    count = count_keys(lengths, b, Tk)
    if first_key < count:
        valid = are_valid(mask, b, keys, count, Tk)
        query_tiles = tl.cdiv(Tq, FACTOR_ROWS)
        key_tiles = tl.cdiv(Tk, FACTOR_ROWS)
        query_column = (query_tiles * FACTOR_ROWS).to(tl.int64)
        key_column = (key_tiles * FACTOR_ROWS).to(tl.int64)
        own_query = query_factors + b * (chunks * FACTOR_COLUMNS) * query_column + first_query
        own_key = key_factors + b * (chunks * FACTOR_COLUMNS) * key_column + first_key
        local_query = tl.arange(0, BLOCK_Q)
        local_key = tl.arange(0, BLOCK_K)
        query_flags = query_large + (b * query_tiles + first_query // FACTOR_ROWS) * chunks
        key_flags = key_large + (b * key_tiles + first_key // FACTOR_ROWS) * chunks
        total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for chunk in range(0, chunks):
            first = chunk * FACTOR_COLUMNS
            columns = first + tl.arange(0, FACTOR_COLUMNS)
            # Left to the end, or out, since it is the same for all keys, the sum would grow larger than the score and
            # be rounded accordingly.
            total -= 0.5 * tl.sum(tl.load(vector + columns, mask=columns < A, other=0.0).to(tl.float32), 0)
            if tl.load(query_flags + chunk) + tl.load(key_flags + chunk) == 0:
                for a in tl.range(first, tl.minimum(first + FACTOR_COLUMNS, A), 2, loop_unroll_factor=2):
                    v0 = tl.load(vector + a, mask=a < A, other=0.0).to(tl.float32)
                    v1 = tl.load(vector + a + 1, mask=a + 1 < A, other=0.0).to(tl.float32)
                    q0 = tl.load(own_query + a * query_column + local_query)
                    q1 = tl.load(own_query + (a + 1) * query_column + local_query)
                    k0 = tl.load(own_key + a * key_column + local_key)
                    k1 = tl.load(own_key + (a + 1) * key_column + local_key)
                    d0 = 1.0 + q0[:, None] * k0[None, :]
                    d1 = 1.0 + q1[:, None] * k1[None, :]
                    total += (v0 * d1 + v1 * d0) * invert(d0 * d1, APPROXIMATE)
            else:
                query_rows = row_pointers(query, b, queries, query_batch, query_row, UNIT)
                key_rows = row_pointers(key, b, keys, key_batch, key_row, UNIT)
                for a in range(first, tl.minimum(first + FACTOR_COLUMNS, A)):
                    v = tl.load(vector + a).to(tl.float32)
                    q = tl.load(query_rows + a, mask=there, other=0.0).to(tl.float32)
                    k = tl.load(key_rows + a, mask=valid, other=0.0).to(tl.float32)
                    total += v / guarded_denominator(q[:, None], k[None, :])
        row = pair_row(Tk, PAIR_UNIT)
        out = pair_pointers(scores, b, Tq, first_query, first_key, row, BLOCK_Q, BLOCK_K)
        tl.store(out, -2.0 * total, mask=there[:, None] & (keys < row)[None, :])


@triton.jit
def _add_gradient(inverse, dscore, sums, half_sums, WITH_VECTOR: tl.constexpr):
    """Adds dscore (1 - tanh^2) / 4 and dscore tanh / 2, of tanh = 1 - 2 inverse."""
    half = 0.5 - inverse
    sums += dscore * (0.25 - half * half)
    if WITH_VECTOR:
        half_sums += dscore * half
    return sums, half_sums


@triton.jit(do_not_specialize=["T", "T_other", "Tk", *_ROWS], do_not_specialize_on_alignment=UNALIGNED)
def additive_gradient(
    own,  # S [B, T, A]: queries, or keys
    other,  # S [B, T_other, A]: keys, or queries
    own_factors,  # float [B, T', A'], by row
    other_factors,  # float [B, T_other', A']
    own_large,  # int32 [B, T' / 64, A' / 32]
    other_large,  # int32 [B, T_other' / 64, A' / 32]
    vector,  # S [A]
    dscores,  # float [B, Tq, Tk rounded up to PAIR_UNIT]
    lengths,  # int64 [B] or None
    mask,  # bool [B, Tk] or None: True is padding
    down,  # S [B, T, A]: the gradient of own
    dvector_parts,  # float [B, row tiles, A]
    T,
    T_other,
    Tk,
    own_batch,
    own_row,
    other_batch,
    other_row,
    A: tl.constexpr,
    UNIT: tl.constexpr,
    OWN_KEYS: tl.constexpr,  # whether own are the keys; if so, dvector's parts are written too
    BLOCK: tl.constexpr,  # own rows; divides 64
    APPROXIMATE: tl.constexpr,
):
    """Of a tile of own: 4 vector sum_j dscore_j (1 - tanh^2) / 4, and dvector = 2 sum_ij dscore_ij tanh / 2."""
    across: tl.constexpr = (A + FACTOR_COLUMNS - 1) // FACTOR_COLUMNS
    row_tiles = tl.cdiv(T, BLOCK)
    program = tl.program_id(0)
    b = (program // across // row_tiles).to(tl.int64)
    tile = program // across % row_tiles
    chunk = program % across
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    columns = chunk * FACTOR_COLUMNS + tl.arange(0, FACTOR_COLUMNS)
    inside = columns < A
    count = count_keys(lengths, b, Tk)
    row = pair_row(Tk, PAIR_UNIT)
    if OWN_KEYS:
        there = are_valid(mask, b, rows, count, Tk)
        end = tl.where(tile * BLOCK < count, T_other, 0)
        pairs = dscores + b * T_other * row + tile * BLOCK
        distances = tl.arange(0, BLOCK)
        step = row.to(tl.int64)
    else:
        there = rows < T
        end = count
        pairs = dscores + (b * T + tile * BLOCK) * row
        distances = tl.arange(0, BLOCK) * row
        step = tl.full((), 1, tl.int64)

    own_tiles = tl.cdiv(T, FACTOR_ROWS)
    other_tiles = tl.cdiv(T_other, FACTOR_ROWS)
    WIDTH: tl.constexpr = across * FACTOR_COLUMNS
    width = tl.full((), WIDTH, tl.int64)
    factors = tl.load(own_factors + (b * own_tiles * FACTOR_ROWS + rows[:, None]) * WIDTH + columns[None, :])
    others = other_factors + b * other_tiles * FACTOR_ROWS * WIDTH + chunk * FACTOR_COLUMNS
    local = tl.arange(0, FACTOR_COLUMNS)
    own_flag = tl.load(own_large + (b * own_tiles + tile * BLOCK // FACTOR_ROWS) * across + chunk)
    flags = other_large + b * other_tiles * across + chunk
    ends = tl.where(there, end, 0)
    sums = tl.zeros((BLOCK, FACTOR_COLUMNS), tl.float32)
    half_sums = tl.zeros((BLOCK, FACTOR_COLUMNS), tl.float32)
    for first in range(0, end, FACTOR_ROWS):
        if own_flag + tl.load(flags + first // FACTOR_ROWS * across) == 0:
            for j in tl.range(first, tl.minimum(first + FACTOR_ROWS, end), 2, loop_unroll_factor=2):
                dscore0 = tl.load(pairs + j * step + distances, mask=j < ends, other=0.0)
                dscore1 = tl.load(pairs + (j + 1) * step + distances, mask=j + 1 < ends, other=0.0)
                d0 = 1.0 + factors * tl.load(others + j * width + local)[None, :]
                d1 = 1.0 + factors * tl.load(others + (j + 1) * width + local)[None, :]
                inverse0, inverse1 = invert_both(d0, d1, APPROXIMATE)
                sums, half_sums = _add_gradient(inverse0, dscore0[:, None], sums, half_sums, OWN_KEYS)
                sums, half_sums = _add_gradient(inverse1, dscore1[:, None], sums, half_sums, OWN_KEYS)
        else:
            elements = tl.load(
                row_pointers(own, b, rows, own_batch, own_row, UNIT)[:, None] + columns[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            other_elements = batch_pointer(other, b, other_batch, UNIT) + columns
            other_step = other_row.to(tl.int64) * UNIT
            for j in range(first, tl.minimum(first + FACTOR_ROWS, end)):
                dscore = tl.load(pairs + j * step + distances, mask=there, other=0.0)
                width_there = A
                if not OWN_KEYS:
                    width_there = tl.where(are_valid(mask, b, j, count, Tk), A, 0)
                x = tl.load(other_elements + j * other_step, mask=columns < width_there, other=0.0)
                inverse = 1.0 / guarded_denominator(elements, x.to(tl.float32)[None, :])
                sums, half_sums = _add_gradient(inverse, dscore[:, None], sums, half_sums, OWN_KEYS)
    v = tl.load(vector + columns, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(there[:, None], sums * (4.0 * v)[None, :], 0.0)
    out = down + (b * T + rows[:, None]) * A + columns[None, :]
    tl.store(out, result.to(down.dtype.element_ty), mask=(rows < T)[:, None] & inside[None, :])
    if OWN_KEYS:
        tl.store(dvector_parts + (b * row_tiles + tile) * A + columns, 2.0 * tl.sum(half_sums, 0), mask=inside)
