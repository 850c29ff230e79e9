// Gated recurrent unit, torch's variant: the reset gate acts after the recurrent matrix product.
//
//   r = sigmoid(gx_r + gh_r)       z  = sigmoid(gx_z + gh_z)
//   n = tanh(gx_n + r * gh_n)      h' = n + z * (h - n)
//
// gx = W_ih x + b_ih and gh = W_hh h + b_hh stay apart, because r scales gh_n alone: dgx_n != dgh_n.
// Source: Cho et al. 2014 (https://arxiv.org/abs/1406.1078), in cuDNN's form.
#pragma once

#include "cells/cell.h"

namespace rnnkern {

struct Gru {
  static constexpr int kGates = 3;       // r, z, n
  static constexpr int kStates = 1;      // h
  static constexpr int kSaved = 4;       // r, z, n, gh_n
  static constexpr int kSplitGates = 1;  // n

  template <class V>
  RNNKERN_FN static void forward(const V (&gx)[kGates], const V (&gh)[kGates], const V (&state)[kStates],
                                 V (&next)[kStates], V (&saved)[kSaved]) {
    const V r = sigmoid(gx[0] + gh[0]);
    const V z = sigmoid(gx[1] + gh[1]);
    const V n = tanh(fma(r, gh[2], gx[2]));
    next[0] = fma(z, state[0] - n, n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = gh[2];
  }

  template <class V>
  RNNKERN_FN static void backward(const V (&saved)[kSaved], const V (&state)[kStates], const V (&dnext)[kStates],
                                  V (&dgx)[kGates], V (&dgh)[kGates], V (&dstate)[kStates]) {
    const V one(1);
    const V r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
    const V dn = dnext[0] * (one - z) * (one - n * n);
    dgx[0] = dgh[0] = dn * gh_n * r * (one - r);
    dgx[1] = dgh[1] = dnext[0] * (state[0] - n) * z * (one - z);
    dgx[2] = dn;
    dgh[2] = dn * r;
    dstate[0] = dnext[0] * z;
  }
};

}  // namespace rnnkern
