// Additive scores of many queries and keys, score(q, k) = sum_a vector_a tanh(q_a + k_a), and their gradients.
//
// tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k): the exponentials are taken once per element of a tile, and two
// terms share a reciprocal, v0 r0 + v1 r1 = (v0 d1 + v1 d0) / (d0 d1). Per pair of terms: 6 multiply-adds and 1 MUFU
// operation, which take 3.5 of 4 issue slots per 16 MUFU lanes: 32 terms per clock of a multiprocessor is the floor,
// and the tile's exponentials add 128 / 2048 to it. Gradient, with h
// = tanh / 2 = 0.5 - r and ds = dL/dscore: 1 - tanh^2 = 4 (0.25 - h^2), so that per term there are 6.5 multiply-adds
// and half a reciprocal, and FFMA is the bound: 20 terms per clock of a multiprocessor. Guard: 32 columns of a tile of
// which one element lies beyond kFactorLimit take e^2(q + k) anew for each pair.
#pragma once

#include "cuda/attention_parts.cuh"

namespace rnnkern::cuda {

constexpr int kColumns = 32;

// --- Scores: a block has 64 queries and 64 keys, a warp 4 of the queries, a lane 2 of the keys ---

constexpr int kScoreTile = 64, kScoreQueries = 4, kScoreKeys = 2, kScoreThreads = kScoreTile / kScoreQueries * 32;
constexpr int kScoreRow = kColumns + 4;  // 16 bytes more, so that rows lie in different banks

// A chunk of columns: exponentials, or the elements themselves where guarded.
struct ScoreChunk {
  float query[kScoreTile * kScoreRow], key[kScoreTile * kScoreRow];
  float vector[kColumns];
};
struct ScoreShared {
  ScoreChunk chunk[2];
  float half_sum[2];  // of the chunk's part of the vector
  int large[2];       // 1 + the chunk in this place, if an element of it is beyond kFactorLimit
};

template <class S>
struct AdditiveScores {
  Tensor3<S> query, key;
  const S* vector;  // [D]
  Padding padding;
  int64_t Tq, Tk, D, row;
  float* scores;  // [B, Tq, row]
};

// Four elements of a row; returns whether one is large.
template <bool kGuarded, class S>
RNNKERN_DEVICE bool put_factors(float* to, const S* from, int64_t there, bool aligned) {
  float x[4];
  load_floats(x, from, there, aligned);
  bool large = false;
  RNNKERN_UNROLLED
  for (int i = 0; i < 4; ++i) {
    large = large || is_large(x[i]);
    if (!kGuarded) x[i] = exp_twice(x[i]);
  }
  store(reinterpret_cast<Vec<float, 4>*>(to), Vec<float, 4>{{x[0], x[1], x[2], x[3]}});
  return large;
}

template <bool kGuarded, class S>
RNNKERN_DEVICE void load_chunk(const AdditiveScores<S>& a, const S* query, const S* key, const Keys& keys,
                               int64_t first_query, int64_t first_key, int64_t chunk, ScoreShared& shared) {
  const int place = int(chunk % 2);
  ScoreChunk& to = shared.chunk[place];
  const int64_t column = chunk * kColumns;
  bool large = false;
  for (int i = thread_index(); i < 2 * kScoreTile * (kColumns / 4); i += block_threads()) {
    const int r = i / (kColumns / 4) % kScoreTile, c = i % (kColumns / 4) * 4;
    const int64_t left = a.D - column - c;
    if (i < kScoreTile * (kColumns / 4)) {
      const bool valid = first_query + r < a.Tq;
      large |= put_factors<kGuarded>(to.query + r * kScoreRow + c, query + r * a.query.row + column + c,
                                     valid ? left : 0, a.query.aligned);
    } else {
      const bool valid = keys.valid(first_key + r);
      large |= put_factors<kGuarded>(to.key + r * kScoreRow + c, key + r * a.key.row + column + c, valid ? left : 0,
                                     a.key.aligned);
    }
  }
  if (warp_index() == 0) {
    const int64_t c = column + lane_index();
    const float v = c < a.D ? to_float(load(a.vector + c)) : 0.0f, sum = over_warp(v, Sum());
    store(to.vector + lane_index(), v);
    if (lane_index() == 0) store(shared.half_sum + place, 0.5f * sum);
  }
  if (large) store(shared.large + place, int(chunk) + 1);
}

// Subtracts vector_a tanh_a / 2 of a chunk: vector_a / 2 at once, before vector_a r_a is added term by term. Left to
// the end, or out, since it is the same for all keys, the sum would grow larger than the score and be rounded
// accordingly.
template <bool kGuarded>
RNNKERN_DEVICE void subtract_chunk(const ScoreChunk& chunk, float half_sum, float (&sum)[kScoreQueries][kScoreKeys]) {
  using Four = Vec<float, 4>;
  const auto four = [](const float* from) { return load(reinterpret_cast<const Four*>(from)); };
  const auto denominator = [](float q, float k) {
    return kGuarded ? guarded_denominator(q, k) : factored_denominator(q, k);
  };
  const float* const query = chunk.query + warp_index() * kScoreQueries * kScoreRow;
  const float* const key = chunk.key + lane_index() * kScoreRow;
  RNNKERN_UNROLLED
  for (int i = 0; i < kScoreQueries; ++i) {
    RNNKERN_UNROLLED
    for (int j = 0; j < kScoreKeys; ++j) sum[i][j] -= half_sum;
  }
  RNNKERN_UNROLL(1)
  for (int c = 0; c < kColumns; c += 4) {
    const Four v = four(chunk.vector + c);
    Four k[kScoreKeys];
    RNNKERN_UNROLLED
    for (int j = 0; j < kScoreKeys; ++j) k[j] = four(key + 32 * j * kScoreRow + c);
    RNNKERN_UNROLLED
    for (int i = 0; i < kScoreQueries; ++i) {
      const Four q = four(query + i * kScoreRow + c);
      RNNKERN_UNROLLED
      for (int j = 0; j < kScoreKeys; ++j) {
        RNNKERN_UNROLLED
        for (int e = 0; e < 4; e += 2) {
          const float d0 = denominator(q.at[e], k[j].at[e]), d1 = denominator(q.at[e + 1], k[j].at[e + 1]);
          const float numerator = multiply_add(v.at[e], d1, v.at[e + 1] * d0);
          sum[i][j] = multiply_add(numerator, reciprocal_approx(d0 * d1), sum[i][j]);
        }
      }
    }
  }
}

template <class S>
RNNKERN_KERNEL(kScoreThreads, 2)
additive_scores(RNNKERN_ARGUMENT AdditiveScores<S> a) {
  ScoreShared& shared = *reinterpret_cast<ScoreShared*>(shared_memory());
  const int64_t across = parts_of(a.Tk, kScoreTile), down = parts_of(a.Tq, kScoreTile);
  const int64_t first_key = block_index() % across * kScoreTile, b = block_index() / across / down;
  const int64_t first_query = block_index() / across % down * kScoreTile, chunks = parts_of(a.D, kColumns);
  const Keys keys(a.padding, b);
  if (first_key >= keys.length) return;
  const S* const query = a.query.data + b * a.query.batch + first_query * a.query.row;
  const S* const key = a.key.data + b * a.key.batch + first_key * a.key.row;
  const int64_t own_query = first_query + warp_index() * kScoreQueries;

  if (thread_index() < 2) store(shared.large + thread_index(), 0);
  sync_block();
  load_chunk<false>(a, query, key, keys, first_query, first_key, 0, shared);
  float sum[kScoreQueries][kScoreKeys] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    sync_block();  // this chunk is there, and the one before is no longer read
    const ScoreChunk& current = shared.chunk[chunk % 2];
    const bool guarded = load(shared.large + chunk % 2) == int(chunk) + 1;
    if (guarded) {
      load_chunk<true>(a, query, key, keys, first_query, first_key, chunk, shared);
      sync_block();
    }
    if (chunk + 1 < chunks) load_chunk<false>(a, query, key, keys, first_query, first_key, chunk + 1, shared);
    if (own_query >= a.Tq) continue;
    const float half_sum = load(shared.half_sum + chunk % 2);
    if (guarded)
      subtract_chunk<true>(current, half_sum, sum);
    else
      subtract_chunk<false>(current, half_sum, sum);
  }
  RNNKERN_UNROLLED
  for (int i = 0; i < kScoreQueries; ++i) {
    RNNKERN_UNROLLED
    for (int j = 0; j < kScoreKeys; ++j) {
      const int64_t k = first_key + lane_index() + 32 * j;
      if (own_query + i < a.Tq && k < a.Tk) store(a.scores + (b * a.Tq + own_query + i) * a.row + k, -2.0f * sum[i][j]);
    }
  }
}

