"""MGU: what the engines need to know about it, and its eager step. The example of a new cell, see CONTRIBUTING.md."""

import torch
from torch import Tensor

from rnnkern.cells.spec import CellSpec


def step(gx: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """One step of the minimal gated unit.

    f = sigmoid(gx_f + gh_f),  n = tanh(gx_n + f * gh_n),  h' = h + f * (n - h)

    Args:
        gx: input part of the gates, W_ih x + b_ih, in the order f, n.  # [B, 2*H]
        gh: recurrent part of the gates, W_hh h + b_hh.  # [B, 2*H]
        h: state before the step.  # [B, H]

    Returns:
        The state after the step.  # [B, H]

    Source: Zhou et al. 2016, https://arxiv.org/abs/1603.09420, with the gate after the product as in torch's GRU.
    """
    gx_f, gx_n = gx.chunk(2, dim=-1)
    gh_f, gh_n = gh.chunk(2, dim=-1)
    f = torch.sigmoid(gx_f + gh_f)
    n = torch.tanh(gx_n + f * gh_n)
    return h + f * (n - h)


MGU = CellSpec(name="mgu", gates=("f", "n"), states=("h",), saved=("f", "n", "gh_n"), split_gates=("n",), step=step)
