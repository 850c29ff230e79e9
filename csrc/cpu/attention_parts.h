// What the attention kernels are made of: packed rows, inner products, additive scores and their gradient, softmax.
//
// Everything lies in panels [block][row][16]: blocks of 16 columns, zero beyond the last. Lanes run over columns; a sum
// over columns is kept in 16 partial sums on every instruction set and folded in one fixed order, so that results do
// not depend on the width of a vector, on tiles or on threads.
//
// Additive: tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k). The exponentials are computed once per element of query
// and key; per pair there is left a multiply-add, half a division (two denominators share one) and a multiply-add.
// Guard: beyond |x| = kFactorLimit two denominators could overflow together, and a row with such an element takes
// e^2(q+k) anew for each pair, the sum clamped to 2 kFactorLimit, where tanh rounds to 1.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/math.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
constexpr int kParts = kBlock / Vec<T>::kLanes;  // vectors in a block
constexpr int kGroup = 4;                        // keys that share registers
template <class T>
constexpr T kFactorLimit = sizeof(T) == 4 ? 10 : 80;

RNNKERN_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RNNKERN_FN int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <int kDistance, class T>
RNNKERN_FN Vec<T> swap_lanes(Vec<T> x) {
  return Vec<T>(__builtin_shuffle(x.v, Vec<T>::lane_index() ^ typename Vec<T>::Int(kDistance)));
}
template <int kDistance, class T>
RNNKERN_FN T fold_lanes(Vec<T> x) {
  if constexpr (kDistance == 0) {
    return x.v[0];
  } else {
    return fold_lanes<kDistance / 2>(x + swap_lanes<kDistance>(x));
  }
}
// The sum of a block's 16 lanes: halves, quarters, ...
template <class T>
RNNKERN_FN T fold(const Vec<T> (&parts)[kParts<T>]) {
  Vec<T> x[kParts<T>];
  for (int p = 0; p < kParts<T>; ++p) x[p] = parts[p];
  RNNKERN_UNROLL
  for (int half = kParts<T> / 2; half > 0; half /= 2) {
    RNNKERN_UNROLL
    for (int p = 0; p < half; ++p) x[p] = x[p] + x[p + half];
  }
  return fold_lanes<Vec<T>::kLanes / 2>(x[0]);
}

// e^2x for |x| <= kFactorLimit, within about 1 ulp: the correction carries the low part of log2(e) in float, too.
template <class T>
RNNKERN_FN Vec<T> exp_twice(Vec<T> x) {
  const Vec<T> bounded = clamp(x, -kFactorLimit<T>, kFactorLimit<T>);
  const ExpParts<T> e = exp_parts(bounded, T(2));
  const Vec<T> y = fma(e.q, e.scale, e.scale);
  if constexpr (sizeof(T) == 8) return y;
  return fma(y, bounded * Vec<T>(T(2 * 0.6931471805599453 * 1.92596299e-8)), y);
}

// Rows of a tensor, packed. `raw` holds the elements of an additive operand whose panel holds their exponentials; it is
// filled only when the guard asks for it.
template <class S>
struct Operand {
  using T = Compute<S>;
  int64_t columns, blocks, capacity;  // capacity: rows between two blocks, a multiple of kGroup
  T* panel;                           // [blocks][capacity][16]
  T* raw;                             // the same
  uint8_t* large;                     // [capacity]: the row has an element beyond kFactorLimit
  const S* base = nullptr;            // row i is base + index[first + i] * stride
  int64_t stride = 0;
  const int64_t* index = nullptr;  // null: the identity
  int64_t first = -1, rows = 0;
  bool any_large = false, has_raw = false;

  const S* row(int64_t i) const { return base + (index ? index[first + i] : first + i) * stride; }
  int64_t block_stride() const { return capacity * kBlock; }
};

