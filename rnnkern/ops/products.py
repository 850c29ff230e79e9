"""What torch's products can do on a device."""

import torch
from torch import Tensor


def widens(a: Tensor) -> bool:
    """Whether torch multiplies matrices like a of 16 bits into float32 (out_dtype): on NVIDIA's GPUs, not on AMD's."""
    return a.is_cuda and torch.version.hip is None
