// Elman network with relu: h' = relu(gx + gh).
//
// Source: Elman 1990, in torch's form (two biases).
#pragma once

#include "cells/cell.h"

namespace rnnkern {

struct RnnRelu {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 1;   // h'
  static constexpr int kSplitGates = 0;

  template <class V>
  RNNKERN_FN static void forward(const V (&gx)[kGates], const V (&gh)[kGates], const V (&)[kStates], V (&next)[kStates],
                                 V (&saved)[kSaved]) {
    next[0] = relu(gx[0] + gh[0]);
    saved[0] = next[0];
  }

  template <class V>
  RNNKERN_FN static void backward(const V (&saved)[kSaved], const V (&)[kStates], const V (&dnext)[kStates],
                                  V (&dgx)[kGates], V (&dgh)[kGates], V (&dstate)[kStates]) {
    dgx[0] = dgh[0] = unless_negative(saved[0], dnext[0]);
    dstate[0] = V(0);
  }
};

}  // namespace rnnkern