template <bool kExponentials, class S>
void pack(const Operand<S>& from, Compute<S>* panel) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t padded = round_up(from.rows, kGroup);
  for (int64_t i = 0; i < padded; ++i) {
    V peak(T(0));
    for (int64_t block = 0; block < from.blocks; ++block) {
      for (int p = 0; p < kParts<T>; ++p) {
        const int64_t column = block * kBlock + p * V::kLanes;
        const int64_t left = i < from.rows ? from.columns - column : 0;
        V x(T(0));
        if (left > 0) x = load_lanes(from.row(i) + column, int(min_of(left, int64_t(V::kLanes))));
        if constexpr (kExponentials) {
          peak = maximum(peak, maximum(x, V(T(0)) - x));
          x = exp_twice(x);
        }
        x.store(panel + block * from.block_stride() + i * kBlock + p * V::kLanes);
      }
    }
    if constexpr (kExponentials) from.large[i] = max_lanes(peak) > kFactorLimit<T>;
  }
}

// Packs the rows [first, first + rows) unless they are already there. `start` begins a new tensor or batch row.
template <class S>
void start(Operand<S>& operand, const S* base, int64_t stride, const int64_t* index) {
  operand.base = base;
  operand.stride = stride;
  operand.index = index;
  operand.first = -1;
}
template <bool kExponentials, class S>
void load(Operand<S>& operand, int64_t first, int64_t rows) {
  if (operand.first == first) return;
  operand.first = first;
  operand.rows = rows;
  pack<kExponentials>(operand, operand.panel);
  operand.has_raw = operand.any_large = false;
  if constexpr (kExponentials) {
    for (int64_t i = 0; i < rows; ++i) operand.any_large |= operand.large[i] != 0;
  }
}
template <class S>
void load_raw(Operand<S>& operand) {
  if (!operand.has_raw) pack<false>(operand, operand.raw);
  operand.has_raw = true;
}

// out[i][j] = scale * (row i of a) . (row j of b)
template <class T, int kRows>
void product_tile(const T* a, int64_t a_block, const T* b, int64_t b_block, int64_t blocks, T scale, T* out,
                  int64_t out_row) {
  using V = Vec<T>;
  V sum[kRows][kGroup][kParts<T>];
  RNNKERN_UNROLL
  for (int p = 0; p < kParts<T>; ++p) {
    V acc[kRows][kGroup];
    RNNKERN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) acc[i][j] = V(T(0));
    }
    for (int64_t block = 0; block < blocks; ++block) {
      V y[kGroup];
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) y[j] = V::load(b + block * b_block + j * kBlock + p * V::kLanes);
      RNNKERN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const V x = V::load(a + block * a_block + i * kBlock + p * V::kLanes);
        RNNKERN_UNROLL
        for (int j = 0; j < kGroup; ++j) acc[i][j] = fma(x, y[j], acc[i][j]);
      }
    }
    RNNKERN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) sum[i][j][p] = acc[i][j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kGroup; ++j) out[i * out_row + j] = scale * fold(sum[i][j]);
  }
}
template <class S>
void products(const Operand<S>& a, const Operand<S>& b, Compute<S> scale, Compute<S>* out, int64_t out_row) {
  using T = Compute<S>;
  constexpr int kRows = kRegisters >= 32 ? 4 : 2;
  for (int64_t j = 0; j < b.rows; j += kGroup) {
    int64_t i = 0;
    for (; i + kRows <= a.rows; i += kRows) {
      product_tile<T, kRows>(a.panel + i * kBlock, a.block_stride(), b.panel + j * kBlock, b.block_stride(), a.blocks,
                             scale, out + i * out_row + j, out_row);
    }
    for (; i < a.rows; ++i) {
      product_tile<T, 1>(a.panel + i * kBlock, a.block_stride(), b.panel + j * kBlock, b.block_stride(), a.blocks,
                         scale, out + i * out_row + j, out_row);
    }
  }
}

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

// The elements themselves, where the guard will ask for them.
template <class S>
void load_guarded(Operand<S>& queries, Operand<S>& keys) {
  if (!queries.any_large && !keys.any_large) return;
  load_raw(queries);
  load_raw(keys);
}
// Whether query i or one of the keys [j, j + kGroup) has an element beyond kFactorLimit.
template <class S>
RNNKERN_FN bool guarded(const Operand<S>& queries, int64_t i, const Operand<S>& keys, int64_t j) {
  return queries.large[i] | keys.large[j] | keys.large[j + 1] | keys.large[j + 2] | keys.large[j + 3];
}

