"""Long short-term memory, torch's variant: no peepholes, gates i, f, g, o.

i = sigmoid(gx_i + gh_i)   f = sigmoid(gx_f + gh_f)   g = tanh(gx_g + gh_g)   o = sigmoid(gx_o + gh_o)
c' = f * c + i * g         h' = o * tanh(c')

backward computes c' and tanh(c') again: cheaper than the memory to keep them.
Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
"""

import triton
import triton.language as tl

from rnnkern.triton.activations import sigmoid, tanh


@triton.jit
def forward(gx, gh, state):
    """Keeps i, f, g, o after their activations."""
    i = sigmoid(gx[0] + gh[0])
    f = sigmoid(gx[1] + gh[1])
    g = tanh(gx[2] + gh[2])
    o = sigmoid(gx[3] + gh[3])
    c = tl.fma(f, state[1], i * g)
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def backward(saved, state, dnext):
    """See `rnnkern.triton.cells`."""
    i, f, g, o = saved
    c = state[1]
    dh, dc_next = dnext
    tanh_c = tanh(tl.fma(f, c, i * g))
    dc = tl.fma(dh * o, 1.0 - tanh_c * tanh_c, dc_next)
    dgates = (
        dc * g * i * (1.0 - i),
        dc * c * f * (1.0 - f),
        dc * i * (1.0 - g * g),
        dh * tanh_c * o * (1.0 - o),
    )
    return dgates, dgates, (tl.zeros_like(dh), dc * f)
