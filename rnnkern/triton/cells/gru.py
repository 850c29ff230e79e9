"""Gated recurrent unit, torch's variant: the reset gate acts after the recurrent matrix product.

r = sigmoid(gx_r + gh_r)       z  = sigmoid(gx_z + gh_z)
n = tanh(gx_n + r * gh_n)      h' = n + z * (h - n)

gx = W_ih x + b_ih and gh = W_hh h + b_hh stay apart, because r scales gh_n alone: dgx_n != dgh_n.
Source: Cho et al. 2014 (https://arxiv.org/abs/1406.1078), in cuDNN's form.
"""

import triton
import triton.language as tl

from rnnkern.triton.activations import sigmoid, tanh


@triton.jit
def forward(gx, gh, state):
    """Keeps r, z, n, gh_n."""
    r = sigmoid(gx[0] + gh[0])
    z = sigmoid(gx[1] + gh[1])
    n = tanh(tl.fma(r, gh[2], gx[2]))
    return (tl.fma(z, state[0] - n, n),), (r, z, n, gh[2])


@triton.jit
def backward(saved, state, dnext):
    """See `rnnkern.triton.cells`."""
    r, z, n, gh_n = saved
    dh = dnext[0]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr = dn * gh_n * r * (1.0 - r)
    dz = dh * (state[0] - n) * z * (1.0 - z)
    return (dr, dz, dn), (dr, dz, dn * r), (dh * z,)
