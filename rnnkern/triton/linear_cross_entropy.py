"""Cross entropy of a chunk's logits, which its gradient replaces: the kernel of `rnnkern/ops/linear_cross_entropy.py`.

A program has a row of logits z [V], classes in blocks. First pass: the largest logit m and sum exp(z - m), both online,
and the sum of z for label smoothing. Second pass, for gradients: z becomes s (softmax(z) - (1 - e) onehot(y) - e / V).
Nothing is added across programs: results are deterministic, and a row's do not depend on others.

    loss = log sum exp(z - m) - (1 - e) (z_y - m) - e (mean(z) - m)

The products around it are torch's: they take most of the time, and cuBLAS and its kin are hard to beat. A kernel that
multiplies, too, would save the logits' way to memory, and pay for it: each gradient would compute them again, or the
weight's would be added up in no fixed order.

Napkin, H200, bf16, N = 8192, V = 32000, D = 512: products 6 N D V = 0.8 TFLOP, 1.0 ms at 790 TFLOP/s. Logits are
written by the product, read, read again, replaced, and read by two products: 6 N V 2 bytes = 3.1 GB, 0.7 ms at
4.3 TB/s, less what L2 serves. A chunk of 2^26 logits is 2048 rows, 128 MiB; the weight's gradient, 64 MiB in float32,
is read and written with each chunk, 4 times, 0.1 ms. Smaller chunks would keep logits in L2, and move it more often.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnkern.triton.launch import device_guard, launch

BLOCK = 4096  # classes at a time: 16 per thread


@triton.jit
def load_logits(z, start, V: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row, -inf past its end; and its classes."""
    v = start + tl.arange(0, BLOCK)
    # A row's memory goes on to its stride, a multiple of 16: that bound leaves loads wide, which V might not.
    block = tl.load(z + v, mask=v < STRIDE, other=float("-inf")).to(tl.float32)
    return tl.where(v < V, block, float("-inf")), v


@triton.jit(do_not_specialize=["ignore_index"])
def softmax_rows(
    logits,  # S [R, V], rows STRIDE apart: becomes dz
    target,  # int64 [R]
    scale,  # f32 [R], the gradient of each loss; None: 1
    losses,  # f32 [R]
    ignore_index,
    smoothing,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    SMOOTHED: tl.constexpr,  # whether smoothing is not 0
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: [R]. A target that is no class gives a loss of NaN."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * STRIDE
    y = tl.load(target + row)
    if y == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENTS:
            for start in range(0, STRIDE, BLOCK):
                v = start + tl.arange(0, BLOCK)
                tl.store(z + v, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=v < STRIDE)
        return
    z_y = tl.load(z + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)

    m = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    z_sum = tl.zeros((), tl.float32)
    for start in range(0, STRIDE, BLOCK):
        block, v = load_logits(z, start, V, STRIDE, BLOCK)
        higher = tl.maximum(m, tl.max(block, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        total = total * tl.exp(m - base) + tl.sum(tl.exp(block - base), 0)
        m = higher
        if SMOOTHED:
            z_sum += tl.sum(tl.where(v < V, block, 0.0), 0)
    loss = tl.log(total) - (1.0 - smoothing) * (z_y - m)
    if SMOOTHED:
        loss -= smoothing * (z_sum / V - m)
    tl.store(losses + row, loss)

    if GRADIENTS:
        s = 1.0
        if scale is not None:
            s = tl.load(scale + row)
        for start in range(0, STRIDE, BLOCK):
            block, v = load_logits(z, start, V, STRIDE, BLOCK)
            dz = tl.exp(block - m) / total - tl.where(v == y, 1.0 - smoothing, 0.0) - smoothing / V
            tl.store(z + v, (s * dz).to(logits.dtype.element_ty), mask=v < STRIDE)


def softmax(
    logits: Tensor,  # [R, V], rows contiguous
    target: Tensor,  # int64 [R]
    scale: Tensor | None,  # [R]
    ignore_index: int,
    smoothing: float,
    gradients: bool,
) -> Tensor:
    """Losses [R] in float32; logits become their gradients where these are wanted."""
    (R, V), stride = logits.shape, logits.stride(0)
    losses = torch.empty(R, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(stride))
    with device_guard(logits):
        launch(
            softmax_rows,
            (R,),
            logits,
            target.contiguous(),
            None if scale is None else scale.contiguous(),
            losses,
            ignore_index,
            float(smoothing),
            V=V,
            STRIDE=stride,
            SMOOTHED=smoothing > 0,
            GRADIENTS=gradients,
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
    return losses
