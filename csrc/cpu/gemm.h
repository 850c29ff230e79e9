// The micro-GEMM below every engine: C[block][row][width] (=, +=, bias +) A[row][k] * P[block][k][width].
//
// P is packed in blocks of 16 columns of `Gates` gates: width = 16 * Gates. With 16 registers the tiles are too low to
// take more than one gate, and P is [block][gate][k][16]: what a tile reads lies in a row (kPanelWidth). A tile keeps
// Rows x Blocks x Vectors accumulators in registers and streams P once per row tile; at least 8 accumulators (latency
// 4, two per cycle), better 12 to 26, hide the multiply-add's latency.
//
// C is of the compute type of A and P (operands.h). Where a multiply-add takes kTerms = 2 of k, P is
// [block][k/2][width][2], and what follows holds for pairs.
//
// Integers (kQuantized) are summed as such, which is exact up to kExactTerms terms; the sum is then scaled by the row's
// scale times the column's, and added.
//
// Every other element of C is one chain of fused multiply-adds over k in order, starting from zero (or the bias): the
// result does not depend on the tile, the number of rows or the width of a vector.
#pragma once

#include "cpu/operands.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int kBlock = 16;  // columns (units) of a block

// Columns that packed weights hold side by side for each k: of all gates, or of one.
constexpr int panel_width(int gates) { return kRegisters >= 32 ? gates * kBlock : kBlock; }

// A(m, k) with k = (outer, group, run): a[m * row + outer * outer_stride + group * group_stride + run * inner].
template <class T>
struct RowOperand {
  const T* a;
  int64_t row;
  int run;
  int64_t inner = 1;
  int groups = 1;
  int64_t group_stride = 0;
  int outers = 1;
  int64_t outer_stride = 0;
  const float* scale = nullptr;  // [row], of integers
};

template <class T>
struct PackedOperand {
  const T* p;
  int64_t panel_stride;  // from block to block, or from gate to gate
  int64_t ahead = 0;     // from what is read to what will be read after all of it, and is fetched into the L2 cache
  const float* scale = nullptr;  // [block][width], of integers
};

enum class Start { zero, add, bias };

template <class T>
struct Panel {
  T* c;  // [block][row][width]
  int64_t block_stride, row_stride;
  Start start;
  const T* bias = nullptr;  // [block][width]
};

// How a tile reads A: a row's k in one run, in runs, or transposed (A's row stride is 1; one run).
enum class Walk { run, runs, columns };

