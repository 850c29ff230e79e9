"""Elman network with relu: h' = relu(gx + gh).

Source: Elman 1990, in torch's form (two biases).
"""

import triton
import triton.language as tl

from rnnkern.triton.activations import relu, unless_negative


@triton.jit
def forward(gx, gh, state):
    """Keeps h'."""
    h = relu(gx[0] + gh[0])
    return (h,), (h,)


@triton.jit
def backward(saved, state, dnext):
    """See `rnnkern.triton.cells`."""
    dgates = (unless_negative(saved[0], dnext[0]),)
    return dgates, dgates, (tl.zeros_like(dnext[0]),)
