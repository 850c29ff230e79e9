// What the attention kernels are made of: packed rows, inner products, sums of rows, softmax.
//
// Queries lie in panels [block][row][16]: blocks of 16 columns, zero beyond the last. So do keys and values that many
// queries share; for few queries they are read where they lie. Lanes run over columns; a sum over columns is kept in 16
// partial sums on every instruction set and folded in one fixed order, and a sum over keys is one chain in their order,
// begun anew every kTile keys, so that results do not depend on the width of a vector, on packing, blocks or threads.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/math.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
constexpr int kParts = kBlock / Vec<T>::kLanes;  // vectors in a block
constexpr int kGroup = 4;                        // keys that share registers
constexpr int64_t kTile = 256;                   // keys packed at a time; sums over keys begin anew
template <class T>
constexpr T kFactorLimit = sizeof(T) == 4 ? 10 : 80;

RNNKERN_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RNNKERN_FN int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Lane l becomes the sum of the lanes l and l ^ kDistance of a, or of b where l has the bit kDistance.
template <int kDistance, class T>
RNNKERN_FN Vec<T> fold_pair(Vec<T> a, Vec<T> b) {
  using V = Vec<T>;
  const typename V::IntValue lane = V::lane_index(), from_b = (lane & typename V::Int(kDistance)) != 0;
  const typename V::IntValue other =
      (lane ^ typename V::Int(kDistance)) + (from_b & typename V::Int(V::kLanes));  // b's lanes follow a's
  return V(from_b ? b.v : a.v) + V(__builtin_shuffle(a.v, b.v, other));
}
template <int kDistance, int kCount, class T>
RNNKERN_FN Vec<T> fold_lanes(const Vec<T> (&x)[kCount]) {
  if constexpr (kDistance == 0) {
    return x[0];
  } else {
    constexpr int kHalf = kCount > 1 ? kCount / 2 : 1;
    Vec<T> folded[kHalf];
    RNNKERN_UNROLL
    for (int i = 0; i < kHalf; ++i) folded[i] = fold_pair<kDistance>(x[i], x[i + kCount / 2]);
    return fold_lanes<kDistance / 2>(folded);
  }
}
// out[i] = scale times the sum of the 16 lanes of block i: halves, quarters, ... Blocks share vectors on the way, so
// that no step adds lanes that nobody wants.
template <class T, int kCount>
RNNKERN_FN void fold(const Vec<T> (&blocks)[kCount][kParts<T>], T scale, T (&out)[kCount]) {
  using V = Vec<T>;
  constexpr int kTogether = kCount < V::kLanes ? kCount : V::kLanes;
  static_assert(kCount % kTogether == 0 && V::kLanes % kTogether == 0, "whole vectors of sums");
  RNNKERN_UNROLL
  for (int first = 0; first < kCount; first += kTogether) {
    V x[kTogether];
    RNNKERN_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      V parts[kParts<T>];
      for (int p = 0; p < kParts<T>; ++p) parts[p] = blocks[first + i][p];
      RNNKERN_UNROLL
      for (int half = kParts<T> / 2; half > 0; half /= 2) {
        RNNKERN_UNROLL
        for (int p = 0; p < half; ++p) parts[p] = parts[p] + parts[p + half];
      }
      x[i] = parts[0];
    }
    T lanes[V::kLanes];
    (V(scale) * fold_lanes<V::kLanes / 2>(x)).store(lanes);
    RNNKERN_UNROLL
    for (int i = 0; i < kTogether; ++i) out[first + i] = lanes[i * (V::kLanes / kTogether)];
  }
}
template <class T>
RNNKERN_FN T fold(const Vec<T> (&block)[kParts<T>]) {
  Vec<T> blocks[1][kParts<T>];
  for (int p = 0; p < kParts<T>; ++p) blocks[0][p] = block[p];
  T sum[1];
  fold(blocks, T(1), sum);
  return sum[0];
}

