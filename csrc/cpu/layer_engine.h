// What forward and backward share: how a team divides a layer, and the packed weights.
//
// A team divides a layer first by direction, then
//   batch-split   by rows: each member runs its rows through all steps, alone;
//   unit-split    by hidden units (few rows): each member's weights stay in its cache; a flag per step passes h on.
// Both are the same code over a range of rows and a range of unit blocks, with or without flags. Rows are sorted by
// length, so that the rows still alive are always the first ones.
//
// Canonical order of summation (results are bitwise the same for any team, batch around a row, or cut of a sequence):
// a product over hidden units is cut in two at a unit block (half_cut); each half, and the product over the inputs, is
// summed in runs of kRun (of int8 512), each one chain of multiply-adds in order; runs are added in order, then the
// halves.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/layer_kernels.h"
#include "cpu/math.h"
#include "cpu/workspace.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int64_t kRun = 256;  // longest chain of additions: keeps the rounding error below torch's

RNNKERN_FN int64_t blocks_of(int64_t units) { return (units + kBlock - 1) / kBlock; }
RNNKERN_FN int64_t half_cut(int64_t blocks) { return blocks / 2; }

// Elements between rows of `columns`: whole cache lines, an odd number of them, so that the rows of a tile fall into
// different sets of the cache.
RNNKERN_FN int64_t padded_stride(int64_t columns) { return (blocks_of(columns) | 1) * kBlock; }

struct Range {
  int64_t begin, end;
};

// A member's part of the team's work.
struct Share {
  int first_direction, last_direction;  // [first, last)
  int index, size;                      // within the members of this direction
  int base;                             // the team's number of the first of them
  bool unit_split;
};

// Whether `members` divide the rows: where each has enough of them to be bound by its multiply-adds. From four rows on
// that holds if the recurrent weights fit a core's own cache and all members have the same to do.
RNNKERN_FN bool splits_batch(const LayerInputs& in, int members) {
  const int64_t rows = in.B / members;
  return in.B > 8 * members || (rows >= 4 && in.B % members == 0 && !in.lengths && in.H <= 256);
}

RNNKERN_FN Share share_of(const LayerPlan& plan, const Member& member) {
  const LayerInputs& in = *plan.in;
  Share share{0, in.D, member.index, member.size, 0, false};
  if (in.D == 2 && member.size >= 2) {
    const int half = member.size / 2;
    const bool second = member.index >= half;
    share = second ? Share{1, 2, member.index - half, member.size - half, half, false}
                   : Share{0, 1, member.index, half, 0, false};
  }
  // A few steps have nothing to gain from rows of one's own, and each weight should be read by one member only.
  share.unit_split = share.size > 1 && (!splits_batch(in, share.size) || !plan.pack);
  return share;
}

// Rows of a member: a run of the sorted rows, so cut that all members have about the same number of steps to do.
RNNKERN_FN Range rows_of(const LayerPlan& plan, const Share& share) {
  const int64_t B = plan.in->B;
  if (share.unit_split || share.size == 1) return {0, B};
  if (!plan.in->lengths) return {B * share.index / share.size, B * (share.index + 1) / share.size};
  int64_t total = 0;
  for (int64_t b = 0; b < B; ++b) total += plan.length[b];
  Range rows{0, 0};
  int64_t sum = 0;
  for (int64_t b = 0; b < B; ++b) {
    if (sum * share.size < total * share.index) rows.begin = b + 1;
    if (sum * share.size < total * (share.index + 1)) rows.end = b + 1;
    sum += plan.length[b];
  }
  if (share.index + 1 == share.size) rows.end = B;  // rows without steps
  if (share.index == 0) rows.begin = 0;
  return rows;
}
RNNKERN_FN Range blocks_of(const LayerPlan& plan, const Share& share) {
  const int64_t blocks = blocks_of(plan.in->H);
  if (!share.unit_split) return {0, blocks};
  return {blocks * share.index / share.size, blocks * (share.index + 1) / share.size};
}
// The i-th of `pieces` balanced pieces.
RNNKERN_FN Range piece(const Range& whole, int64_t pieces, int64_t i) {
  const int64_t count = whole.end - whole.begin;
  return {whole.begin + count * i / pieces, whole.begin + count * (i + 1) / pieces};
}

// A member's piece of [0, count), whatever the engine.
RNNKERN_FN Range part_of(int64_t count, const Share& share) { return piece({0, count}, share.size, share.index); }

RNNKERN_FN int64_t rows_alive(const LayerPlan& plan, const Range& rows, int64_t t) {
  return max_of(int64_t(0), min_of(int64_t(plan.alive[t]), rows.end) - rows.begin);
}

