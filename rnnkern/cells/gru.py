"""GRU: what the engines need to know about it, and its eager step (torch's variant, reset after the product)."""

import torch
from torch import Tensor

from rnnkern.cells.spec import CellSpec


def step(gx: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """One step of the gated recurrent unit.

    r = sigmoid(gx_r + gh_r),  z = sigmoid(gx_z + gh_z),  n = tanh(gx_n + r * gh_n),  h' = n + z * (h - n)

    Args:
        gx: input part of the gates, W_ih x + b_ih, in the order r, z, n.  # [B, 3*H]
        gh: recurrent part of the gates, W_hh h + b_hh.  # [B, 3*H]
        h: state before the step.  # [B, H]

    Returns:
        The state after the step.  # [B, H]

    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in cuDNN's form.
    """
    gx_r, gx_z, gx_n = gx.chunk(3, dim=-1)
    gh_r, gh_z, gh_n = gh.chunk(3, dim=-1)
    r = torch.sigmoid(gx_r + gh_r)
    z = torch.sigmoid(gx_z + gh_z)
    n = torch.tanh(gx_n + r * gh_n)
    return n + z * (h - n)


GRU = CellSpec(
    name="gru", gates=("r", "z", "n"), states=("h",), saved=("r", "z", "n", "gh_n"), split_gates=("n",), step=step
)
