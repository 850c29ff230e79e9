// A cell's step and the attention of its new state in one launch of resident blocks: a cooperative grid.
//
// Cell, then a barrier of the grid, then (with w_query) the query's projection and another barrier, then attention: a
// block takes 32 keys of a row, a warp 8 of them at once; the last block of a row to finish joins the row's parts.
//
// Why a grid and not a cluster for each row: a cluster of 16 SMs reads weights at 16 x 64 bytes per clock, 1.8 TB/s,
// and several clusters read them several times. LSTM, H = I = 512 in bfloat16: 2.3 us for one cluster, against 0.8 us
// for the grid and about 1 us for its barrier (a counter in L2: an atomic and a poll), and the keys would have 16 SMs
// only. At H = 1024 it is 9 us against 5. A grid also runs where there are no clusters. Attention over Tk = 200, D = Dv
// = 512, B = 8: 3.3 MB, 0.8 us; its parts are an eighth of that in traffic. MUFU operations of the additive score, two
// for each of 0.8 M elements: 0.4 us.
//
// Counters (AttentionStep::counters): one for each barrier, one for blocks that are done, one for parts of each row.
// The last block leaves all zero again: a later launch finds them so, in a CUDA graph too.
#pragma once

#include "cuda/step.cuh"

namespace rnnkern::cuda::step {

constexpr int kWarpKeys = kStepKeys / kWarps;
constexpr float kLog2e = 1.44269504f, kMinusInfinity = -__builtin_huge_valf();

template <class S>
struct AttentionShared {
  float scores[kStepKeys];
  float context[kWarps][kStretch<S, true>];
  unsigned last;
};

// All blocks arrive; waiting, they see what all wrote before.
RNNKERN_DEVICE void arrive_grid(unsigned* counter) {
  sync_block();
  if (thread_index() == 0) add_release(counter, 1);
}
RNNKERN_DEVICE void wait_grid(const unsigned* counter) {
  if (thread_index() == 0) {
    while (load_acquire(counter) < unsigned(block_count())) {
    }
  }
  sync_block();
}

// query = w_query h', one tile. h' comes from other blocks of this launch, after a barrier.
template <int kRows, class S>
RNNKERN_DEVICE void step_query(const AttentionStep<S>& a, int job, float* shared) {
  using T = Tile<1, 0, kRows>;
  const int B = a.cell.B, unit0 = job / T::row_tiles(B) * T::kUnits, row0 = job % T::row_tiles(B) * kRows;
  float sums[T::kSums] = {};
  add_products<T, false>(sums, Product<S>{a.w_query, a.cell.h_next, a.D, B, a.cell.H}, unit0, row0, warp_index());
  share_sums<T>(sums, shared);
  const Finished<T> own(unit0, row0, a.D, B);
  if (own.exists) store(a.query + int64_t(own.row) * a.D + own.unit, sum_of<T>(shared, 0, own.i, own.r));
}

RNNKERN_DEVICE float larger(float a, float b) { return a > b ? a : b; }
RNNKERN_DEVICE float largest_of_warp(float value) {
  RNNKERN_UNROLLED
  for (int distance = 16; distance > 0; distance /= 2) value = larger(value, shuffle_xor(value, distance));
  return value;
}

// Rows of keys or values of which each begins at a multiple of 16 bytes.
template <class S>
RNNKERN_DEVICE bool aligned_rows(const StepRows<S>& rows, int columns) {
  return (reinterpret_cast<uint64_t>(rows.data) | uint64_t(rows.batch | rows.time | columns) * sizeof(S)) % 16 == 0;
}

// The lane's part of a row of floats, as load_part's.
template <class S, bool kAligned>
RNNKERN_DEVICE void load_query(float (&to)[kWidth<S, kAligned>], const float* row, int stretch, int count) {
  if constexpr (kAligned) {
    const int k = element<S, true>(stretch, 0);
    RNNKERN_UNROLLED
    for (int j = 0; j < kWidth<S, kAligned>; j += 4) {
      Vec<float, 4> four{};
      if (k < count) four = load_l2(reinterpret_cast<const Vec<float, 4>*>(row + k + j));
      RNNKERN_UNROLLED
      for (int i = 0; i < 4; ++i) to[j + i] = four.at[i];
    }
  } else {
    RNNKERN_UNROLLED
    for (int j = 0; j < kWidth<S, kAligned>; ++j) {
      const int k = element<S, false>(stretch, j);
      to[j] = k < count ? load_l2(row + k) : 0.0f;
    }
  }
}

// The scores of the warp's keys into shared memory; minus infinity past `length`.
template <bool kAdditive, bool kAligned, class S>
RNNKERN_DEVICE void score_keys(const AttentionStep<S>& a, int64_t b, int64_t first, int64_t length, float* scores) {
  const S* const key = a.key.data + b * a.key.batch;
  float sums[kWarpKeys] = {};
  for (int stretch = 0; stretch * kStretch<S, kAligned> < a.D; ++stretch) {
    Vec<S, kWidth<S, kAligned>> keys[kWarpKeys], vector;
    float query[kWidth<S, kAligned>];
    RNNKERN_UNROLLED
    for (int i = 0; i < kWarpKeys; ++i)
      keys[i] = load_part<kAligned>(key + (first + i) * a.key.time, stretch, first + i < length ? a.D : 0);
    if constexpr (kAdditive) vector = load_part<kAligned>(a.vector, stretch, a.D);
    load_query<S, kAligned>(query, a.query + b * a.D, stretch, a.D);
    RNNKERN_UNROLLED
    for (int j = 0; j < kWidth<S, kAligned>; ++j) {
      RNNKERN_UNROLLED
      for (int i = 0; i < kWarpKeys; ++i) {
        const float k = to_float(keys[i].at[j]);
        if constexpr (kAdditive)
          sums[i] = multiply_add(to_float(vector.at[j]), tanh(Float(query[j] + k)).value, sums[i]);
        else
          sums[i] = multiply_add(query[j], k, sums[i]);
      }
    }
  }
  sum_over_lanes(sums);
  const int i = lane_index() / (32 / kWarpKeys);  // whose sum this lane has
  const float score = kAdditive ? sums[0] : sums[0] * a.scale;
  if (lane_index() % (32 / kWarpKeys) == 0) store(scores + i, first + i < length ? score : kMinusInfinity);
}
template <bool kAdditive, class S>
RNNKERN_DEVICE void score_keys(const AttentionStep<S>& a, int64_t b, int64_t first, int64_t length, float* scores) {
  const uint64_t addresses = reinterpret_cast<uint64_t>(a.query) | reinterpret_cast<uint64_t>(a.vector);
  if (addresses % 16 == 0 && aligned_rows(a.key, a.D))
    score_keys<kAdditive, true>(a, b, first, length, scores);
  else
    score_keys<kAdditive, false>(a, b, first, length, scores);
}

// The sum of power times value over the block's keys, by stretches of columns: put(column, sum).
template <bool kAligned, class S, class Put>
RNNKERN_DEVICE void sum_values(const AttentionStep<S>& a, int64_t b, int64_t first, int64_t length,
                               const float (&powers)[kWarpKeys], AttentionShared<S>& shared, const Put& put) {
  const S* const value = a.value.data + b * a.value.batch;
  float* const own = shared.context[warp_index()];
  for (int stretch = 0; stretch * kStretch<S, kAligned> < a.Dv; ++stretch) {
    Vec<S, kWidth<S, kAligned>> values[kWarpKeys];
    RNNKERN_UNROLLED
    for (int i = 0; i < kWarpKeys; ++i)
      values[i] = load_part<kAligned>(value + (first + i) * a.value.time, stretch, first + i < length ? a.Dv : 0);
    float sums[kWidth<S, kAligned>] = {};
    RNNKERN_UNROLLED
    for (int i = 0; i < kWarpKeys; ++i) {
      RNNKERN_UNROLLED
      for (int j = 0; j < kWidth<S, kAligned>; ++j)
        sums[j] = multiply_add(powers[i], to_float(values[i].at[j]), sums[j]);
    }
    RNNKERN_UNROLLED
    for (int j = 0; j < kWidth<S, kAligned>; ++j) store(own + element<S, kAligned>(0, j), sums[j]);
    sync_block();
    for (int c = thread_index(); c < kStretch<S, kAligned> && stretch * kStretch<S, kAligned> + c < a.Dv;
         c += kThreads) {
      float sum = 0.0f;
      RNNKERN_UNROLLED
      for (int warp = 0; warp < kWarps; ++warp) sum += load(&shared.context[warp][c]);
      put(stretch * kStretch<S, kAligned> + c, sum);
    }
    sync_block();
  }
}

// The context of a row from its parts [count, Dv + 2].
template <class S>
RNNKERN_DEVICE void join_parts(const AttentionStep<S>& a, int64_t b, const float* parts, int64_t count) {
  const int64_t size = a.Dv + 2;
  float most = kMinusInfinity;
  for (int64_t i = lane_index(); i < count; i += 32) most = larger(load_l2(parts + i * size + a.Dv), most);
  most = largest_of_warp(most);
  for (int column = thread_index(); column < a.Dv; column += kThreads) {
    float sum = 0.0f, all = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float* const part = parts + i * size;
      const float factor = exp2_approx((load_l2(part + a.Dv) - most) * kLog2e);
      sum = multiply_add(factor, load_l2(part + column), sum);
      all = multiply_add(factor, load_l2(part + a.Dv + 1), all);
    }
    store(a.context + b * a.Dv + column, from_float<S>(sum / all));
  }
}