// --- Gradients: a block has 64 keys, 16 per warp in registers, and all queries in turn; lanes are 32 columns ---

constexpr int kGradientTile = 64, kGradientKeys = 16, kGradientQueries = 32;
constexpr int kGradientThreads = kGradientTile / kGradientKeys * 32, kGradientWarps = kGradientThreads / 32;

template <class S>
struct AdditiveGradients {
  Tensor3<S> query, key;
  const S* vector;  // [D]
  Padding padding;
  int64_t Tq, Tk, D, row, tiles;  // tiles of keys
  const float* dscores;           // [B, Tq, row]
  float* dquery_parts;            // [B, tiles, Tq, D]: dquery / (4 vector), by tile of keys; of valid tiles alone
  float* dvector_parts;           // [B * tiles, D]: dvector / 2, by tile of keys
  S* dkey;                        // [B, Tk, D]
};

struct GradientShared {
  float query[kGradientQueries][kColumns], factor[kGradientQueries][kColumns];  // elements, exponentials
  float dscores[kGradientQueries][kGradientTile];
  float dquery[kGradientWarps][kGradientQueries][kColumns];
  int large[kGradientQueries];
};

// Of one query and a warp's keys: adds to dkey and dvector, returns dquery; all without their factors.
template <bool kGuarded>
RNNKERN_DEVICE float add_gradients(float q, const float (&key)[kGradientKeys], const float* dscores,
                                   float (&dkey)[kGradientKeys], float& dvector) {
  float dquery = 0.0f;
  RNNKERN_UNROLLED
  for (int j = 0; j < kGradientKeys; j += 4) {
    const Vec<float, 4> ds = load(reinterpret_cast<const Vec<float, 4>*>(dscores + j));
    RNNKERN_UNROLLED
    for (int e = 0; e < 4; e += 2) {
      const float k0 = key[j + e], k1 = key[j + e + 1];
      const float d0 = kGuarded ? guarded_denominator(q, k0) : factored_denominator(q, k0);
      const float d1 = kGuarded ? guarded_denominator(q, k1) : factored_denominator(q, k1);
      const float inverse = reciprocal_approx(d0 * d1);
      const float half[2] = {multiply_add(-d1, inverse, 0.5f), multiply_add(-d0, inverse, 0.5f)};
      RNNKERN_UNROLLED
      for (int one = 0; one < 2; ++one) {
        const float slope = multiply_add(-half[one], half[one], 0.25f), d = ds.at[e + one];
        dquery = multiply_add(d, slope, dquery);
        dkey[j + e + one] = multiply_add(d, slope, dkey[j + e + one]);
        dvector = multiply_add(d, half[one], dvector);
      }
    }
  }
  return dquery;
}

