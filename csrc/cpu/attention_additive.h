// Additive scores and their gradient.
//
// tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k). The exponentials are computed once per element of query
// and key; per pair there is left a multiply-add, half a division (two denominators share one) and a multiply-add.
// Guard: beyond |x| = kFactorLimit two denominators could overflow together, and a row with such an element takes
// e^2(q+k) anew for each pair, the sum clamped to 2 kFactorLimit, where tanh rounds to 1.
#pragma once

#include "cpu/attention_parts.h"

namespace rnnkern::RNNKERN_ISA {

// 1 + e^2(q+k), from the exponentials or from the elements themselves.
template <bool kFactored, class T>
RNNKERN_FN Vec<T> denominator(Vec<T> q, Vec<T> k) {
  const Vec<T> one(T(1));
  if constexpr (kFactored) {
    return fma(q, k, one);
  } else {
    const ExpParts<T> e = exp_parts(clamp(q + k, -2 * kFactorLimit<T>, 2 * kFactorLimit<T>), T(2));
    return fma(e.q, e.scale, e.scale) + one;
  }
}
// x becomes 1 / x and y becomes 1 / y, by one division.
template <class T>
RNNKERN_FN void invert_both(Vec<T>& x, Vec<T>& y) {
  const Vec<T> inverse = Vec<T>(T(1)) / (x * y), kept = x;
  x = y * inverse;
  y = kept * inverse;
}

// What stands where the keys are: packed exponentials; or the elements, whose exponentials are taken on the way, or
// whose sums with the query's elements are. The query has elements, too, in the last case, else packed exponentials.
enum class Keys { packed, direct, raw };

// Adds 4 vector_a r_a over one part of kBlocks blocks to the sums of kGroup keys; the last block has `lanes` lanes.
// Direct: and shows the keys' elements to `peak`.
template <Keys kKeys, int kBlocks, class Q, class E, class T>
RNNKERN_FN void add_additive(const Q* q, int64_t q_block, const Group<E>& keys, const T* vector, int64_t block,
                             int part, int lanes, Vec<T> (&sum)[kGroup], Peak<T>& peak) {
  using V = Vec<T>;
  int there[kBlocks];
  V query[kBlocks], v[kBlocks];
  RNNKERN_UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    there[i] = i + 1 < kBlocks ? V::kLanes : lanes;
    query[i] = load_lanes(q + (block + i) * q_block + part * V::kLanes, there[i]);
    v[i] = V::load(vector + (block + i) * kBlock + part * V::kLanes);
  }
  RNNKERN_UNROLL
  for (int j = 0; j < kGroup; j += 2) {
    V x[2 * kBlocks];  // [block][key]
    RNNKERN_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) x[i] = keys.load(j + i % 2, block + i / 2, part, there[i / 2]);
    if constexpr (kKeys == Keys::direct) {
      RNNKERN_UNROLL
      for (int i = 0; i < 2 * kBlocks; ++i) {
        keys.prefetch_next(j + i % 2, block + i / 2, part);
        peak.see(x[i]);
      }
      exp_twice(x);
    }
    RNNKERN_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) x[i] = denominator<kKeys != Keys::raw>(query[i / 2], x[i]);
    RNNKERN_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (kBlocks == 2) {
        invert_both(x[i], x[i + 2]);
      } else {
        x[i] = V(T(1)) / x[i];
      }
    }
    RNNKERN_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) sum[j + i % 2] = fma(v[i / 2], x[i], sum[j + i % 2]);
  }
}
// out[j] = -2 sum_a vector_a r_a for one query and kGroup keys. That is the score less sum_a vector_a, which is the
// same for every key and cancels in the softmax. Direct: returns whether the keys have an element beyond kFactorLimit;
// if so, the scores are meaningless.
template <Keys kKeys, class Q, class E, class T>
bool additive_scores(const Q* q, int64_t q_block, const Group<E>& keys, const T* vector, T* out) {
  using V = Vec<T>;
  V sum[kGroup][kParts<T>];
  Peak<T> peak;
  const int64_t full = keys.full_blocks(), blocks = keys.blocks();
  RNNKERN_UNROLL
  for (int p = 0; p < kParts<T>; ++p) {
    V part[kGroup];
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; ++j) part[j] = V(T(0));
    int64_t block = 0;
    for (; block + 2 <= full; block += 2) {
      add_additive<kKeys, 2>(q, q_block, keys, vector, block, p, V::kLanes, part, peak);
    }
    if (block + 2 == blocks) {
      add_additive<kKeys, 2>(q, q_block, keys, vector, block, p, keys.lanes(block + 1, p), part, peak);
    } else if (block < blocks) {
      add_additive<kKeys, 1>(q, q_block, keys, vector, block, p, keys.lanes(block, p), part, peak);
    }
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; ++j) sum[j][p] = part[j];
  }
  T scores[kGroup];
  fold(sum, T(-0.5), scores);
  memcpy(out, scores, sizeof(scores));
  return kKeys == Keys::direct && peak.is_large();
}
// Whether one of the rows [j, j + kGroup) has an element beyond kFactorLimit.
RNNKERN_FN bool any_large(const uint8_t* large, int64_t j) {
  return large[j] | large[j + 1] | large[j + 2] | large[j + 3];
}
// The scores of one query and the keys [j, j + kGroup) of n, from their elements.
template <class S>
void guarded_scores(const Operand<S>& queries, int64_t i, const Operand<S>& keys, int64_t j, int64_t n,
                    const Compute<S>* vector, Compute<S>* out) {
  additive_scores<Keys::raw>(queries.row(i), kBlock, keys.group(j, n), vector, out);
}
// The same keys, packed, against all packed queries.
template <class S>
void packed_scores(const Operand<S>& queries, const Operand<S>& keys, int64_t j, int64_t n, const Compute<S>* vector,
                   Compute<S>* out, int64_t out_row) {
  const bool large = any_large(keys.large, j);
  const Group<Compute<S>> group = keys.packed_group(j);
  for (int64_t i = queries.first; i < queries.first + queries.rows; ++i, out += out_row) {
    if (large || queries.large[i]) {
      guarded_scores(queries, i, keys, j, n, vector, out);
    } else {
      additive_scores<Keys::packed>(queries.packed(i), queries.block_stride(), group, vector, out);
    }
  }
}
// The same where they lie, against the only packed query. Finds out which keys are large.
template <class S>
void direct_scores(const Operand<S>& queries, const Operand<S>& keys, int64_t j, int64_t n, const Compute<S>* vector,
                   Compute<S>* out) {
  const int64_t i = queries.first;
  const bool large =
      additive_scores<Keys::direct>(queries.packed(i), queries.block_stride(), keys.group(j, n), vector, out);
  memset(keys.large + j, large, kGroup);
  if (large || queries.large[i]) guarded_scores(queries, i, keys, j, n, vector, out);
}