// Tiles of kRows rows from row m to row `end`. All that the loop needs is copied first: it is not read again after each
// tile's stores, and the next tile's loads can start before this one's multiply-adds are done.
template <class T, Walk kWalk, int kRows, int kBlocks, int kVectors, int kWidth>
void gemm_tiles(int64_t m, int64_t end, const RowOperand<RowElement<T>>& A, const PackedOperand<WeightElement<T>>& P,
                int64_t block, int vector, const Panel<Compute<T>>& C) {
  using V = Vec<Compute<T>>;
  constexpr bool kRuns = kWalk == Walk::runs, kColumns = kWalk == Walk::columns;
  constexpr bool kFetch = kWalk == Walk::run && kRows > 3;  // fewer rows take as many cycles to load as to multiply
  constexpr bool kFewRows = kRows < kBlocks * kVectors;
  const int64_t column = int64_t(vector) * V::kLanes;
  const int64_t row = kColumns ? 1 : A.row, inner = kColumns ? A.inner : 1, run = A.run;
  const int64_t group_stride = A.group_stride, outer_stride = A.outer_stride;
  const int outers = kRuns ? A.outers : 1, groups = kRuns ? A.groups : 1;
  const int64_t panel_stride = P.panel_stride, block_stride = C.block_stride, row_stride = C.row_stride;
  const WeightElement<T>* const p_first = P.p + block * panel_stride + column * kTerms<T>;
  const RowElement<T>* a_tile = A.a + m * row;
  Compute<T>* c_tile = C.c + block * block_stride + m * row_stride + column;
  const Compute<T>* const bias = C.start == Start::bias ? C.bias + block * kWidth + column : nullptr;
  const bool add = C.start == Start::add;
  const int64_t ahead = P.ahead;
  for (; m < end; m += kRows, a_tile += kRows * row, c_tile += kRows * row_stride) {
    Sum<T> sum[kRows][kBlocks][kVectors];
    RNNKERN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RNNKERN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        RNNKERN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (kQuantized<T>) {
            sum[i][b][v] = Sum<T>(0);
          } else {
            sum[i][b][v] = bias ? V::load(bias + b * kWidth + v * V::kLanes) : V(0);
          }
        }
      }
    }
    const WeightElement<T>* p = p_first;
    for (int outer = 0; outer < outers; ++outer) {
      for (int group = 0; group < groups; ++group) {
        const RowElement<T>* a = kRuns ? a_tile + outer * outer_stride + group * group_stride : a_tile;
#pragma GCC unroll 2
        for (int64_t k = 0; k < run; k += kTerms<T>) {
          // Few rows stay in registers while the weights pass, else the other way round.
          Factor<T> x[kRows], w[kBlocks][kVectors];
          if constexpr (kFewRows) {
            RNNKERN_UNROLL
            for (int i = 0; i < kRows; ++i) x[i] = Factor<T>::all(a + i * row);
          }
          RNNKERN_UNROLL
          for (int b = 0; b < kBlocks; ++b) {
            RNNKERN_UNROLL
            for (int v = 0; v < kVectors; ++v) {
              const WeightElement<T>* from = p + b * panel_stride + v * V::kLanes * kTerms<T>;
              w[b][v] = Factor<T>::load(from);
              if (kFetch && v * V::kLanes % int(64 / sizeof(Compute<T>)) == 0) __builtin_prefetch(from + ahead, 0, 2);
              if constexpr (kFewRows) {
                RNNKERN_UNROLL
                for (int i = 0; i < kRows; ++i) sum[i][b][v] = fma(x[i], w[b][v], sum[i][b][v]);
              }
            }
          }
          RNNKERN_UNROLL
          for (int i = 0; i < (kFewRows ? 0 : kRows); ++i) {
            x[i] = Factor<T>::all(a + i * row);
            RNNKERN_UNROLL
            for (int b = 0; b < kBlocks; ++b) {
              RNNKERN_UNROLL
              for (int v = 0; v < kVectors; ++v) sum[i][b][v] = fma(x[i], w[b][v], sum[i][b][v]);
            }
          }
          a += inner * kTerms<T>;
          p += kWidth * kTerms<T>;
        }
      }
    }
    RNNKERN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RNNKERN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        RNNKERN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          Compute<T>* c = c_tile + b * block_stride + i * row_stride + v * V::kLanes;
          if constexpr (kQuantized<T>) {
            const V scale = V(A.scale[m + i]) * V::load(P.scale + block * kWidth + column + b * kWidth + v * V::kLanes);
            const V before = add ? V::load(c) : bias ? V::load(bias + b * kWidth + v * V::kLanes) : V(0);
            fma(sum[i][b][v].rounded(), scale, before).store(c);
          } else {
            (add ? V::load(c) + sum[i][b][v] : sum[i][b][v]).store(c);
          }
        }
      }
    }
  }
}

template <class T, Walk kWalk, int kMaxRows, int kBlocks, int kVectors, int kWidth>
RNNKERN_FN void gemm_rows(int64_t rows, int64_t m, int64_t end, const RowOperand<RowElement<T>>& A,
                          const PackedOperand<WeightElement<T>>& P, int64_t block, int vector,
                          const Panel<Compute<T>>& C) {
  if constexpr (kMaxRows >= 1) {
    if (rows == kMaxRows) {
      gemm_tiles<T, kWalk, kMaxRows, kBlocks, kVectors, kWidth>(m, end, A, P, block, vector, C);
    } else {
      gemm_rows<T, kWalk, kMaxRows - 1, kBlocks, kVectors, kWidth>(rows, m, end, A, P, block, vector, C);
    }
  }
}

// Rows of a tile of `vectors` vectors a row: as many accumulators as leave registers for the operands.
constexpr int tile_rows(int vectors) {
  if (kRegisters < 32) return vectors <= 2 ? 6 : vectors == 3 ? 4 : vectors == 4 ? 3 : vectors <= 6 ? 2 : 1;
  return vectors <= 2    ? 13
         : vectors == 3  ? 8
         : vectors == 4  ? 6
         : vectors <= 6  ? 4
         : vectors <= 8  ? 3
         : vectors <= 12 ? 2
                         : 1;
}

// `count` blocks from `block` on, rows in balanced tiles.
template <class T, Walk kWalk, int kBlocks, int kVectors, int kWidth>
RNNKERN_FN void gemm_blocks(int64_t count, int64_t rows, int64_t block, const RowOperand<RowElement<T>>& A,
                            const PackedOperand<WeightElement<T>>& P, const Panel<Compute<T>>& C) {
  if constexpr (kBlocks >= 1) {
    if (count < kBlocks) return gemm_blocks<T, kWalk, kBlocks - 1, kVectors, kWidth>(count, rows, block, A, P, C);
    constexpr int kMaxRows = tile_rows(kBlocks * kVectors);
    const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows, size = rows / tiles, larger = rows % tiles * (size + 1);
    for (int vector = 0; vector < kWidth / Vec<Compute<T>>::kLanes; vector += kVectors) {
      if (larger > 0) {
        gemm_rows<T, kWalk, kMaxRows, kBlocks, kVectors, kWidth>(size + 1, 0, larger, A, P, block, vector, C);
      }
      gemm_rows<T, kWalk, kMaxRows, kBlocks, kVectors, kWidth>(size, larger, rows, A, P, block, vector, C);
    }
  }
}

