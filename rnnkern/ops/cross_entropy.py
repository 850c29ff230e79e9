"""Cross entropy of a chunk's logits, which its gradient replaces: the CPU's step of `linear_cross_entropy.py`.

    loss = log sum exp(z - m) - (1 - e) (z_y - m) - e (mean(z) - m),   m = max(z)
    dz = s (softmax(z) - (1 - e) onehot(y) - e / V)

The largest probability is 1 / sum exp(z - m): so torch's softmax tells the sum, too, and no exponential is computed
twice. Logits of 16 bits are copied to float32 for it, a block of rows at a time, whose copy stays in cache.
"""

import torch
from torch import Tensor

from rnnkern.cells.reference import compute_dtype

BLOCK = 2**20  # logits of a block, about


def softmax(
    logits: Tensor,  # [R, V]
    target: Tensor,  # int64 [R]
    scale: Tensor | None,  # [R], the gradient of each loss; None: 1
    ignore_index: int,  # of no row here
    smoothing: float,
    gradients: bool,
    dbias: Tensor | None,  # [V]
) -> Tensor:
    """Losses [R] in the compute dtype. Where gradients are wanted logits become them; their sum is added to dbias."""
    if not gradients:
        return _losses(logits, target, smoothing)
    compute, (R, V) = compute_dtype(logits.dtype), logits.shape
    at = target[:, None]
    chosen = logits.gather(1, at).to(compute)
    highest, largest, mean = (torch.zeros_like(chosen) for _ in range(3))  # logit, probability, logit
    onehot = torch.full_like(chosen, smoothing - 1)
    rows = max(BLOCK // V, 1)
    copies = None if logits.dtype == compute else chosen.new_empty(min(rows, R), V)
    for start in range(0, R, rows):
        part = slice(start, start + rows)
        z = logits[part]
        p = z if copies is None else copies[: len(z)].copy_(z)
        torch.amax(p, 1, keepdim=True, out=highest[part])
        if smoothing:
            torch.mean(p, 1, keepdim=True, out=mean[part])
        torch.softmax(p, 1, out=p)
        torch.amax(p, 1, keepdim=True, out=largest[part])
        if smoothing:
            p -= smoothing / V
        p.scatter_add_(1, at[part], onehot[part])
        if scale is not None:
            p *= scale[part, None]
        if dbias is not None:
            dbias += p.sum(0)
        if copies is not None:
            z.copy_(p)
    losses = (smoothing - 1) * (chosen - highest) - largest.log_()
    if smoothing:
        losses -= smoothing * (mean - highest)
    return losses[:, 0]


def _losses(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """The same without gradients: no exponential is kept, and torch reads the logits once less. Overwrites them."""
    compute, (R, V) = compute_dtype(logits.dtype), logits.shape
    losses = logits.new_empty(R, dtype=compute)
    rows = max(R if logits.dtype == compute else BLOCK // V, 1)
    copies = None if logits.dtype == compute else losses.new_empty(min(rows, R), V)
    for start in range(0, R, rows):
        part = slice(start, start + rows)
        z = logits[part]
        log_p = z if copies is None else copies[: len(z)].copy_(z)
        torch.log_softmax(log_p, 1, out=log_p)
        losses[part] = (smoothing - 1) * log_p.gather(1, target[part, None])[:, 0]
        if smoothing:
            losses[part] -= smoothing * log_p.mean(1)
    return losses
