"""Lengths of rows, from the CPU to another device, by torch; `rnnkern::cuda_lengths` is the compiled way."""

import torch
from torch import Tensor


def copy_lengths(lengths: Tensor, device: torch.device) -> Tensor:
    """Lengths [B] of the CPU on another device, without a wait: in a CUDA graph too, which keeps them."""
    capturing = device.type == "cuda" and not torch.compiler.is_compiling()
    if capturing and torch.cuda.is_current_stream_capturing():
        return launch_lengths(lengths, device)
    # The copy is ours: the caller may write other lengths into pinned memory before the GPU has read these.
    return lengths.clone().to(device, non_blocking=True)


def launch_lengths(lengths: Tensor, device: torch.device) -> Tensor:
    """Lengths by arguments of launches, which a CUDA graph keeps: it takes no copy from pageable memory."""
    placed = torch.zeros_like(lengths, device=device)
    if placed.numel() > 0:
        torch._foreach_add_(placed.unbind(), lengths.tolist())  # a launch for some hundred numbers, passed by value
    return placed
