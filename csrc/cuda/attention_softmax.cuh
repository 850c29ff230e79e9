// The softmax of rows of scores over their valid keys, and its gradient; a block of 128 threads per row.
//
// Memory: 4 to 12 bytes per pair, from and to the L2 cache; the row is read three times, of which the L1 cache serves
// two. A row without a valid key gives zeros.
#pragma once

#include "cuda/attention_parts.cuh"

namespace rnnkern::cuda {

constexpr int kSoftmaxThreads = 128;
constexpr size_t kSoftmaxShared = kSoftmaxThreads / 32 * sizeof(float);

template <class S>
struct Softmax {
  Padding padding;
  int64_t Tq, Tk, row;  // row: elements between rows of scores and what is shaped like them
  const float* scores;  // [B, Tq, row]
  S* probabilities;     // [B, Tq, row], zero where padding
  S* weights;           // [B, Tq, Tk]: the same, or null
};

// dL/dscore = p (dL/dp - sum of p dL/dp), of the scores before their scale.
template <class S>
struct SoftmaxGradient {
  Softmax<S> softmax;
  const float* dcontext_value;  // [B, Tq, row]: dL/dweights by way of the context, or null: zero
  Tensor3<S> dweights;          // [B, Tq, Tk], or null data: zero
  float scale;                  // of the scores
  S* dscores;                   // [B, Tq, row], zero where padding; or null,
  float* dscores_float;         // and this instead, which may be dcontext_value's memory
};

// One row: its largest score and the sum of exponentials, known to all threads.
struct SoftmaxRow {
  const float* scores;
  Keys keys;
  float largest, inverse;

  template <class S>
  RNNKERN_DEVICE SoftmaxRow(const Softmax<S>& a)
      : scores(a.scores + block_index() * a.row), keys(a.padding, block_index() / a.Tq) {
    float* const slots = reinterpret_cast<float*>(shared_memory());
    float most = kMinusInfinity, sum = 0.0f;
    for (int64_t j = thread_index(); j < keys.length; j += kSoftmaxThreads) {
      if (keys.valid(j)) most = larger(load(scores + j), most);
    }
    largest = over_block<kSoftmaxThreads / 32>(most, slots, Largest());
    for (int64_t j = thread_index(); j < keys.length; j += kSoftmaxThreads) {
      if (keys.valid(j)) sum += exponential(j);
    }
    inverse = 1.0f / over_block<kSoftmaxThreads / 32>(sum, slots, Sum());
  }

  RNNKERN_DEVICE float exponential(int64_t j) const { return exp2_approx((load(scores + j) - largest) * kLog2e); }
  RNNKERN_DEVICE float probability(int64_t j) const { return keys.valid(j) ? exponential(j) * inverse : 0.0f; }
};

template <class S>
RNNKERN_DEVICE void put_probability(const Softmax<S>& a, int64_t j, float probability) {
  const S rounded = from_float<S>(probability);
  store(a.probabilities + block_index() * a.row + j, rounded);
  if (a.weights) store(a.weights + block_index() * a.Tk + j, rounded);
}

template <class S>
RNNKERN_KERNEL(kSoftmaxThreads, 8)
attention_softmax(RNNKERN_ARGUMENT Softmax<S> a) {
  const SoftmaxRow row(a);
  for (int64_t j = thread_index(); j < a.Tk; j += kSoftmaxThreads) put_probability(a, j, row.probability(j));
}

template <class S>
RNNKERN_KERNEL(kSoftmaxThreads, 8)
attention_softmax_gradient(RNNKERN_ARGUMENT SoftmaxGradient<S> g) {
  const Softmax<S>& a = g.softmax;
  const int64_t at = block_index() * a.row, b = block_index() / a.Tq, i = block_index() % a.Tq;
  const S* const dweights = g.dweights.data ? g.dweights.data + b * g.dweights.batch + i * g.dweights.row : nullptr;
  const SoftmaxRow row(a);
  const auto gradient = [&](int64_t j) {
    return (g.dcontext_value ? load(g.dcontext_value + at + j) : 0.0f) +
           (dweights ? to_float(load(dweights + j)) : 0.0f);
  };
  float mean = 0.0f;
  for (int64_t j = thread_index(); j < row.keys.length; j += kSoftmaxThreads) {
    if (row.keys.valid(j)) mean = multiply_add(row.probability(j), gradient(j), mean);
  }
  mean = over_block<kSoftmaxThreads / 32>(mean, reinterpret_cast<float*>(shared_memory()), Sum());
  for (int64_t j = thread_index(); j < a.Tk; j += kSoftmaxThreads) {
    const bool valid = row.keys.valid(j);
    const float probability = valid ? row.probability(j) : 0.0f;
    const float dscore = valid ? probability * (gradient(j) - mean) * g.scale : 0.0f;
    put_probability(a, j, probability);
    if (g.dscores)
      store(g.dscores + at + j, from_float<S>(dscore));
    else
      store(g.dscores_float + at + j, dscore);
  }
}

}  // namespace rnnkern::cuda
