"""What torch.autocast means to recurrent modules: products in its dtype, results in the dtypes that torch.nn gives."""

import torch
from torch import Tensor


def cast_weights(weights: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The weights in this dtype; gradients go back through the cast."""
    return tuple(None if weight is None else weight.to(dtype) for weight in weights)


def result_dtype(mode: str, state: Tensor, dtype: torch.dtype, *, fused: bool) -> torch.dtype:
    """The dtype of results under autocast, as torch.nn has it.

    On the CPU torch computes new states from the old ones in the wider of both dtypes, but for RNN, whose states only
    enter products, and for an LSTM in one kernel. Elsewhere everything is in autocast's dtype.

    Args:
        mode: the cell's name in capitals.
        state: c, or h of a cell that has no c, as it was given.
        dtype: autocast's.
        fused: whether torch has one kernel for this call of an LSTM.
    """
    if state.device.type != "cpu" or mode.startswith("RNN") or (mode == "LSTM" and fused):
        return dtype
    return torch.promote_types(state.dtype, dtype)
