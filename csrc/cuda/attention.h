// Attention on a GPU, forward and backward, without torch: what it computes, takes and gives is in cpu/attention.h.
//
// Differences: float32, bfloat16 and float16 only; lengths beyond 0..Tk are taken as the nearest of these, since nobody
// can look at them without waiting for the device; memory for what passes between kernels comes from the caller.
//
// One query (Tq = 1), forward: attention_single.cuh. Otherwise scores, softmax and sums are kernels of their own, with
// the scores of all pairs [B, Tq, Tk] between them, in float, for as many batch rows at a time as fit the L2 cache:
// that spreads any shape over the whole chip, serves any D and Dv, and sums in an order that only the shape decides.
#pragma once

#include "cpu/attention.h"

namespace rnnkern::cuda {

// Bytes that the launches below need, at an address that is a multiple of 16.
int64_t attention_forward_scratch(const AttentionInputs& in);
int64_t attention_backward_scratch(const AttentionInputs& in);

// Launch on a stream (cudaStream_t) and do not wait. Every result is overwritten; deterministic.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& out, void* scratch, void* stream);
void attention_backward(const AttentionInputs& in, const AttentionGradients& grad, void* scratch, void* stream);

}  // namespace rnnkern::cuda