// x becomes e^2x, within about 1 ulp: the reduction carries the low part of log2(e), in float too. Meaningless beyond
// kFactorLimit. As exp_parts in math.h, but several at a time, step by step, so that none waits for another; and the
// exponent's bias comes with the magic number.
template <class T, int kCount>
RNNKERN_FN void exp_twice(Vec<T> (&x)[kCount]) {
  using C = Exp2Constants<T>;
  using V = Vec<T>;
  const V magic(C::kMagic + C::kBias), log2e(2 * C::kLog2e), log2e_low(2 * C::kLog2eLow);
  V shifted[kCount], r[kCount], p[kCount];
  RNNKERN_UNROLL
  for (int i = 0; i < kCount; ++i) {
    shifted[i] = fma(x[i], log2e, magic);
    p[i] = V(C::kCoefficients[0]);
  }
  RNNKERN_UNROLL
  for (int i = 0; i < kCount; ++i) r[i] = fma(x[i], log2e, magic - shifted[i]);
  RNNKERN_UNROLL
  for (int i = 0; i < kCount; ++i) r[i] = fma(x[i], log2e_low, r[i]);
  RNNKERN_UNROLL
  for (int c = 1; c < int(sizeof(C::kCoefficients) / sizeof(T)); ++c) {
    RNNKERN_UNROLL
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], V(C::kCoefficients[c]));
  }
  RNNKERN_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const V scale(
        reinterpret_cast<typename V::Value>(reinterpret_cast<typename V::IntValue>(shifted[i].v) << C::kMantissa));
    x[i] = fma(p[i] * r[i], scale, scale);
  }
}
// The largest magnitude seen, as bits: NaN counts as largest.
template <class T>
struct Peak {
  using V = Vec<T>;
  typename V::IntValue bits{};

  RNNKERN_FN void see(V x) {
    constexpr typename V::Int kMagnitude = sizeof(T) == 4 ? INT32_MAX : INT64_MAX;
    const typename V::IntValue magnitude = reinterpret_cast<typename V::IntValue>(x.v) & kMagnitude;
    bits = bits < magnitude ? magnitude : bits;
  }
  RNNKERN_FN bool is_large() const {
    const typename V::IntValue limit = reinterpret_cast<typename V::IntValue>(V(kFactorLimit<T>).v);
    const typename V::IntValue beyond = bits > limit;
    typename V::Int any = 0;
    for (int i = 0; i < V::kLanes; ++i) any |= beyond[i];
    return any != 0;
  }
};

// kGroup rows side by side, in a panel or where they lie. Columns beyond `columns` are zero.
template <class E>
struct Group {
  using V = Vec<Compute<E>>;
  const E* row[kGroup];
  int64_t block_stride;
  int64_t columns;
  int64_t next = 0;  // elements to the next group, if keys lie one after another

  int64_t full_blocks() const { return columns / kBlock; }
  int64_t blocks() const { return ceil_div(columns, kBlock); }
  // How many lanes of this part of a block there are.
  RNNKERN_FN int lanes(int64_t block, int part) const {
    return int(max_of(int64_t(0), min_of(columns - block * kBlock - part * V::kLanes, int64_t(V::kLanes))));
  }
  RNNKERN_FN V load(int j, int64_t block, int part, int lanes = V::kLanes) const {
    return load_lanes(row[j] + block * block_stride + part * V::kLanes, lanes);
  }
  // A hint: arithmetic between two loads outlasts what the core fetches ahead by itself.
  RNNKERN_FN void prefetch_next(int j, int64_t block, int part) const {
    __builtin_prefetch(row[j] + next + block * block_stride + part * V::kLanes);
  }
};

// Rows of a tensor, and a panel for some of them. The panel of an additive operand holds exponentials.
template <class S>
struct Operand {
  using T = Compute<S>;
  int64_t columns, blocks, capacity;  // capacity: rows between two blocks, a multiple of kGroup
  T* panel;                           // [blocks][capacity][16]
  uint8_t* large;                     // additive: by row, whether it or its group goes beyond kFactorLimit
  const S* base = nullptr;            // row i is base + index[i] * stride
  int64_t stride = 0;
  const int64_t* index = nullptr;  // null: the identity
  int64_t first = -1, rows = 0;    // what the panel holds

  const S* row(int64_t i) const { return base + (index ? index[i] : i) * stride; }
  int64_t block_stride() const { return capacity * kBlock; }
  const T* packed(int64_t i) const { return panel + (i - first) * kBlock; }
  // The rows [i, i + kGroup) of the panel, or of the tensor; there the last of `count` rows stands for those beyond.
  Group<T> packed_group(int64_t i) const {
    const T* p = packed(i);
    return {{p, p + kBlock, p + 2 * kBlock, p + 3 * kBlock}, block_stride(), blocks * kBlock};
  }
  Group<S> group(int64_t i, int64_t count) const {
    const int64_t last = count - 1;
    return {{row(i), row(min_of(i + 1, last)), row(min_of(i + 2, last)), row(min_of(i + 3, last))},
            kBlock,
            columns,
            kGroup * stride};
  }
};
static_assert(kGroup == 4, "groups are written out");

