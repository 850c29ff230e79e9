// A stack of layers of one direction over a few steps, with weights packed before: what a short call runs.
#pragma once

#include <vector>

#include "cpu/layer.h"

namespace rnnkern {

struct StackLayer {
  int64_t I;
  LayerWeights weights;
  const void* packed;  // from pack_layer
};

struct Stack {
  int cell;
  Dtype dtype;  // the states' compute type too, for cells of two states
  int64_t H;
  std::vector<StackLayer> layers;  // L
};

struct StackCall {
  int64_t T, B;
  const void* x;            // S [T, B, I], elements of a row contiguous
  int64_t x_time, x_batch;  // strides in elements
  const void *h0, *c0;      // S [L, B, H], or null: zeros
  void* y;                  // S [T, B, H], or null if it is not wanted, for one step
  void *h_n, *c_n;          // S [L, B, H]; may be h0 and c0
};

// Multiply-adds of the call.
RNNKERN_API double stack_work(const Stack& stack, int64_t T, int64_t B);

// False, and nothing is written, if the weights of a layer are no longer those of its pack (see stale_pack).
RNNKERN_API bool run_stack(const Stack& stack, const StackCall& call, const ParallelFor& parallel);

}  // namespace rnnkern
