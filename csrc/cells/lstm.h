// Long short-term memory, torch's variant: no peepholes, gates i, f, g, o.
//
//   i = sigmoid(gx_i + gh_i)   f = sigmoid(gx_f + gh_f)   g = tanh(gx_g + gh_g)   o = sigmoid(gx_o + gh_o)
//   c' = f * c + i * g         h' = o * tanh(c')
//
// backward computes c' and tanh(c') again: cheaper than the memory to keep them.
// Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
#pragma once

#include "cells/cell.h"

namespace rnnkern {

struct Lstm {
  static constexpr int kGates = 4;   // i, f, g, o
  static constexpr int kStates = 2;  // h, c
  static constexpr int kSaved = 4;   // i, f, g, o after their activations
  static constexpr int kSplitGates = 0;

  template <class V>
  RNNKERN_FN static void forward(const V (&gx)[kGates], const V (&gh)[kGates], const V (&state)[kStates],
                                 V (&next)[kStates], V (&saved)[kSaved]) {
    const V i = sigmoid(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    const V g = tanh(gx[2] + gh[2]);
    const V o = sigmoid(gx[3] + gh[3]);
    next[1] = fma(f, state[1], i * g);
    next[0] = o * tanh(next[1]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  template <class V>
  RNNKERN_FN static void backward(const V (&saved)[kSaved], const V (&state)[kStates], const V (&dnext)[kStates],
                                  V (&dgx)[kGates], V (&dgh)[kGates], V (&dstate)[kStates]) {
    const V one(1);
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(fma(f, state[1], i * g));
    const V dc = fma(dnext[0] * o, one - tanh_c * tanh_c, dnext[1]);
    dgx[0] = dgh[0] = dc * g * i * (one - i);
    dgx[1] = dgh[1] = dc * state[1] * f * (one - f);
    dgx[2] = dgh[2] = dc * i * (one - g * g);
    dgx[3] = dgh[3] = dnext[0] * tanh_c * o * (one - o);
    dstate[0] = V(0);
    dstate[1] = dc * f;
  }
};

}  // namespace rnnkern