template <class S>
RNNKERN_KERNEL(kGradientThreads, 4)
additive_gradients(RNNKERN_ARGUMENT AdditiveGradients<S> a) {
  GradientShared& shared = *reinterpret_cast<GradientShared*>(shared_memory());
  const int64_t chunks = parts_of(a.D, kColumns), tile = block_index() / chunks % a.tiles;
  const int64_t b = block_index() / chunks / a.tiles, first_key = tile * kGradientTile;
  const int64_t column = block_index() % chunks * kColumns + lane_index();
  const int lane = lane_index(), warp = warp_index();
  const bool there = column < a.D;
  const Keys keys(a.padding, b);
  const S* const query = a.query.data + b * a.query.batch + column;
  const S* const key = a.key.data + b * a.key.batch + column;
  const int64_t own_key = first_key + warp * kGradientKeys;

  float k[kGradientKeys], factor[kGradientKeys], dkey[kGradientKeys] = {}, dvector = 0.0f;
  bool large_key = false;
  RNNKERN_UNROLLED
  for (int j = 0; j < kGradientKeys; ++j) {
    k[j] = there && keys.valid(own_key + j) ? to_float(load(key + (own_key + j) * a.key.row)) : 0.0f;
    large_key = large_key || is_large(k[j]);
    factor[j] = exp_twice(k[j]);
  }
  large_key = any_lane(large_key);
  const int64_t queries = first_key < keys.length ? a.Tq : 0;
  for (int64_t first = 0; first < queries; first += kGradientQueries) {
    const int count = int(smaller(a.Tq - first, kGradientQueries));
    for (int i = warp; i < count; i += kGradientWarps) {
      const float q = there ? to_float(load(query + (first + i) * a.query.row)) : 0.0f;
      const bool large = any_lane(is_large(q));
      store(&shared.query[i][lane], q);
      store(&shared.factor[i][lane], exp_twice(q));
      if (lane == 0) store(&shared.large[i], int(large));
    }
    for (int at = thread_index(); at < count * kGradientTile; at += kGradientThreads) {
      const int i = at / kGradientTile, j = at % kGradientTile;
      store(&shared.dscores[i][j],
            first_key + j < a.Tk ? load(a.dscores + (b * a.Tq + first + i) * a.row + first_key + j) : 0.0f);
    }
    sync_block();
    for (int i = 0; i < count; ++i) {
      const float* const dscores = &shared.dscores[i][warp * kGradientKeys];
      const float dquery = large_key || load(&shared.large[i])
                               ? add_gradients<true>(load(&shared.query[i][lane]), k, dscores, dkey, dvector)
                               : add_gradients<false>(load(&shared.factor[i][lane]), factor, dscores, dkey, dvector);
      store(&shared.dquery[warp][i][lane], dquery);
    }
    sync_block();
    for (int i = warp; there && i < count; i += kGradientWarps) {
      float sum = 0.0f;
      for (int w = 0; w < kGradientWarps; ++w) sum += load(&shared.dquery[w][i][lane]);
      store(a.dquery_parts + ((b * a.tiles + tile) * a.Tq + first + i) * a.D + column, sum);
    }
  }

  sync_block();
  store(&shared.dquery[warp][0][lane], dvector);
  sync_block();
  if (!there) return;
  if (warp == 0) {
    float sum = 0.0f;
    for (int w = 0; w < kGradientWarps; ++w) sum += load(&shared.dquery[w][0][lane]);
    store(a.dvector_parts + (b * a.tiles + tile) * a.D + column, sum);
  }
  const float four_vector = 4.0f * to_float(load(a.vector + column));
  RNNKERN_UNROLLED
  for (int j = 0; j < kGradientKeys; ++j) {
    if (own_key + j < a.Tk)
      store(a.dkey + (b * a.Tk + own_key + j) * a.D + column,
            from_float<S>(keys.valid(own_key + j) ? four_vector * dkey[j] : 0.0f));
  }
}