// out[j] = -2 sum_a vector_a r_a for one query and kGroup keys. That is the score less sum_a vector_a, which is the
// same for every key and cancels in the softmax.
template <bool kFactored, class T>
void additive_scores(const T* q, int64_t q_block, const T* k, int64_t k_block, const T* vector, int64_t blocks,
                     T* out) {
  using V = Vec<T>;
  V sum[kGroup][kParts<T>];
  RNNKERN_UNROLL
  for (int p = 0; p < kParts<T>; ++p) {
    V acc[kGroup];
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; ++j) acc[j] = V(T(0));
    const T *q_lanes = q + p * V::kLanes, *k_lanes = k + p * V::kLanes, *v_lanes = vector + p * V::kLanes;
    int64_t block = 0;
    for (; block + 2 <= blocks; block += 2) {
      const V q0 = V::load(q_lanes + block * q_block), q1 = V::load(q_lanes + (block + 1) * q_block);
      const V v0 = V::load(v_lanes + block * kBlock), v1 = V::load(v_lanes + (block + 1) * kBlock);
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        V d0 = denominator<kFactored>(q0, V::load(k_lanes + block * k_block + j * kBlock));
        V d1 = denominator<kFactored>(q1, V::load(k_lanes + (block + 1) * k_block + j * kBlock));
        invert_both(d0, d1);
        acc[j] = fma(v1, d1, fma(v0, d0, acc[j]));
      }
    }
    if (block < blocks) {
      const V q0 = V::load(q_lanes + block * q_block), v0 = V::load(v_lanes + block * kBlock);
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        const V d0 = denominator<kFactored>(q0, V::load(k_lanes + block * k_block + j * kBlock));
        acc[j] = fma(v0, V(T(1)) / d0, acc[j]);
      }
    }
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; ++j) sum[j][p] = acc[j];
  }
  for (int j = 0; j < kGroup; ++j) out[j] = T(-2) * fold(sum[j]);
}
template <class S>
void additive_scores(Operand<S>& queries, Operand<S>& keys, const Compute<S>* vector, Compute<S>* out,
                     int64_t out_row) {
  load_guarded(queries, keys);
  for (int64_t j = 0; j < keys.rows; j += kGroup) {
    for (int64_t i = 0; i < queries.rows; ++i) {
      const int64_t q = i * kBlock, k = j * kBlock;
      if (guarded(queries, i, keys, j)) {
        additive_scores<false>(queries.raw + q, queries.block_stride(), keys.raw + k, keys.block_stride(), vector,
                               queries.blocks, out + i * out_row + j);
      } else {
        additive_scores<true>(queries.panel + q, queries.block_stride(), keys.panel + k, keys.block_stride(), vector,
                              queries.blocks, out + i * out_row + j);
      }
    }
  }
}