// Begins a new tensor or batch row.
template <class S>
void start(Operand<S>& operand, const S* base, int64_t stride, const int64_t* index) {
  operand.base = base;
  operand.stride = stride;
  operand.index = index;
  operand.first = -1;
}
// Blocks of columns.
struct Columns {
  int64_t begin, end;
  // How many of so many columns they have.
  int64_t of(int64_t columns) const { return max_of(int64_t(0), min_of(columns, end * kBlock) - begin * kBlock); }
};
// Some columns of an operand and of what its panel holds.
template <class S>
Operand<S> slice(Operand<S> operand, const Columns& columns) {
  operand.columns = columns.of(operand.columns);
  operand.blocks = columns.end - columns.begin;
  operand.panel += columns.begin * operand.block_stride();
  operand.base += columns.begin * kBlock;
  return operand;
}
// Packs the rows [first, first + rows) unless they are already there.
template <bool kExponentials, class S>
void load(Operand<S>& operand, int64_t first, int64_t rows) {
  using T = Compute<S>;
  using V = Vec<T>;
  if (operand.first == first) return;
  operand.first = first;
  operand.rows = rows;
  const int64_t padded = round_up(rows, kGroup);
  for (int64_t i = 0; i < padded; ++i) {
    Peak<T> peak;
    const S* row = i < rows ? operand.row(first + i) : nullptr;
    for (int64_t block = 0; block < operand.blocks; ++block) {
      for (int p = 0; p < kParts<T>; ++p) {
        const int64_t column = block * kBlock + p * V::kLanes;
        const int64_t left = row ? operand.columns - column : 0;
        V x[1] = {V(T(0))};
        if (left > 0) x[0] = load_lanes(row + column, int(min_of(left, int64_t(V::kLanes))));
        if constexpr (kExponentials) {
          peak.see(x[0]);
          exp_twice(x);
        }
        x[0].store(operand.panel + block * operand.block_stride() + i * kBlock + p * V::kLanes);
      }
    }
    if constexpr (kExponentials) operand.large[first + i] = peak.is_large();
  }
}

template <class T, int kRows, class E>
RNNKERN_FN void add_products(const T* a, const Group<E>& b, int64_t block, int part, int lanes,
                             Vec<T> (&sum)[kRows][kGroup]) {
  using V = Vec<T>;
  V y[kGroup];
  RNNKERN_UNROLL
  for (int j = 0; j < kGroup; ++j) y[j] = b.load(j, block, part, lanes);
  RNNKERN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const V x = V::load(a + i * kBlock + part * V::kLanes);
    RNNKERN_UNROLL
    for (int j = 0; j < kGroup; ++j) sum[i][j] = fma(x, y[j], sum[i][j]);
  }
}
// out[i][j] = scale * (row i of a panel) . (row j of b)
template <class T, int kRows, class E>
void product_tile(const T* a, int64_t a_block, const Group<E>& b, T scale, T* out, int64_t out_row) {
  using V = Vec<T>;
  V sum[kRows * kGroup][kParts<T>];
  const int64_t full = b.full_blocks(), blocks = b.blocks();
  RNNKERN_UNROLL
  for (int p = 0; p < kParts<T>; ++p) {
    V part[kRows][kGroup];
    RNNKERN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) part[i][j] = V(T(0));
    }
    for (int64_t block = 0; block < full; ++block) add_products(a + block * a_block, b, block, p, V::kLanes, part);
    if (full < blocks) add_products(a + full * a_block, b, full, p, b.lanes(full, p), part);
    RNNKERN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RNNKERN_UNROLL
      for (int j = 0; j < kGroup; ++j) sum[i * kGroup + j][p] = part[i][j];
    }
  }
  T products[kRows * kGroup];
  fold(sum, scale, products);
  for (int i = 0; i < kRows; ++i) memcpy(out + i * out_row, products + i * kGroup, kGroup * sizeof(T));
}
template <class S, class E>
void products(const Operand<S>& a, const Group<E>& b, Compute<S> scale, Compute<S>* out, int64_t out_row) {
  using T = Compute<S>;
  constexpr int kRows = kRegisters >= 32 ? 4 : 2;
  int64_t i = 0;
  for (; i + kRows <= a.rows; i += kRows) {
    product_tile<T, kRows>(a.panel + i * kBlock, a.block_stride(), b, scale, out + i * out_row, out_row);
  }
  for (; i < a.rows; ++i) {
    product_tile<T, 1>(a.panel + i * kBlock, a.block_stride(), b, scale, out + i * out_row, out_row);
  }
}

