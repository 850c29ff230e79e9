"""Elman network with tanh: h' = tanh(gx + gh).

Source: Elman 1990, in torch's form (two biases).
"""

import triton
import triton.language as tl

from rnnkern.triton.activations import tanh


@triton.jit
def forward(gx, gh, state):
    """Keeps h'."""
    h = tanh(gx[0] + gh[0])
    return (h,), (h,)


@triton.jit
def backward(saved, state, dnext):
    """See `rnnkern.triton.cells`."""
    dgates = (dnext[0] * (1.0 - saved[0] * saved[0]),)
    return dgates, dgates, (tl.zeros_like(dnext[0]),)