// Of one part of a block, a group of keys (`there` of them) and all queries, with 1 - tanh^2 = 4 (r - r^2) and
// ds = dL/dscore:
//   dquery[i] += sum_j ds[i][j] (r - r^2)     dkey[j] = 4 vector sum_i ds[i][j] (r - r^2)
//   dvector += sum_ij ds[i][j] tanh
// dquery's factor 4 vector_a, the same for all keys, is left to the end. Keys are read where they lie.
template <class S, class E>
void additive_gradient(const Operand<S>& queries, bool large, Group<S> keys, int64_t block, int part,
                       const Compute<S>* ds, int64_t ds_row, const Compute<S>* vector, Compute<S>* dquery,
                       E* const (&dkey)[kGroup], int64_t there, Target<E> target, Compute<S>* dvector) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t column = block * kBlock + part * V::kLanes;
  const int64_t rows = queries.rows, q_offset = block * queries.block_stride() + part * V::kLanes;
  const uint8_t* large_query = queries.large + queries.first;
  const T* q_panel = queries.panel + q_offset;
  const int lanes = keys.lanes(block, part);
  const V one(T(1)), minus_two(T(-2));
  V k[kGroup], dk[kGroup], dv(T(0));
  RNNKERN_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    k[j] = keys.load(j, block, part, lanes);
    dk[j] = V(T(0));
  }
  exp_twice(k);
  for (int64_t i = 0; i < rows; ++i) {
    V r[kGroup];
    if (large || large_query[i]) {
      const V q = load_lanes(queries.row(queries.first + i) + column, lanes);
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) r[j] = denominator<false>(q, keys.load(j, block, part, lanes));
    } else {
      const V q = V::load(q_panel + i * kBlock);
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) r[j] = denominator<true>(q, k[j]);
    }
    T* dq_lanes = dquery + q_offset + i * kBlock;
    V dq = V::load(dq_lanes);
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; j += 2) invert_both(r[j], r[j + 1]);
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const V d(ds[i * ds_row + j]);
      const V u = d * fma(V(-r[j].v), r[j], r[j]);  // a product and two sums, since sums have units of their own
      dq = dq + u;
      dk[j] = dk[j] + u;
      dv = fma(d, fma(minus_two, r[j], one), dv);
    }
    dq.store(dq_lanes);
  }
  const V factor = V::load(vector + column);
  RNNKERN_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if (j < there) target.put(dkey[j], block, part, dk[j] * factor);
  }
  (V::load(dvector + column) + dv).store(dvector + column);
}
// Of the keys [begin, n): those of the keys before `end` go to the target, which begins with the first.
template <class S, class E>
void additive_gradient(const Operand<S>& queries, const Operand<S>& keys, int64_t begin, int64_t end, int64_t n,
                       const Compute<S>* ds, int64_t ds_row, const Compute<S>* vector, Compute<S>* dquery,
                       Target<E> dkey, Compute<S>* dvector) {
  for (int64_t j = begin; j < n; j += kGroup) {
    const Group<S> group = keys.group(j, n);
    const bool large = any_large(keys.large, j);
    E* rows[kGroup];
    for (int g = 0; g < kGroup; ++g) rows[g] = dkey.row(min_of(j + g, end - 1) - begin);
    for (int64_t block = 0; block < keys.blocks; ++block) {
      for (int p = 0; p < kParts<Compute<S>>; ++p) {
        additive_gradient(queries, large, group, block, p, ds + j, ds_row, vector, dquery, rows, end - j, dkey,
                          dvector);
      }
    }
  }
}

}  // namespace rnnkern::RNNKERN_ISA
