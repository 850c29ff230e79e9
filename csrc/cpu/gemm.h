// The micro-GEMM below every engine: C[block][row][width] (=, +=, bias +) A[row][k] * P[block][k][width].
//
// P is packed in blocks of 16 columns of `Gates` gates: width = 16 * Gates. One packing serves every instruction set
// and every number of rows. A tile keeps Rows x Blocks x Vectors accumulators in registers and streams P once per row
// tile; at least 8 accumulators (latency 4, two per cycle), better 12 to 26, hide the multiply-add's latency.
//
// C is of the compute type of A and P (operands.h). Where a multiply-add takes kTerms = 2 of k, P is
// [block][k/2][width][2], and what follows holds for pairs.
//
// Every element of C is one chain of fused multiply-adds over k in order, starting from zero (or the bias): the result
// does not depend on the tile, the number of rows or the width of a vector.
#pragma once

#include "cpu/operands.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int kBlock = 16;  // columns (units) of a block

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
};

template <class T>
struct PackedOperand {
  const T* p;
  int64_t block_stride;
};

enum class Start { zero, add, bias };

template <class T>
struct Panel {
  T* c;  // [block][row][width]
  int64_t block_stride, row_stride;
  Start start;
  const T* bias = nullptr;  // [block][width]
};

// kUnitInner: the operand's inner stride is 1, else its row stride is 1 (A transposed, for weight gradients).
template <class T, bool kUnitInner, int kRows, int kBlocks, int kVectors, int kWidth>
void gemm_tile(const RowOperand<T>& A, int64_t m, const PackedOperand<T>& P, int64_t block, int vector,
               const Panel<Compute<T>>& C) {
  using V = Vec<Compute<T>>;
  V sum[kRows][kBlocks][kVectors];
  const int64_t column = int64_t(vector) * V::kLanes;
  RNNKERN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    RNNKERN_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      RNNKERN_UNROLL
      for (int v = 0; v < kVectors; ++v)
        sum[i][b][v] = C.start == Start::bias ? V::load(C.bias + (block + b) * kWidth + column + v * V::kLanes) : V(0);
    }
  }
  const T* p = P.p + block * P.block_stride + column * kTerms<T>;
  for (int outer = 0; outer < A.outers; ++outer) {
    for (int group = 0; group < A.groups; ++group) {
      const T* a = A.a + outer * A.outer_stride + group * A.group_stride + m * (kUnitInner ? A.row : 1);
      const int64_t row = kUnitInner ? A.row : 1, inner = kUnitInner ? 1 : A.inner;
#pragma GCC unroll 2
      for (int k = 0; k < A.run; k += kTerms<T>) {
        Factor<T> w[kBlocks][kVectors];
        RNNKERN_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
          RNNKERN_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            w[b][v] = Factor<T>::load(p + b * P.block_stride + v * V::kLanes * kTerms<T>);
          }
        }
        RNNKERN_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Factor<T> x = Factor<T>::all(a + i * row);
          RNNKERN_UNROLL
          for (int b = 0; b < kBlocks; ++b) {
            RNNKERN_UNROLL
            for (int v = 0; v < kVectors; ++v) sum[i][b][v] = fma(x, w[b][v], sum[i][b][v]);
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
        Compute<T>* c = C.c + (block + b) * C.block_stride + (m + i) * C.row_stride + column + v * V::kLanes;
        (C.start == Start::add ? V::load(c) + sum[i][b][v] : sum[i][b][v]).store(c);
      }
    }
  }
}