// Of one block's part, one group of keys and all queries, with u = 1 - tanh^2 and ds = dL/dscore:
//   dquery[i] += sum_j ds[i][j] u     dkey[j] += sum_i ds[i][j] u     dvector += sum_ij ds[i][j] tanh
// The factor vector_a of the first two, the same for all pairs, is left to the end.
template <class S>
void additive_gradient(const Operand<S>& queries, const Operand<S>& keys, int64_t group, int64_t offset_in_block,
                       int64_t block, const Compute<S>* ds, int64_t ds_row, Compute<S>* dquery, Compute<S>* dkey,
                       Compute<S>* dvector) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t q_offset = block * queries.block_stride() + offset_in_block;
  const int64_t k_offset = block * keys.block_stride() + group * kBlock + offset_in_block;
  const V one(T(1)), minus_two(T(-2)), four(T(4));
  V k[kGroup], dk[kGroup], dv(T(0));
  RNNKERN_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    k[j] = V::load(keys.panel + k_offset + j * kBlock);
    dk[j] = V(T(0));
  }
  for (int64_t i = 0; i < queries.rows; ++i) {
    V r[kGroup];
    if (guarded(queries, i, keys, group)) {
      const V q = V::load(queries.raw + q_offset + i * kBlock);
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) r[j] = denominator<false>(q, V::load(keys.raw + k_offset + j * kBlock));
    } else {
      const V q = V::load(queries.panel + q_offset + i * kBlock);
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) r[j] = denominator<true>(q, k[j]);
    }
    V dq = V::load(dquery + q_offset + i * kBlock);
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; j += 2) invert_both(r[j], r[j + 1]);
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const V g(ds[i * ds_row + group + j]);
      const V u = fma(V(T(0)) - r[j], r[j], r[j]) * four;
      dq = fma(g, u, dq);
      dk[j] = fma(g, u, dk[j]);
      dv = fma(g, fma(minus_two, r[j], one), dv);
    }
    dq.store(dquery + q_offset + i * kBlock);
  }
  RNNKERN_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    T* to = dkey + k_offset + j * kBlock;
    (V::load(to) + dk[j]).store(to);
  }
  T* to = dvector + block * kBlock + offset_in_block;
  (V::load(to) + dv).store(to);
}

template <class S>
void additive_gradient(Operand<S>& queries, Operand<S>& keys, const Compute<S>* ds, int64_t ds_row, Compute<S>* dquery,
                       Compute<S>* dkey, Compute<S>* dvector) {
  load_guarded(queries, keys);
  for (int64_t group = 0; group < keys.rows; group += kGroup) {
    for (int64_t block = 0; block < keys.blocks; ++block) {
      for (int offset = 0; offset < kBlock; offset += Vec<Compute<S>>::kLanes) {
        additive_gradient(queries, keys, group, offset, block, ds, ds_row, dquery, dkey, dvector);
      }
    }
  }
}

// In place over the first n of a row that is padded to a multiple of 16; the padding becomes zero.
template <class T>
void softmax(T* s, int64_t n) {
  using V = Vec<T>;
  const int64_t padded = round_up(n, kBlock);
  for (int64_t j = n; j < padded; ++j) s[j] = s[0];
  V best = V::load(s);
  for (int64_t j = V::kLanes; j < padded; j += V::kLanes) best = maximum(best, V::load(s + j));
  const V peak(max_lanes(best));
  V sum[kParts<T>];
  for (int p = 0; p < kParts<T>; ++p) sum[p] = V(T(0));
  for (int64_t j = 0; j < padded; j += kBlock) {
    for (int p = 0; p < kParts<T>; ++p) {
      const int64_t at = j + p * V::kLanes;
      const int64_t left = max_of(int64_t(0), min_of(n - at, int64_t(V::kLanes)));
      const V e = exp(V::load(s + at) - peak).first(int(left));
      e.store(s + at);
      sum[p] = sum[p] + e;
    }
  }
  const V total(fold(sum));
  for (int64_t j = 0; j < padded; j += V::kLanes) (V::load(s + j) / total).store(s + j);
}

// ds = p * (dp - sum p dp) * scale, in place of dp; the padding becomes zero. p as softmax leaves it.
template <class T>
void softmax_gradient(const T* p, T* dp, int64_t n, T scale) {
  using V = Vec<T>;
  const int64_t padded = round_up(n, kBlock);
  for (int64_t j = n; j < padded; ++j) dp[j] = T(0);
  V sum[kParts<T>];
  for (int part = 0; part < kParts<T>; ++part) sum[part] = V(T(0));
  for (int64_t j = 0; j < padded; j += kBlock) {
    for (int part = 0; part < kParts<T>; ++part) {
      const int64_t at = j + part * V::kLanes;
      sum[part] = fma(V::load(p + at), V::load(dp + at), sum[part]);
    }
  }
  const V delta(fold(sum)), factor(scale);
  for (int64_t j = 0; j < padded; j += V::kLanes) {
    (V::load(p + j) * (V::load(dp + j) - delta) * factor).store(dp + j);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
