"""Elman network with tanh: what the engines need to know about it, and its eager step."""

import torch
from torch import Tensor

from rnnkern.cells.spec import CellSpec


def step(gx: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """One step of the Elman network, h' = tanh(gx + gh).

    Args:
        gx: input part, W_ih x + b_ih.  # [B, H]
        gh: recurrent part, W_hh h + b_hh.  # [B, H]
        h: state before the step; it acts through gh only.  # [B, H]

    Returns:
        The state after the step.  # [B, H]

    Source: Elman 1990, in torch's form (two biases).
    """
    return torch.tanh(gx + gh)


RNN_TANH = CellSpec(name="rnn_tanh", gates=("h",), states=("h",), saved=("h",), split_gates=(), step=step)
