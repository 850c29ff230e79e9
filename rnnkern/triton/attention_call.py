"""The arguments of a call of attention as the kernels take them, and how it is cut."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.triton import config
from rnnkern.triton.attention_parts import PAIR_UNIT as _PAIR_UNIT
from rnnkern.triton.config import divide_up, power_of_two

_CHUNK_BYTES = 64 << 20  # of pairs and factors at a time: about an L2 cache
PAIR_UNIT = int(_PAIR_UNIT.value)


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
        return Blocks(16 if Tq <= 16 else 32, 32, fit(max(D, Dv), 32), fit(Dv, 64), 4, 3)
    queries, warps = (16, 4) if Tq <= 16 else (64, 8)
    return Blocks(queries, 64, fit(max(D, Dv), 64), fit(Dv, 128), warps, 2)


def fit(size: int, most: int) -> int:
    """The least power of two that holds `size`, within 16..most."""
    return min(most, max(16, power_of_two(size)))


def pair_row(Tk: int) -> int:
    """Tk', from one row of pairs to the next."""
    return divide_up(Tk, PAIR_UNIT) * PAIR_UNIT


class Rows(NamedTuple):
    """[B, T, C] with contiguous rows; strides of dimensions of one element do not matter and are zero."""

    tensor: Tensor | None
    batch: int
    row: int


def rows_of(tensor: Tensor | None) -> Rows:
    """Of [B, T, C], copied if the elements of a row are not contiguous, or rows further apart than 32 bits tell."""
    if tensor is None:
        return Rows(None, 0, 0)
    if (tensor.shape[2] > 1 and tensor.stride(2) != 1) or (tensor.shape[1] > 1 and tensor.stride(1) >= 2**31):
        tensor = tensor.contiguous()
    B, T, _ = tensor.shape
    return Rows(tensor, tensor.stride(0) if B > 1 else 0, tensor.stride(1) if T > 1 else 0)


def unit_of(*all_rows: Rows) -> int:
    """What divides every stride: 16 where rows are aligned, so that 16 bytes are read at a time, else 1."""
    return 16 if all((rows.batch | rows.row) % 16 == 0 for rows in all_rows) else 1


def _widen(query: Tensor, key: Tensor, value: Tensor, vector: Tensor | None) -> tuple[Any, ...]:
    """Rows without columns get one that is zero: blocks are at least one wide."""
    three = (t if t.shape[2] > 0 else t.new_zeros(*t.shape[:2], 1) for t in (query, key, value))
    return *three, vector if vector is None or vector.numel() > 0 else vector.new_zeros(1)


class Call:
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
        query, key, value, vector = _widen(query, key, value, vector)
        self.device, self.dtype = query.device, query.dtype
        (self.B, self.Tq, self.D), (_, self.Tk, self.Dv) = query.shape, value.shape
        self.query, self.key, self.value = rows_of(query), rows_of(key), rows_of(value)
        self.dcontext = rows_of(dcontext)
        self.dweights = None if dweights is None else dweights.contiguous()
        self.vector = None if vector is None else vector.contiguous()
        self.lengths = None if lengths is None else lengths.to(query.device).contiguous()
        self.mask = None if mask is None else mask.contiguous()
        self.scale = scale if vector is None else 1.0
        self.unit = unit_of(self.query, self.key, self.value, self.dcontext)
        self.blocks = blocks_of(self.dtype, self.Tq, self.D, self.Dv)
        facts = config.facts_of(query.device)
        self.approximate = facts.kind == "cuda"
        self.precision = config.precision(facts, self.dtype, tf32=False)

    def of(self, first: int, end: int) -> "Call":
        """The same for the batch rows [first, end)."""
        part = object.__new__(Call)
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
        """Memory, in the dtype of the call unless told."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        """Memory, in float32."""
        return self.empty(*shape, dtype=torch.float32)

    def chunks(self, bytes_per_row: int) -> list[tuple[int, int]]:
        """Ranges of batch rows of which so many bytes each fit _CHUNK_BYTES.

        Of 16 rows or a multiple where these fit: then all ranges of a tensor are aligned as it is, whatever a row's
        size, and take the same kernels, which Triton compiles by alignment.
        """
        rows = max(1, min(self.B, _CHUNK_BYTES // max(1, bytes_per_row)))
        if 16 < rows < self.B:
            rows -= rows % 16
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
        """Query, key and value."""
        return self.query.tensor, self.key.tensor, self.value.tensor


class Gradients(NamedTuple):
    """What a backward pass writes."""

    query: Tensor  # [B, Tq, D]
    key: Tensor  # [B, Tk, D]
    value: Tensor  # [B, Tk, Dv]

    def of(self, first: int, end: int) -> "Gradients":
        """The same for the batch rows [first, end)."""
        return Gradients(*(gradient[first:end] for gradient in self))
