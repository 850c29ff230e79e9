// Attention on the CPU, forward and backward, without torch: raw pointers, sizes, strides, injected threads.
//
//   weights[b, i, j] = softmax over the valid j of score(query[b, i], key[b, j])       context = weights . value
//   dot:       score(q, k) = scale * sum_d q_d k_d
//   additive:  score(q, k) = sum_a vector_a tanh(q_a + k_a)             q and k are already projected to A elements
//
// A row without a valid key has zero weights, context and gradients. Keys and values that are not valid are never read.
// Sources: Luong et al. 2015 (arXiv:1508.04025), Bahdanau et al. 2015 (arXiv:1409.0473).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/team.h"

namespace rnnkern {

enum class Score { dot, additive };

// A [B, T, C] array: strides in elements, the C elements of a row contiguous.
struct Rows {
  const void* data;
  int64_t batch, time;
};

// S is the storage type of `dtype`.
struct AttentionInputs {
  Dtype dtype;
  Score score;
  int64_t B, Tq, Tk, D, Dv;
  double scale;            // of the dot score
  Rows query, key, value;  // S [B, Tq, D], [B, Tk, D], [B, Tk, Dv]
  const void* vector;      // S [D], contiguous; additive score only
  const int64_t* lengths;  // [B], each in 0..Tk, or null: keys from lengths[b] on are padding
  Rows mask;               // bool [B, Tk], time stride 1, true is padding; or null data
};

struct AttentionOutputs {
  void* context;  // S [B, Tq, Dv]
  void* weights;  // S [B, Tq, Tk] or null: not wanted
};

struct AttentionGradients {
  Rows dcontext;  // S [B, Tq, Dv]; null data is zero
  Rows dweights;  // S [B, Tq, Tk]; null data is zero
  void* dquery;   // S [B, Tq, D]
  void* dkey;     // S [B, Tk, D]
  void* dvalue;   // S [B, Tk, Dv]
  void* dvector;  // S [D]; additive score only
};

struct AttentionKernels {
  void (*forward)(const AttentionInputs&, const AttentionOutputs&, const ParallelFor&);
  void (*backward)(const AttentionInputs&, const AttentionGradients&, const ParallelFor&);
};

// Run on the current instruction set. Results do not depend on the number of threads.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& out, const ParallelFor& parallel);
void attention_backward(const AttentionInputs& in, const AttentionGradients& grad, const ParallelFor& parallel);

}  // namespace rnnkern