// to[i] (=, +=) sum over kKeys keys of left[i][j] times row j, for the rows i of a panel.
template <int kKeys, class S>
void add_rows(const Compute<S>* left, int64_t left_row, int64_t queries, const Group<S>& keys, bool from_zero,
              Compute<S>* to, int64_t to_block) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t full = keys.full_blocks(), blocks = keys.blocks();
  for (int64_t i = 0; i < queries; ++i) {
    V weight[kKeys];
    RNNKERN_UNROLL
    for (int j = 0; j < kKeys; ++j) weight[j] = V(left[i * left_row + j]);
    for (int64_t block = 0; block < blocks; ++block) {
      RNNKERN_UNROLL
      for (int p = 0; p < kParts<T>; ++p) {
        const int lanes = block < full ? V::kLanes : keys.lanes(block, p);
        T* sum = to + block * to_block + i * kBlock + p * V::kLanes;
        V x = from_zero ? V(T(0)) : V::load(sum);
        RNNKERN_UNROLL
        for (int j = 0; j < kKeys; ++j) x = fma(weight[j], keys.load(j, block, p, lanes), x);
        x.store(sum);
      }
    }
  }
}
// to[i] = sum over all n keys of left[i][j] times row j, read where they lie. `part` is another panel.
template <class S>
void sum_rows(const Compute<S>* left, int64_t left_row, int64_t queries, const Operand<S>& keys, int64_t n,
              Compute<S>* to, int64_t to_block, Compute<S>* part) {
  for (int64_t tile = 0; tile < n; tile += kTile) {
    const int64_t end = min_of(n, tile + kTile);
    Compute<S>* sum = tile == 0 ? to : part;
    int64_t j = tile;
    for (; j + kGroup <= end; j += kGroup) {
      add_rows<kGroup>(left + j, left_row, queries, keys.group(j, n), j == tile, sum, to_block);
    }
    for (; j < end; ++j) add_rows<1>(left + j, left_row, queries, keys.group(j, n), j == tile, sum, to_block);
    for (int64_t i = 0; tile > 0 && i < keys.blocks * to_block; ++i) to[i] += part[i];
  }
}

// Rows of a tensor to write, or to add to: row j is base + index[j] * stride. Passed by value: a store might change
// what a reference names, as far as the compiler knows, and it would load all of it again.
template <class E>
struct Target {
  E* base;
  int64_t columns, stride;
  const int64_t* index = nullptr;  // null: the identity
  bool add = false;

  E* row(int64_t j) const { return base + (index ? index[j] : j) * stride; }
  // One part of a block of a row.
  RNNKERN_FN void put(E* row, int64_t block, int part, Vec<Compute<E>> x) const {
    using V = Vec<Compute<E>>;
    const int64_t column = block * kBlock + part * V::kLanes;
    const int lanes = int(min_of(columns - column, int64_t(V::kLanes)));
    if (lanes <= 0) return;
    if (add) x = load_lanes(row + column, lanes) + x;
    store_lanes(row + column, x, lanes);
  }
};
template <class E>
Target<E> slice(Target<E> target, const Columns& columns) {
  target.columns = columns.of(target.columns);
  target.base += columns.begin * kBlock;
  return target;
}
// The rows of a panel to the rows from `first` on, times an optional factor per column.
template <class E>
void put_panel(const Compute<E>* panel, int64_t panel_block, int64_t rows, const Compute<E>* factor, Target<E> target,
               int64_t first) {
  using V = Vec<Compute<E>>;
  const int64_t blocks = ceil_div(target.columns, kBlock);
  for (int64_t i = 0; i < rows; ++i) {
    E* row = target.row(first + i);
    for (int64_t block = 0; block < blocks; ++block) {
      RNNKERN_UNROLL
      for (int p = 0; p < kParts<Compute<E>>; ++p) {
        V x = V::load(panel + block * panel_block + i * kBlock + p * V::kLanes);
        if (factor) x = x * V::load(factor + block * kBlock + p * V::kLanes);
        target.put(row, block, p, x);
      }
    }
  }
}
// Row j of the target: the sum over queries of left[i][j] times row i of a panel, for n keys.
template <class E>
void put_outer(const Compute<E>* left, int64_t left_row, int64_t queries, const Compute<E>* panel, int64_t panel_block,
               int64_t n, Target<E> target) {
  using V = Vec<Compute<E>>;
  const int64_t blocks = ceil_div(target.columns, kBlock);
  for (int64_t j = 0; j < n; ++j) {
    E* row = target.row(j);
    const V first(left[j]);
    for (int64_t block = 0; block < blocks; ++block) {
      RNNKERN_UNROLL
      for (int p = 0; p < kParts<Compute<E>>; ++p) {
        const Compute<E>* right = panel + block * panel_block + p * V::kLanes;
        V x = fma(first, V::load(right), V(Compute<E>(0)));
        for (int64_t i = 1; i < queries; ++i) x = fma(V(left[i * left_row + j]), V::load(right + i * kBlock), x);
        target.put(row, block, p, x);
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
  const V inverse = V(T(1)) / V(fold(sum));
  for (int64_t j = 0; j < padded; j += V::kLanes) (V::load(s + j) * inverse).store(s + j);
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
