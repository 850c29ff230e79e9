// Minimal gated unit: one gate does the work of GRU's two. The example of a new cell, see CONTRIBUTING.md.
//
//   f = sigmoid(gx_f + gh_f)       n = tanh(gx_n + f * gh_n)       h' = h + f * (n - h)
//
// f scales gh_n alone, so dgx_n != dgh_n.
// Source: Zhou et al. 2016 (https://arxiv.org/abs/1603.09420), with the gate after the product as in torch's GRU.
#pragma once

#include "cells/cell.h"

namespace rnnkern {

struct Mgu {
  static constexpr int kGates = 2;       // f, n
  static constexpr int kStates = 1;      // h
  static constexpr int kSaved = 3;       // f, n, gh_n
  static constexpr int kSplitGates = 1;  // n

  template <class V>
  RNNKERN_FN static void forward(const V (&gx)[kGates], const V (&gh)[kGates], const V (&state)[kStates],
                                 V (&next)[kStates], V (&saved)[kSaved]) {
    const V f = sigmoid(gx[0] + gh[0]);
    const V n = tanh(fma(f, gh[1], gx[1]));
    next[0] = fma(f, n - state[0], state[0]);
    saved[0] = f;
    saved[1] = n;
    saved[2] = gh[1];
  }

  template <class V>
  RNNKERN_FN static void backward(const V (&saved)[kSaved], const V (&state)[kStates], const V (&dnext)[kStates],
                                  V (&dgx)[kGates], V (&dgh)[kGates], V (&dstate)[kStates]) {
    const V one(1);
    const V f = saved[0], n = saved[1], gh_n = saved[2];
    const V dn = dnext[0] * f * (one - n * n);
    const V df = dnext[0] * (n - state[0]) + dn * gh_n;
    dgx[0] = dgh[0] = df * f * (one - f);
    dgx[1] = dn;
    dgh[1] = dn * f;
    dstate[0] = dnext[0] * (one - f);
  }
};

}  // namespace rnnkern
