"""Attention in Triton: which kernels run, in which order, and where what passes between them lies.

The operators' arguments and results are those of rnnkern::cuda_attention and its kin; `rnnkern.ops.attention` has their
fake kernels and autograd. float32, bfloat16 and float16; float32 sums. Deterministic: no atomics, and the order of
every sum depends on the shape alone. Lengths beyond 0..Tk are taken as the nearest of these, since nobody can look at
them without waiting for the device.
"""

from typing import Any

import torch
from torch import Tensor

from rnnkern.triton import attention_single as single
from rnnkern.triton.attention_call import Call, Gradients, fit
from rnnkern.triton.attention_many import attend_many, gradients_many, pair_bytes
from rnnkern.triton.config import divide_up
from rnnkern.triton.launch import launch

_SINGLE_KEYS = 64  # of a program of `attention_single`


def _single_columns(call: Call, size: int) -> int:
    """Columns at a time of the kernels of `attention_single`."""
    return fit(size, 32 if call.dtype == torch.float32 else 64)


def _attend_single(call: Call, context: Tensor, weights: Tensor | None) -> None:
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
        call.lengths,
        call.mask,
        context,
        weights,
        call.Tk,
        parts,
        Dv=call.Dv,
        BLOCK_PARTS=16,
        BLOCK=block,
        num_warps=4,
    )


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
    call = Call(query, key, value, vector, lengths, mask, scale)
    context = call.empty(call.B, call.Tq, call.Dv)
    weights = call.empty(call.B, call.Tq, call.Tk) if need_weights else None
    if call.Tk == 0:
        context.zero_()
    elif call.Tq == 1:
        _attend_single(call, context, weights)
    else:
        for first, end in call.chunks(pair_bytes(call, backward=False)):
            part = call.of(first, end)
            attend_many(part, context[first:end], None if weights is None else weights[first:end])
    return context[..., :Dv], call.empty(0) if weights is None else weights


def _gradients_single(call: Call, out: Gradients) -> Tensor | None:
    """Writes the gradients; returns the vector's, float [D], for the additive score."""
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
    if dcontext is not None and Dv == 0:
        dcontext = None
    call = Call(query, key, value, vector, lengths, mask, scale, dcontext, dweights)
    sizes = (call.Tq, call.D), (call.Tk, call.D), (call.Tk, call.Dv)
    out = Gradients(*(call.empty(call.B, *size) for size in sizes))
    dvector = call.floats(call.D).zero_() if vector is not None else None
    if call.B == 0 or call.Tq == 0 or call.Tk == 0:
        for gradient in out:
            gradient.zero_()
    elif call.Tq == 1:
        dvector = _gradients_single(call, out)
    else:
        for first, end in call.chunks(pair_bytes(call, backward=True)):
            of_chunk = gradients_many(call.of(first, end), out.of(first, end))
            if dvector is not None and of_chunk is not None:
                dvector += of_chunk
    dvector = call.empty(0) if dvector is None else dvector[:D].to(call.dtype)
    return out.query[..., :D], out.key[..., :D], out.value[..., :Dv], dvector
