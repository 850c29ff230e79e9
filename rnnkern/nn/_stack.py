"""Layers of a module that one operator runs, where the backend has such: CUDA's, of one direction."""

from typing import Any

from torch import Tensor

from rnnkern.nn._autocast import cast_weights
from rnnkern.ops import cuda, cuda_stack
from rnnkern.ops.packs import Weights
from rnnkern.ops.recurrence import recurrence


def runs_as_one(
    layers: Any,  # a module of rnnkern.nn
    x: Tensor,  # [T, B, I], or [N, I] of a PackedSequence
    B: int,
    return_states: bool,
) -> bool:
    """Whether `run_stack` runs these layers: nothing is asked of a single one that only its own operator gives."""
    return (
        layers.num_layers > 1
        and not (layers.bidirectional or layers.proj_size or return_states)
        and layers.checkpoint_every is None
        and layers.grad_clip_norm is None
        and layers._recurrence is recurrence
        and cuda.runs_here(layers.mode.lower(), x, layers.hidden_size, B)
    )


def run_stack(
    layers: Any,
    x: Tensor,  # [T, B, I], or [N, I] of a PackedSequence
    h: Tensor,  # [L, B, H]
    c: Tensor | None,  # [L, B, H] in the compute dtype
    first: Weights,  # of the first layer, cast
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B]
    casts: bool,  # weights to x's dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h_n and c_n of the layers."""
    weights = [first]
    for layer in range(1, layers.num_layers):
        own, _ = layers._layer_weights(layer)
        weights.append(cast_weights(own, x.dtype) if casts else own)
    return cuda_stack.stack(
        *(layers.mode.lower(), x, h, c, weights),
        lengths=lengths,
        resets=resets,
        dropout=layers.dropout if layers.training else 0.0,
        grad_clip=layers.grad_clip or 0.0,
    )