template <class T, bool kUnitInner, int kMaxRows, int kBlocks, int kVectors, int kWidth>
RNNKERN_FN void gemm_rows(int rows, const RowOperand<T>& A, int64_t m, const PackedOperand<T>& P, int64_t block,
                          int vector, const Panel<Compute<T>>& C) {
  if constexpr (kMaxRows >= 1) {
    if (rows == kMaxRows) {
      gemm_tile<T, kUnitInner, kMaxRows, kBlocks, kVectors, kWidth>(A, m, P, block, vector, C);
    } else {
      gemm_rows<T, kUnitInner, kMaxRows - 1, kBlocks, kVectors, kWidth>(rows, A, m, P, block, vector, C);
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
template <class T, bool kUnitInner, int kBlocks, int kVectors, int kWidth>
RNNKERN_FN void gemm_blocks(int64_t count, int64_t rows, int64_t block, const RowOperand<T>& A,
                            const PackedOperand<T>& P, const Panel<Compute<T>>& C) {
  if constexpr (kBlocks >= 1) {
    if (count < kBlocks) return gemm_blocks<T, kUnitInner, kBlocks - 1, kVectors, kWidth>(count, rows, block, A, P, C);
    constexpr int kMaxRows = tile_rows(kBlocks * kVectors);
    const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows;
    for (int vector = 0; vector < kWidth / Vec<Compute<T>>::kLanes; vector += kVectors) {
      int64_t m = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t size = (rows - m + tiles - i - 1) / (tiles - i);
        gemm_rows<T, kUnitInner, kMaxRows, kBlocks, kVectors, kWidth>(int(size), A, m, P, block, vector, C);
        m += size;
      }
    }
  }
}

// Blocks in balanced groups of at most kMaxBlocks, each in passes of kVectors vectors.
template <class T, bool kUnitInner, int kMaxBlocks, int kVectors, int kWidth>
void gemm_shape(int64_t rows, int64_t blocks, const RowOperand<T>& A, const PackedOperand<T>& P,
                const Panel<Compute<T>>& C) {
  static_assert(kWidth % (kVectors * Vec<Compute<T>>::kLanes) == 0, "a block is a whole number of passes");
  const int64_t groups = (blocks + kMaxBlocks - 1) / kMaxBlocks;
  for (int64_t i = 0, block = 0; i < groups; ++i) {
    const int64_t count = (blocks - block + groups - i - 1) / (groups - i);
    gemm_blocks<T, kUnitInner, kMaxBlocks, kVectors, kWidth>(count, rows, block, A, P, C);
    block += count;
  }
}

template <class T, int kGates>
void gemm(int64_t rows, int64_t blocks, const RowOperand<T>& A, const PackedOperand<T>& P, const Panel<Compute<T>>& C) {
  constexpr int kWidth = kBlock * kGates, kVectors = kWidth / Vec<Compute<T>>::kLanes;
  if (rows == 0) return;
#define RNNKERN_SHAPE(max_blocks, vectors) gemm_shape<T, true, max_blocks, vectors, kWidth>(rows, blocks, A, P, C)
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
  } else {
    if constexpr (kVectors % 3 == 0) {
      if (rows <= 2) return RNNKERN_SHAPE(1, 6);
      return RNNKERN_SHAPE(1, 3);
    } else if constexpr (kVectors % 4 == 0) {
      if (rows <= 3) return RNNKERN_SHAPE(1, 4);
      return RNNKERN_SHAPE(1, 2);
    } else {
      if (rows <= 3) return RNNKERN_SHAPE(2, 2);
      return RNNKERN_SHAPE(1, 2);
    }
  }
#undef RNNKERN_SHAPE
}

// The same for a transposed A, one gate: C[block][row][16].
template <class T>
void gemm_transposed(int64_t rows, int64_t blocks, const RowOperand<T>& A, const PackedOperand<T>& P,
                     const Panel<Compute<T>>& C) {
  constexpr int kVectors = kBlock / Vec<Compute<T>>::kLanes;
  if constexpr (kRegisters >= 32) {
    gemm_shape<T, false, kVectors == 1 ? 3 : 1, kVectors, kBlock>(rows, blocks, A, P, C);
  } else {
    gemm_shape<T, false, 1, 2, kBlock>(rows, blocks, A, P, C);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
