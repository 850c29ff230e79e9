// The stepwise engine's launchers; stepwise.cuh has the kernels.
#pragma once

#include "cuda/layer.h"

namespace rnnkern::cuda {

constexpr int kStepThreads = 128;

template <class S, class C>
struct StepForward {
  Forward<S, C> forward;
  int64_t step;
  S* h;         // [D, B, H]: what the step reads
  C* c;         // [D, B, H] or null
  const C* gh;  // [D, B, G*H]  h W_hh^T
};

template <class S>
struct PreviousH {
  Sequence sequence;
  int H;
  const S *h0, *y;
  S* h_before;
};

template <class S>
struct WithoutPadding {
  Sequence sequence;
  int64_t I;
  const S* x;  // [T, B, I]
  S* out;      // the same; zero past each row's end
};

template <class S, class C>
struct StepBackward {
  Backward<S, C> backward;
  int64_t step;
  S* dgh_step;          // [D, B, G*H]: dgh of this step, zero for rows past their end
  const C* dh_product;  // [D, B, H]: dgh W_hh of the step after this one
  C* dh_direct;         // [D, B, H]: what reached h otherwise
  C* dc;                // [D, B, H] or null
};

}  // namespace rnnkern::cuda