// Rows of x, and of y and everything else that a step and row have, see LayerInputs: the row of sorted row m at step t.
RNNKERN_FN int64_t row_at(const LayerPlan& plan, int64_t t, int64_t m) {
  return plan.in->packed_rows ? plan.first_row[t] + m : t * plan.in->B + plan.order[m];
}
template <class S>
RNNKERN_FN const S* input_row(const LayerPlan& plan, int64_t t, int64_t m) {
  const LayerInputs& in = *plan.in;
  const int64_t at = in.packed_rows ? row_at(plan, t, m) * in.x_batch : t * in.x_time + plan.order[m] * in.x_batch;
  return static_cast<const S*>(in.x) + at;
}

// What forward keeps of a unit block's rows at step t, `width` elements each, counted in elements.
RNNKERN_FN int64_t saved_at(const LayerPlan& plan, int d, int64_t t, int64_t block, int64_t m, int64_t width) {
  const int64_t rows = d * plan.first_row[plan.steps] + plan.first_row[t];
  return (rows * blocks_of(plan.in->H) + block * plan.alive[t] + m) * width;
}

RNNKERN_FN bool reset_at(const LayerInputs& in, int64_t t, int64_t b) { return in.resets && in.resets[t * in.B + b]; }

// Whether the state of row b (of length n) is zero again before step t. The reverse direction runs the same episodes.
RNNKERN_FN bool fresh_state(const LayerInputs& in, int d, int64_t t, int64_t b, int64_t n) {
  return d == 0 ? reset_at(in, t, b) : t + 1 < n && reset_at(in, t + 1, b);
}

RNNKERN_FN void wait_for_others(const LayerPlan& plan, const Share& share, int64_t value) {
  for (int i = 0; i < share.size; ++i) {
    if (i != share.index) plan.flags[share.base + i].wait(value);
  }
}

// Packed weights of one direction: input weights [block][I][G][16], recurrent weights [block][H][G][16] (or gate by
// gate, or as pairs along k, see gemm.h), both biases and, of integers, both scales [block][G][16]. Units past H are
// zero.
template <class S>
struct Packed {
  using A = Element<S>;
  using T = Compute<S>;
  using W = WeightElement<A>;
  W *w_ih, *w_hh;
  T *b_ih, *b_hh;
  float *scale_ih = nullptr, *scale_hh = nullptr;
  int64_t size;  // elements of T
  RNNKERN_FN Packed(void* base, const LayerInputs& in, int gates, int d) {
    const int64_t width = blocks_of(in.H) * gates * kBlock;
    const int64_t inputs = width * padded<A>(in.I), hidden = width * padded<A>(in.H);
    size = (inputs + hidden) / kPerLane<A> + (kQuantized<A> ? 4 : 2) * width;
    w_ih = reinterpret_cast<W*>(static_cast<T*>(base) + d * size);
    w_hh = w_ih + inputs;
    b_ih = reinterpret_cast<T*>(w_hh + hidden);
    b_hh = b_ih + width;
    if constexpr (kQuantized<A>) {
      scale_ih = b_hh + width;
      scale_hh = scale_ih + width;
    }
  }
};

// Squares of kCount x kCount elements, side by side in as many vectors, in place and in stages: rows i and i + m trade
// their blocks of m x m across the diagonal. The lanes are constants to the compiler, which may know instructions for
// them.
template <int m = 1, class T, int kCount>
RNNKERN_FN void transpose(Vec<T> (&rows)[kCount]) {
  using V = Vec<T>;
  using Int = typename V::Int;
  if constexpr (m < kCount) {
    const typename V::IntValue lane = V::lane_index(), second = (lane & Int(m)) != 0;
    // The lanes of the second operand follow those of the first.
    const typename V::IntValue low = lane + (second & Int(V::kLanes - m)), high = low + m;
    RNNKERN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i & m) continue;
      const typename V::Value a = rows[i].v, b = rows[i + m].v;
      rows[i].v = __builtin_shuffle(a, b, low);
      rows[i + m].v = __builtin_shuffle(a, b, high);
    }
    transpose<2 * m>(rows);
  }
}