// --- Sums of the parts, in their order ---

constexpr int kSumThreads = 256;

template <class S>
struct DquerySum {
  const S* vector;
  Padding padding;
  int64_t B, Tq, D, tiles;
  const float* parts;  // [B, tiles, Tq, D]
  S* dquery;           // [B, Tq, D]
};
template <class S>
RNNKERN_KERNEL(kSumThreads, 4)
sum_dquery(RNNKERN_ARGUMENT DquerySum<S> a) {
  const int64_t at = int64_t(block_index()) * kSumThreads + thread_index(), rows = a.Tq * a.D;
  if (at >= a.B * rows) return;
  const int64_t b = at / rows, tiles = parts_of(Keys(a.padding, b).length, kGradientTile);
  const float* part = a.parts + b * a.tiles * rows + at % rows;
  float sum = 0.0f;
  for (int64_t tile = 0; tile < tiles; ++tile) sum += load(part + tile * rows);
  store(a.dquery + at, from_float<S>(tiles > 0 ? 4.0f * to_float(load(a.vector + at % a.D)) * sum : 0.0f));
}

template <class S>
struct DvectorSum {
  int64_t count, D;
  const float* parts;  // [count, D]
  S* dvector;          // [D]
};
// A block sums 32 columns, each warp every eighth part.
template <class S>
RNNKERN_KERNEL(kSumThreads, 4)
sum_dvector(RNNKERN_ARGUMENT DvectorSum<S> a) {
  float* const sums = reinterpret_cast<float*>(shared_memory());  // [warp][lane]
  const int64_t column = int64_t(block_index()) * 32 + lane_index();
  float sum = 0.0f;
  for (int64_t i = warp_index(); column < a.D && i < a.count; i += kSumThreads / 32)
    sum += load(a.parts + i * a.D + column);
  store(sums + thread_index(), sum);
  sync_block();
  if (warp_index() > 0 || column >= a.D) return;
  for (int warp = 1; warp < kSumThreads / 32; ++warp) sum += load(sums + warp * 32 + lane_index());
  store(a.dvector + column, from_float<S>(2.0f * sum));
}

}  // namespace rnnkern::cuda