// One job: the keys of one part of a row.
template <class S>
RNNKERN_DEVICE void attend(const AttentionStep<S>& a, int64_t b, int64_t part, AttentionShared<S>& shared) {
  int64_t length = a.Tk;
  if (a.lengths) {
    const int64_t given = load(a.lengths + b);
    length = given < 0 ? 0 : given < a.Tk ? given : a.Tk;
  }
  const int64_t count = step_splits(length), first = part * kStepKeys + warp_index() * kWarpKeys;
  if (part >= count) return;
  float* const own_scores = shared.scores + warp_index() * kWarpKeys;
  if (a.vector)
    score_keys<true>(a, b, first, length, own_scores);
  else
    score_keys<false>(a, b, first, length, own_scores);
  sync_block();

  const float score = load(shared.scores + lane_index());
  const float largest = largest_of_warp(score), base = largest == kMinusInfinity ? 0.0f : largest;
  const float power = exp2_approx((score - base) * kLog2e);
  float powers[kWarpKeys], sum[1] = {power};
  RNNKERN_UNROLLED
  for (int i = 0; i < kWarpKeys; ++i) powers[i] = shuffle(power, warp_index() * kWarpKeys + i);
  sum_over_lanes(sum);
  const float inverse = sum[0] == 0.0f ? 0.0f : 1.0f / sum[0];
  float* const parts = a.parts + b * step_splits(a.Tk) * (a.Dv + 2);
  float* const own = parts + part * (a.Dv + 2);
  const auto put = [&](int column, float total) {
    if (count == 1)
      store(a.context + b * a.Dv + column, from_float<S>(total * inverse));
    else
      store(own + column, total);
  };
  if (aligned_rows(a.value, a.Dv))
    sum_values<true>(a, b, first, length, powers, shared, put);
  else
    sum_values<false>(a, b, first, length, powers, shared, put);
  if (count == 1) return;

  if (thread_index() == 0) {
    store(own + a.Dv, largest);
    store(own + a.Dv + 1, sum[0]);
    unsigned* const done = a.counters + kStepPhases + b;
    fence_device();  // what the block wrote, and what others did
    const bool last = add_release(done, 1) + 1 == unsigned(count);
    fence_device();
    if (last) store(done, 0u);
    store(&shared.last, unsigned(last));
  }
  sync_block();
  if (load(&shared.last)) join_parts(a, b, parts, count);
}

