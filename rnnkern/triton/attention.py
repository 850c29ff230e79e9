"""Attention in Triton: which kernels run, in which order, and where what passes between them lies.

The operators' arguments and results are those of rnnkern::cuda_attention and its kin; `rnnkern.ops.attention` has their
fake kernels and autograd. float32, bfloat16 and float16; float32 sums. Deterministic: no atomics, and the order of
every sum depends on the shape alone. Lengths beyond 0..Tk are taken as the nearest of these, since nobody can look at
them without waiting for the device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.triton import attention_additive as additive
from rnnkern.triton import attention_pairs as pairs
from rnnkern.triton import attention_single as single
from rnnkern.triton import config
from rnnkern.triton.attention_parts import PAIR_UNIT
from rnnkern.triton.config import divide_up, power_of_two
from rnnkern.triton.launch import launch

_CHUNK_BYTES = 64 << 20  # of pairs and factors at a time: about an L2 cache
_SINGLE_KEYS = 64  # of a program of `attention_single`
_PAIR_UNIT = int(PAIR_UNIT.value)
_FACTOR_ROWS, _FACTOR_COLUMNS = int(additive.FACTOR_ROWS.value), int(additive.FACTOR_COLUMNS.value)


class Blocks(NamedTuple):
    """How the kernels of `attention_pairs` cut a call."""

    queries: int
    keys: int
    inner: int  # columns of a row that are multiplied at a time
    columns: int  # of a result
    warps: int
    stages: int


def blocks_of(dtype: torch.dtype, Tq: int, D: int, Dv: int) -> Blocks:
    """Few queries take few rows of a tile; float32 takes twice the registers of 16 bits."""
    if dtype == torch.float32:
        return Blocks(16 if Tq <= 16 else 32, 32, _fit(max(D, Dv), 32), _fit(Dv, 64), 4, 3)
    queries, warps = (16, 4) if Tq <= 16 else (64, 8)
    return Blocks(queries, 64, _fit(max(D, Dv), 64), _fit(Dv, 128), warps, 2)


def _fit(size: int, most: int) -> int:
    """The least power of two that holds `size`, within 16..most."""
    return min(most, max(16, power_of_two(size)))


def _pair_row(Tk: int) -> int:
    """Tk', from one row of pairs to the next."""
    return divide_up(Tk, _PAIR_UNIT) * _PAIR_UNIT


class _Rows(NamedTuple):
    """[B, T, C] with contiguous rows; strides of dimensions of one element do not matter and are zero."""

    tensor: Tensor | None
    batch: int
    row: int


def _rows(tensor: Tensor | None) -> _Rows:
    if tensor is None:
        return _Rows(None, 0, 0)
    if tensor.shape[2] > 1 and tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    B, T, _ = tensor.shape
    return _Rows(tensor, tensor.stride(0) if B > 1 else 0, tensor.stride(1) if T > 1 else 0)


def _unit(*all_rows: _Rows) -> int:
    """What divides every stride: 16 where rows are aligned, so that 16 bytes are read at a time, else 1."""
    return 16 if all((rows.batch | rows.row) % 16 == 0 for rows in all_rows) else 1