// kLanes rows of what makes kLanes words, K apart, to as many columns, `width` apart.
template <class S>
RNNKERN_FN void pack_tile(const StoredWeight<S>* row, int64_t K, WeightElement<Element<S>>* column, int64_t width) {
  constexpr int L = Vec<Compute<S>>::kLanes, kPer = kPerLane<Element<S>>;
  Vec<Compute<S>> rows[L];
  RNNKERN_UNROLL
  for (int i = 0; i < L; ++i) rows[i] = load_for_packing<S>(row + i * K, L * kPer);
  transpose(rows);
  RNNKERN_UNROLL
  for (int i = 0; i < L; ++i) store_packed<S>(column + i * kPer * width, rows[i], width);
}
#if RNNKERN_ISA_avx512
// Half of the shuffles are saved by loading four rows into one vector, 128 bits of each.
template <>
RNNKERN_FN void pack_tile<float>(const float* row, int64_t K, float* column, int64_t width) {
  RNNKERN_UNROLL
  for (int k = 0; k < 16; k += 4) {
    Vec<float> x[4];  // x[i]: of the rows i, i + 4, i + 8, i + 12
    RNNKERN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* from = row + i * K + k;
      __m512 quads = _mm512_castps128_ps512(_mm_loadu_ps(from));
      quads = _mm512_mask_broadcast_f32x4(quads, 0xf0, _mm_loadu_ps(from + 4 * K));
      quads = _mm512_mask_broadcast_f32x4(quads, 0xf00, _mm_loadu_ps(from + 8 * K));
      x[i] = Vec<float>(_mm512_mask_broadcast_f32x4(quads, 0xf000, _mm_loadu_ps(from + 12 * K)));
    }
    transpose(x);
    RNNKERN_UNROLL
    for (int i = 0; i < 4; ++i) x[i].store(column + (k + i) * width);
  }
}
#endif

// from: weights of S [G*H, K] -> to: [block][K][G][16], or gate by gate, or pairs along K, for one block.
template <class S>
void pack_block(const void* weights, WeightElement<Element<S>>* to, int gates, int64_t H, int64_t K, int64_t block) {
  using V = Vec<Compute<S>>;
  constexpr int L = V::kLanes, kPer = kPerLane<Element<S>>, kPair = kTerms<Element<S>>;
  const StoredWeight<S>* const from = static_cast<const StoredWeight<S>*>(weights);
  const int64_t units = min_of(int64_t(kBlock), H - block * kBlock), width = panel_width(gates);
  const int64_t gate = width == kBlock ? padded<Element<S>>(K) / kPair * kBlock : kBlock;  // from gate to gate
  for (int g = 0; g < gates; ++g) {
    for (int64_t j = 0; j < kBlock; j += L) {
      const StoredWeight<S>* const row = from + (g * H + block * kBlock + j) * K;
      for (int64_t k = 0; k < K; k += L * kPer) {  // innermost: as many streams as lanes, each read in order
        const int count = int(min_of(int64_t(L * kPer), K - k));
        WeightElement<Element<S>>* column = to + k * width + (g * gate + j) * kPair;
        if (count == L * kPer && j + L <= units) {
          pack_tile<S>(row + k, K, column, width);
        } else {
          V rows[L];
          for (int i = 0; i < L; ++i) rows[i] = j + i < units ? load_for_packing<S>(row + i * K + k, count) : V(0);
          transpose(rows);
          for (int i = 0; i * kPer < count; ++i) store_packed<S>(column + i * kPer * width, rows[i], width);
        }
      }
    }
  }
}

// from: a bias or scale of S [G*H] or null -> to: [G][16], for one block.
template <class S>
void pack_bias_block(const void* bias, Compute<S>* to, int gates, int64_t H, int64_t block) {
  const Stored<S>* const from = static_cast<const Stored<S>*>(bias);
  for (int g = 0; g < gates; ++g) {
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t unit = block * kBlock + j;
      to[g * kBlock + j] = from && unit < H ? to_compute(from[g * H + unit]) : Compute<S>(0);
    }
  }
}

// LayerKernels::packed_size and pack.
template <class Cell, class S>
int64_t packed_size(const LayerInputs& in) {
  return Packed<S>(nullptr, in, Cell::kGates, 0).size;
}
template <class Cell, class S>
void pack_layer_blocks(const LayerInputs& in, int d, int64_t begin, int64_t end, void* packed) {
  using A = Element<S>;
  const Packed<S> to(packed, in, Cell::kGates, d);
  const LayerWeights& from = in.weights[d];
  constexpr int64_t kWidth = Cell::kGates * kBlock;
  for (int64_t block = begin; block < end; ++block) {
    pack_block<S>(from.w_ih, to.w_ih + block * padded<A>(in.I) * kWidth, Cell::kGates, in.H, in.I, block);
    pack_block<S>(from.w_hh, to.w_hh + block * padded<A>(in.H) * kWidth, Cell::kGates, in.H, in.H, block);
    pack_bias_block<S>(from.b_ih, to.b_ih + block * kWidth, Cell::kGates, in.H, block);
    pack_bias_block<S>(from.b_hh, to.b_hh + block * kWidth, Cell::kGates, in.H, block);
    if constexpr (kQuantized<A>) {
      pack_bias_block<S>(from.scale_ih, to.scale_ih + block * kWidth, Cell::kGates, in.H, block);
      pack_bias_block<S>(from.scale_hh, to.scale_hh + block * kWidth, Cell::kGates, in.H, block);
    }
  }
}

}  // namespace rnnkern::RNNKERN_ISA