template <class Cell, int kRows, class S>
constexpr size_t kAttentionShared =
    sizeof(AttentionShared<S>) > kCellShared<Cell, kRows> ? sizeof(AttentionShared<S>) : kCellShared<Cell, kRows>;

// Tiles of several rows need more registers than four blocks leave each other.
template <class Cell, int kRows, class S>
RNNKERN_KERNEL(kThreads, kRows == 1 ? 4 : 3)
attention_step(RNNKERN_ARGUMENT AttentionStep<S> a) {
  const int B = a.cell.B, blocks = block_count();
  const int64_t parts = step_splits(a.Tk);
  float* const sums = reinterpret_cast<float*>(shared_memory());
  unsigned *const cell_done = a.counters, *const query_done = a.counters + 1, *const all_done = a.counters + 2;
  for (int job = block_index(); job < CellTile<Cell, kRows>::jobs(a.cell.H, B); job += blocks) {
    step_cell<Cell, kRows>(a.cell, job, a.w_query ? nullptr : a.query, sums);
    sync_block();  // the sums have been read
  }
  arrive_grid(cell_done);
  wait_grid(cell_done);
  if (a.w_query) {
    for (int job = block_index(); job < Tile<1, 0, kRows>::jobs(a.D, B); job += blocks) {
      step_query<kRows>(a, job, sums);
      sync_block();
    }
    arrive_grid(query_done);
    wait_grid(query_done);
  }
  for (int64_t job = block_index(); job < B * parts; job += blocks) {
    attend(a, job / parts, job % parts, *reinterpret_cast<AttentionShared<S>*>(shared_memory()));
    sync_block();
  }
  if (thread_index() == 0 && add_release(all_done, 1) + 1 == unsigned(blocks)) {
    fence_device();  // clear after what the others read
    for (int i = 0; i < kStepPhases; ++i) store(a.counters + i, 0u);
  }
}

}  // namespace rnnkern::cuda::step
