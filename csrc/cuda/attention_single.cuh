// Attention of one query per batch row, forward: a step of a decoder.
//
// A block has 64 keys of one row, whatever the batch, so that a row's result does not depend on it: scores (a warp per
// key, four keys in flight), their softmax, their part of the context; a second kernel joins a row's parts in order.
// Up to 64 keys the first kernel does all. Memory-bound: keys and values are read once, 2 (D + Dv) bytes per key in 16
// bits, with 4 Dv / 64 of parts beside them; the additive score's 1.5 MUFU operations per element of a key take no
// longer than that. B = 64, Tk = 1000, D = Dv = 512 in bfloat16: 131 MB, 31 us at 4.2 TB/s.
#pragma once

#include "cuda/attention_parts.cuh"

namespace rnnkern::cuda {

constexpr int kSingleKeys = 64, kSingleThreads = 128, kSingleWarps = kSingleThreads / 32, kTogether = 4;

template <class S>
struct Single {
  Tensor3<S> query, key, value;
  const S* vector;  // [D], additive; null: dot
  Padding padding;
  int64_t Tk, D, Dv, splits;
  float scale;
  S* context;            // [B, Dv]
  S* weights;            // [B, Tk] or null
  float* stats;          // [B, splits, 2]: largest score, sum of exponentials; so the next, if there are several splits
  float* scores;         // [B, splits * 64], or null: no weights
  float* context_parts;  // [B, splits, Dv]
};

struct SingleShared {
  float scores[kSingleKeys], powers[kSingleKeys];
  float context[kSingleWarps][32 * 8];
};

// Of an additive score: subtracts vector_a tanh_a / 2 of two elements.
RNNKERN_DEVICE void subtract_two_terms(float q0, float k0, float v0, float q1, float k1, float v1, float& sum) {
  const float d0 = guarded_denominator(q0, k0), d1 = guarded_denominator(q1, k1);
  sum += multiply_add(multiply_add(v0, d1, v1 * d0), reciprocal_approx(d0 * d1), -0.5f * (v0 + v1));
}

// The scores of the warp's keys, key = warp + 4 i, into shared memory. kWidth elements of a row per lane.
template <class S, bool kAdditive, int kWidth>
RNNKERN_DEVICE void single_scores(const Single<S>& a, const Keys& keys, int64_t b, int64_t first,
                                  SingleShared& shared) {
  const S* const query = a.query.data + b * a.query.batch;
  const S* const key = a.key.data + b * a.key.batch;
  for (int group = warp_index(); group < kSingleKeys; group += kSingleWarps * kTogether) {
    bool valid[kTogether];
    float sum[kTogether] = {};
    RNNKERN_UNROLLED
    for (int j = 0; j < kTogether; ++j) valid[j] = keys.valid(first + group + j * kSingleWarps);
    for (int64_t column = lane_index() * kWidth; column < a.D; column += 32 * kWidth) {
      const int64_t left = a.D - column;
      float q[kWidth], v[kWidth], k[kTogether][kWidth];
      load_floats(q, query + column, left, kWidth > 1);
      if (kAdditive) load_floats(v, a.vector + column, left, false);
      RNNKERN_UNROLLED
      for (int j = 0; j < kTogether; ++j) {
        load_floats(k[j], key + (first + group + j * kSingleWarps) * a.key.row + column, valid[j] ? left : 0,
                    kWidth > 1);
      }
      RNNKERN_UNROLLED
      for (int j = 0; j < kTogether; ++j) {
        if constexpr (!kAdditive) {
          RNNKERN_UNROLLED
          for (int e = 0; e < kWidth; ++e) sum[j] = multiply_add(q[e], k[j][e], sum[j]);
        } else if constexpr (kWidth == 1) {
          sum[j] += v[0] * (reciprocal_approx(guarded_denominator(q[0], k[j][0])) - 0.5f);
        } else {
          RNNKERN_UNROLLED
          for (int e = 0; e < kWidth; e += 2)
            subtract_two_terms(q[e], k[j][e], v[e], q[e + 1], k[j][e + 1], v[e + 1], sum[j]);
        }
      }
    }
    RNNKERN_UNROLLED
    for (int j = 0; j < kTogether; ++j) {
      const float score = over_warp(sum[j], Sum()) * (kAdditive ? -2.0f : a.scale);
      if (lane_index() == 0) store(shared.scores + group + j * kSingleWarps, valid[j] ? score : kMinusInfinity);
    }
  }
}

// The sum of power_j value_j over the block's keys, by 32 kWidth columns; put(column, sum).
template <class S, int kWidth, class Put>
RNNKERN_DEVICE void single_context(const Single<S>& a, const Keys& keys, int64_t b, int64_t first, SingleShared& shared,
                                   const Put& put) {
  const S* const value = a.value.data + b * a.value.batch;
  for (int64_t columns = 0; columns < a.Dv; columns += 32 * kWidth) {
    const int64_t column = columns + lane_index() * kWidth;
    float sum[kWidth] = {};
    RNNKERN_UNROLL(4)
    for (int j = warp_index(); j < kSingleKeys; j += kSingleWarps) {
      const bool valid = keys.valid(first + j);
      float x[kWidth];
      load_floats(x, value + (first + j) * a.value.row + column, valid ? a.Dv - column : 0, kWidth > 1);
      const float power = valid ? load(shared.powers + j) : 0.0f;
      RNNKERN_UNROLLED
      for (int e = 0; e < kWidth; ++e) sum[e] = multiply_add(power, x[e], sum[e]);
    }
    RNNKERN_UNROLLED
    for (int e = 0; e < kWidth; ++e) store(&shared.context[warp_index()][lane_index() * kWidth + e], sum[e]);
    sync_block();
    for (int c = thread_index(); c < 32 * kWidth && columns + c < a.Dv; c += kSingleThreads) {
      float total = 0.0f;
      RNNKERN_UNROLLED
      for (int warp = 0; warp < kSingleWarps; ++warp) total += load(&shared.context[warp][c]);
      put(columns + c, total);
    }
    sync_block();
  }
}

template <class S, bool kAdditive>
RNNKERN_KERNEL(kSingleThreads, 4)
attention_single(RNNKERN_ARGUMENT Single<S> a) {
  constexpr int kWidth = 16 / int(sizeof(S));
  SingleShared& shared = *reinterpret_cast<SingleShared*>(shared_memory());
  const int64_t split = block_index() % a.splits, b = block_index() / a.splits, first = split * kSingleKeys;
  const Keys keys(a.padding, b);
  if (a.query.aligned && a.key.aligned)
    single_scores<S, kAdditive, kWidth>(a, keys, b, first, shared);
  else
    single_scores<S, kAdditive, 1>(a, keys, b, first, shared);
  sync_block();

  const int lane = lane_index();
  const float mine = load(shared.scores + lane), next = load(shared.scores + lane + 32);
  const float largest = over_warp(larger(mine, larger(next, kMinusInfinity)), Largest());
  const float base = largest == kMinusInfinity ? 0.0f : largest;
  const float power = exp2_approx((mine - base) * kLog2e), next_power = exp2_approx((next - base) * kLog2e);
  const float sum = over_warp(power + next_power, Sum());
  if (warp_index() == 0) {
    store(shared.powers + lane, power);
    store(shared.powers + lane + 32, next_power);
  }
  sync_block();

  const bool alone = a.splits == 1;
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const auto put = [&](int64_t column, float total) {
    if (alone)
      store(a.context + b * a.Dv + column, from_float<S>(total * inverse));
    else
      store(a.context_parts + (b * a.splits + split) * a.Dv + column, total);
  };
  if (a.value.aligned)
    single_context<S, kWidth>(a, keys, b, first, shared, put);
  else
    single_context<S, 1>(a, keys, b, first, shared, put);
  const int j = thread_index();
  if (!alone && j == 0) {
    store(a.stats + 2 * (b * a.splits + split), largest);
    store(a.stats + 2 * (b * a.splits + split) + 1, sum);
  }
  if (!a.weights || j >= kSingleKeys) return;
  if (!alone)
    store(a.scores + (b * a.splits + split) * kSingleKeys + j, load(shared.scores + j));
  else if (j < a.Tk)
    store(a.weights + b * a.Tk + j, from_float<S>(load(shared.powers + j) * inverse));
}

constexpr int kJoinSplits = 256;  // of which a block keeps the factors at a time
constexpr size_t kJoinShared = sizeof(float) * (kSingleWarps + kJoinSplits);

// Joins the parts of several splits: a block for 128 columns of a row's context, then of its weights.
template <class S>
RNNKERN_KERNEL(kSingleThreads, 4)
join_single(RNNKERN_ARGUMENT Single<S> a) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  float* const factors = slots + kSingleWarps;  // [kJoinSplits]
  const int64_t context_blocks = parts_of(a.Dv, kSingleThreads);
  const int64_t blocks = context_blocks + (a.weights ? parts_of(a.Tk, kSingleThreads) : 0);
  const int64_t b = block_index() / blocks, part = block_index() % blocks;
  const float* const stats = a.stats + b * a.splits * 2;
  float most = kMinusInfinity, all = 0.0f;
  for (int64_t s = thread_index(); s < a.splits; s += kSingleThreads) most = larger(load(stats + 2 * s), most);
  most = over_block<kSingleWarps>(most, slots, Largest());
  const auto factor = [&](int64_t s) {
    return load(stats + 2 * s + 1) == 0.0f ? 0.0f : exp2_approx((load(stats + 2 * s) - most) * kLog2e);
  };
  for (int64_t s = thread_index(); s < a.splits; s += kSingleThreads)
    all = multiply_add(factor(s), load(stats + 2 * s + 1), all);
  all = over_block<kSingleWarps>(all, slots, Sum());
  const float inverse = all == 0.0f ? 0.0f : 1.0f / all;
  if (part < context_blocks) {
    const int64_t column = part * kSingleThreads + thread_index();
    float sum = 0.0f;
    for (int64_t first = 0; first < a.splits; first += kJoinSplits) {
      const int count = int(smaller(a.splits - first, kJoinSplits));
      sync_block();  // the factors before these are no longer read
      for (int s = thread_index(); s < count; s += kSingleThreads) store(factors + s, factor(first + s));
      sync_block();
      const float* const parts = a.context_parts + (b * a.splits + first) * a.Dv + column;
      for (int s = 0; s < count && column < a.Dv; ++s)
        sum = multiply_add(load(factors + s), load(parts + s * a.Dv), sum);
    }
    if (column < a.Dv) store(a.context + b * a.Dv + column, from_float<S>(sum * inverse));
  } else {
    const int64_t j = (part - context_blocks) * kSingleThreads + thread_index();
    if (j >= a.Tk) return;
    const float score = load(a.scores + b * a.splits * kSingleKeys + j);
    const float power = score == kMinusInfinity ? 0.0f : exp2_approx((score - most) * kLog2e);
    store(a.weights + b * a.Tk + j, from_float<S>(power * inverse));
  }
}

}  // namespace rnnkern::cuda
