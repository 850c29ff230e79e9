"""GRU as first published, with the reset gate before the recurrent product: for the eager layer alone."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkern.cells.spec import CellSpec


def recurrent(gx: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """The recurrent part of the gates, in the order r, z, n: gh_n = U_n (r * h) + b_n', with r of this step.

    Args:
        gx: input part of the gates, W_ih x + b_ih.  # [B, 3*H]
        h: state before the step.  # [B, H]
        w_hh: U.  # [3*H, H]
        b_hh: b'.  # [3*H]
    """
    H = h.shape[-1]
    w_rz, w_n = w_hh[: 2 * H], w_hh[2 * H :]
    b_rz, b_n = (None, None) if b_hh is None else (b_hh[: 2 * H], b_hh[2 * H :])
    gh_rz = linear(h, w_rz, b_rz)  # [B, 2*H]
    r = torch.sigmoid(gx[..., :H] + gh_rz[..., :H])
    return torch.cat([gh_rz, linear(r * h, w_n, b_n)], dim=-1)


def step(gx: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """One step, after `recurrent`.

    r = sigmoid(gx_r + gh_r),  z = sigmoid(gx_z + gh_z),  n = tanh(gx_n + U_n (r * h) + b_n'),  h' = n + z * (h - n)

    Args:
        gx: input part of the gates, W_ih x + b_ih, in the order r, z, n.  # [B, 3*H]
        gh: recurrent part of the gates, whose gh_n has seen r.  # [B, 3*H]
        h: state before the step.  # [B, H]

    Returns:
        The state after the step.  # [B, H]

    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078; Keras's `reset_after=False`.
    """
    _, gx_z, gx_n = gx.chunk(3, dim=-1)
    _, gh_z, gh_n = gh.chunk(3, dim=-1)
    z = torch.sigmoid(gx_z + gh_z)
    n = torch.tanh(gx_n + gh_n)
    return n + z * (h - n)


GRU_RESET_BEFORE = CellSpec(
    name="gru_reset_before",
    gates=("r", "z", "n"),
    states=("h",),
    saved=(),
    split_gates=("n",),
    step=step,
    recurrent=recurrent,
)
