"""LSTM: what the engines need to know about it, and its eager step (torch's variant, no peepholes)."""

import torch
from torch import Tensor

from rnnkern.cells.spec import CellSpec


def step(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the long short-term memory.

    i = sigmoid(gx_i + gh_i),  f = sigmoid(gx_f + gh_f),  g = tanh(gx_g + gh_g),  o = sigmoid(gx_o + gh_o),
    c' = f * c + i * g,  h' = o * tanh(c')

    Args:
        gx: input part of the gates, W_ih x + b_ih, in the order i, f, g, o.  # [B, 4*H]
        gh: recurrent part of the gates, W_hh h + b_hh.  # [B, 4*H]
        h: output before the step; it acts through gh only.  # [B, H]
        c: cell state before the step.  # [B, H]

    Returns:
        h' and c'.  # [B, H] each

    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
    """
    i, f, g, o = (gx + gh).chunk(4, dim=-1)
    c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c_next), c_next


LSTM = CellSpec(
    name="lstm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    saved=("i", "f", "g", "o"),
    split_gates=(),
    step=step,
)