class _Call:
    """The arguments of a call, for a range of batch rows."""

    def __init__(
        self,
        query: Tensor,  # [B, Tq, D]
        key: Tensor,  # [B, Tk, D]
        value: Tensor,  # [B, Tk, Dv]
        vector: Tensor | None,  # [D]
        lengths: Tensor | None,  # int64 [B]
        mask: Tensor | None,  # bool [B, Tk]
        scale: float,
        dcontext: Tensor | None = None,  # [B, Tq, Dv]
        dweights: Tensor | None = None,  # [B, Tq, Tk]
    ) -> None:
        self.device, self.dtype = query.device, query.dtype
        (self.B, self.Tq, self.D), (_, self.Tk, self.Dv) = query.shape, value.shape
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        self.dcontext = _rows(dcontext)
        self.dweights = None if dweights is None else dweights.contiguous()
        self.vector = None if vector is None else vector.contiguous()
        self.lengths = None if lengths is None else lengths.to(query.device).contiguous()
        self.mask = None if mask is None else mask.contiguous()
        self.scale = scale if vector is None else 1.0
        self.unit = _unit(self.query, self.key, self.value, self.dcontext)
        self.blocks = blocks_of(self.dtype, self.Tq, self.D, self.Dv)
        facts = config.facts_of(query.device)
        self.approximate = facts.kind == "cuda"
        self.precision = config.precision(facts, self.dtype, tf32=False)

    def of(self, first: int, end: int) -> "_Call":
        """The same for the batch rows [first, end)."""
        part = object.__new__(_Call)
        part.__dict__.update(self.__dict__)
        part.B = end - first
        for name in ("query", "key", "value", "dcontext"):
            rows = getattr(self, name)
            if rows.tensor is not None:
                setattr(part, name, rows._replace(tensor=rows.tensor[first:end]))
        for name in ("lengths", "mask", "dweights"):
            if getattr(self, name) is not None:
                setattr(part, name, getattr(self, name)[first:end])
        return part

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return self.empty(*shape, dtype=torch.float32)

    def chunks(self, bytes_per_row: int) -> list[tuple[int, int]]:
        """Ranges of batch rows of which so many bytes each fit _CHUNK_BYTES."""
        rows = max(1, min(self.B, _CHUNK_BYTES // max(1, bytes_per_row)))
        return [(first, min(first + rows, self.B)) for first in range(0, self.B, rows)]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of query, key and value, in units."""
        return tuple(s // self.unit for rows in (self.query, self.key, self.value) for s in (rows.batch, rows.row))

    @property
    def gradient_strides(self) -> tuple[int, ...]:
        """Of dcontext, in units."""
        return self.dcontext.batch // self.unit, self.dcontext.row // self.unit

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.query.tensor, self.key.tensor, self.value.tensor


class _Factors(NamedTuple):
    """Exponentials of rows [B, T, A]; T' is T padded to tiles, A' likewise."""

    by_column: Tensor | None  # float [B, A', T']
    by_row: Tensor | None  # float [B, T', A']
    large: Tensor  # int32 [B, T' / 64, A' / 32]


def _factorize(call: _Call, rows: _Rows, *, keys: bool, by_row: bool) -> _Factors:
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


def _additive_scores(call: _Call, query: _Factors, key: _Factors) -> Tensor:
    """float [B, Tq, Tk']."""
    scores = call.floats(call.B, call.Tq, _pair_row(call.Tk))
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
        num_warps=4 if block == 16 else 8,
    )
    return scores


def _pair_bytes(call: _Call, backward: bool) -> int:
    """Of what passes between kernels, for one batch row."""
    pairs_bytes = call.Tq * _pair_row(call.Tk) * call.dtype.itemsize * 2 if backward else 0
    if call.vector is None:
        return pairs_bytes
    tiles = divide_up(call.Tq, _FACTOR_ROWS) + divide_up(call.Tk, _FACTOR_ROWS)
    floats = call.Tq * _pair_row(call.Tk) + tiles * _FACTOR_ROWS * (call.D + _FACTOR_COLUMNS)
    return pairs_bytes + 4 * floats * (2 if backward else 1)


def _attend_many(call: _Call, context: Tensor, weights: Tensor | None) -> None:
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


def _single_columns(call: _Call, size: int) -> int:
    """Columns at a time of the kernels of `attention_single`."""
    return _fit(size, 32 if call.dtype == torch.float32 else 64)


def _attend_single(call: _Call, context: Tensor, weights: Tensor | None) -> None:
    parts = divide_up(call.Tk, _SINGLE_KEYS)
    alone = parts == 1
    stats = None if alone else call.floats(call.B, parts, 2)
    to = context if alone else call.floats(call.B, parts, call.Dv)
    scores = weights if alone or weights is None else call.floats(call.B, call.Tk)
    launch(
        single.attend_part,
        (call.B * parts,),
        *call.tensors,
        call.vector,
        call.lengths,
        call.mask,
        to,
        scores,
        stats,
        call.Tk,
        call.strides[0],
        *call.strides[2:],
        call.scale,
        D=call.D,
        Dv=call.Dv,
        UNIT=call.unit,
        ALONE=alone,
        BLOCK_K=_SINGLE_KEYS,
        BLOCK_D=_single_columns(call, call.D),
        BLOCK_V=_single_columns(call, call.Dv),
        APPROXIMATE=call.approximate,
        num_warps=4,
    )
    if alone:
        return
    block = 128
    across = divide_up(call.Dv, block) + (0 if weights is None else divide_up(call.Tk, block))
    launch(
        single.join_parts,
        (call.B * across,),
        stats,
        to,
        scores,
        context,
        weights,
        call.Tk,
        parts,
        Dv=call.Dv,
        BLOCK_PARTS=16,
        BLOCK=block,
        num_warps=4,
    )


def _widen(query: Tensor, key: Tensor, value: Tensor, vector: Tensor | None) -> tuple[Any, ...]:
    """Rows without columns get one that is zero: blocks are at least one wide."""
    three = (t if t.shape[2] > 0 else t.new_zeros(*t.shape[:2], 1) for t in (query, key, value))
    return *three, vector if vector is None or vector.numel() > 0 else vector.new_zeros(1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    score: str,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """rnnkern::triton_attention: context [B, Tq, Dv], and weights [B, Tq, Tk] or an empty tensor."""
    Dv = value.shape[2]
    query, key, value, vector = _widen(query, key, value, vector)
    call = _Call(query, key, value, vector, lengths, mask, scale)
    context = call.empty(call.B, call.Tq, call.Dv)
    weights = call.empty(call.B, call.Tq, call.Tk) if need_weights else None
    if call.Tk == 0:
        context.zero_()
    elif call.Tq == 1:
        _attend_single(call, context, weights)
    else:
        for first, end in call.chunks(_pair_bytes(call, backward=False)):
            part = call.of(first, end)
            _attend_many(part, context[first:end], None if weights is None else weights[first:end])
    return context[..., :Dv], call.empty(0) if weights is None else weights


class _Gradients(NamedTuple):
    query: Tensor  # [B, Tq, D]
    key: Tensor  # [B, Tk, D]
    value: Tensor  # [B, Tk, Dv]

    def of(self, first: int, end: int) -> "_Gradients":
        return _Gradients(*(gradient[first:end] for gradient in self))


def _sum_pairs(call: _Call, pair: Tensor, right: _Rows, result: Tensor, *, over_keys: bool) -> None:
    rows, terms = (call.Tq, call.Tk) if over_keys else (call.Tk, call.Tq)
    columns = result.shape[2]
    block, inner, across = 32 if rows > 16 else 16, 32, _fit(columns, call.blocks.columns)
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
    call: _Call,
    own: _Rows,
    other: _Rows,
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


def _gradients_many(call: _Call, out: _Gradients) -> Tensor | None:
    """Returns the vector's gradient, float [D], for the additive score."""
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
    weights = call.empty(B, Tq, _pair_row(Tk))
    dscores = call.empty(B, Tq, _pair_row(Tk), dtype=None if call.vector is None else torch.float32)
    launch(
        pairs.pair_weights,
        (B * down * divide_up(Tk, blocks.keys),),
        *inputs,
        weights,
        dscores,
        *shape,
        call.scale,
        WEIGHTS_UNIT=_PAIR_UNIT,
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


def _gradients_single(call: _Call, out: _Gradients) -> Tensor | None:
    """Returns the vector's gradient, float [D], for the additive score."""
    B, Tk = call.B, call.Tk
    parts = divide_up(Tk, _SINGLE_KEYS)
    scores, gradients, stats = call.floats(B, Tk), call.floats(B, Tk), call.floats(B, parts, 3)
    query_batch, _, *key_value = call.strides
    dcontext_batch, _ = call.gradient_strides
    sizes: dict[str, Any] = {
        "D": call.D,
        "Dv": call.Dv,
        "UNIT": call.unit,
        "BLOCK_K": _SINGLE_KEYS,
        "BLOCK_D": _single_columns(call, max(call.D, call.Dv)),
        "APPROXIMATE": call.approximate,
        "num_warps": 4,
    }
    launch(
        single.score_part,
        (B * parts,),
        *call.tensors,
        call.vector,
        call.dcontext.tensor,
        call.dweights,
        call.lengths,
        call.mask,
        scores,
        gradients,
        stats,
        Tk,
        query_batch,
        *key_value,
        dcontext_batch,
        call.scale,
        **sizes,
    )
    dquery_parts = call.floats(B, parts, call.D)
    dvector_parts = None if call.vector is None else call.floats(B, parts, call.D)
    launch(
        single.gradient_part,
        (B * parts,),
        call.query.tensor,
        call.key.tensor,
        call.vector,
        call.dcontext.tensor,
        call.lengths,
        call.mask,
        scores,
        gradients,
        stats,
        dquery_parts,
        out.key,
        out.value,
        dvector_parts,
        Tk,
        query_batch,
        *key_value[:2],
        dcontext_batch,
        call.scale,
        BLOCK_PARTS=16,
        **sizes,
    )
    out.query.copy_(dquery_parts.sum(1, keepdim=True))
    return None if dvector_parts is None else dvector_parts.sum((0, 1))


def attention_backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    score: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rnnkern::triton_attention_backward: the gradients of query, key, value and vector [D] or empty."""
    D, Dv = query.shape[2], value.shape[2]
    query, key, value, vector = _widen(query, key, value, vector)
    if dcontext is not None and Dv == 0:
        dcontext = None
    call = _Call(query, key, value, vector, lengths, mask, scale, dcontext, dweights)
    out = _Gradients(*(call.empty(*tensor.shape) for tensor in (query, key, value)))
    dvector = call.floats(call.D).zero_() if vector is not None else None
    if call.B == 0 or call.Tq == 0 or call.Tk == 0:
        for gradient in out:
            gradient.zero_()
    elif call.Tq == 1:
        dvector = _gradients_single(call, out)
    else:
        for first, end in call.chunks(_pair_bytes(call, backward=True)):
            of_chunk = _gradients_many(call.of(first, end), out.of(first, end))
            if dvector is not None and of_chunk is not None:
                dvector += of_chunk
    dvector = call.empty(0) if dvector is None else dvector[:D].to(call.dtype)
    return out.query[..., :D], out.key[..., :D], out.value[..., :Dv], dvector