// Blocks in balanced groups of at most kMaxBlocks, each in passes of kVectors vectors.
template <class T, Walk kWalk, int kMaxBlocks, int kVectors, int kWidth>
void gemm_shape(int64_t rows, int64_t blocks, const RowOperand<RowElement<T>>& A,
                const PackedOperand<WeightElement<T>>& P, const Panel<Compute<T>>& C) {
  static_assert(kWidth % (kVectors * Vec<Compute<T>>::kLanes) == 0, "a block is a whole number of passes");
  const int64_t groups = (blocks + kMaxBlocks - 1) / kMaxBlocks;
  for (int64_t i = 0, block = 0; i < groups; ++i) {
    const int64_t count = (blocks - block + groups - i - 1) / (groups - i);
    gemm_blocks<T, kWalk, kMaxBlocks, kVectors, kWidth>(count, rows, block, A, P, C);
    block += count;
  }
}

template <class T, int kGates, Walk kWalk = Walk::run>
void gemm(int64_t rows, int64_t blocks, const RowOperand<RowElement<T>>& A, const PackedOperand<WeightElement<T>>& P,
          const Panel<Compute<T>>& C) {
  constexpr int kWidth = kBlock * kGates, kVectors = kWidth / Vec<Compute<T>>::kLanes;
  if (rows == 0) return;
#define RNNKERN_SHAPE(max_blocks, vectors) gemm_shape<T, kWalk, max_blocks, vectors, kWidth>(rows, blocks, A, P, C)
  if constexpr (kRegisters >= 32) {
    if constexpr (kVectors % 4 == 0) {
      if (rows == 1) return RNNKERN_SHAPE(4, 4);
      if (rows <= 3) return RNNKERN_SHAPE(2, 4);
      if (rows <= 6) return RNNKERN_SHAPE(1, 4);
      return RNNKERN_SHAPE(1, 2);
    } else if constexpr (kVectors % 3 == 0) {
      if (rows <= 2) return RNNKERN_SHAPE(4, 3);
      if (rows <= 4) return RNNKERN_SHAPE(2, 3);
      return RNNKERN_SHAPE(1, 3);
    } else if constexpr (kVectors == 2) {
      if (rows <= 3) return RNNKERN_SHAPE(4, 2);
      return RNNKERN_SHAPE(2, 2);
    } else {
      if (rows <= 3) return RNNKERN_SHAPE(8, 1);
      return RNNKERN_SHAPE(4, 1);
    }
  } else if constexpr (kGates > 1) {  // gate by gate
    for (int64_t block = 0; block < blocks; ++block) {
      Panel<Compute<T>> to = C;
      to.c += block * C.block_stride;
      to.block_stride = kBlock;
      if (C.bias) to.bias += block * kWidth;
      PackedOperand<WeightElement<T>> from = P;
      from.p += block * kGates * P.panel_stride;
      if (P.scale) from.scale += block * kWidth;
      gemm<T, 1, kWalk>(rows, kGates, A, from, to);
    }
  } else if constexpr (kVectors > 2) {
    if (rows <= 3) return RNNKERN_SHAPE(1, 4);
    return RNNKERN_SHAPE(1, 2);
  } else {
    if (rows == 1) return RNNKERN_SHAPE(4, 2);
    if (rows == 2) return RNNKERN_SHAPE(3, 2);
    if (rows == 3) return RNNKERN_SHAPE(2, 2);
    return RNNKERN_SHAPE(1, 2);
  }
#undef RNNKERN_SHAPE
}

// The same for a transposed A, one gate: C[block][row][16].
template <class T>
void gemm_transposed(int64_t rows, int64_t blocks, const RowOperand<RowElement<T>>& A,
                     const PackedOperand<WeightElement<T>>& P, const Panel<Compute<T>>& C) {
  constexpr int kVectors = kBlock / Vec<Compute<T>>::kLanes;
  if constexpr (kRegisters >= 32) {
    gemm_shape<T, Walk::columns, kVectors == 1 ? 3 : 1, kVectors, kBlock>(rows, blocks, A, P, C);
  } else {
    gemm_shape<T, Walk::columns, 1, 2, kBlock>(rows, blocks, A, P, C);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
