// The product of two tiles in shared memory, 64 x 64 outputs by a block of 128 threads, a chunk of the inner dimension
// at a time.
//
// 16-bit types: 4 warps of 32 x 32 outputs by mma 16x8x16 with float sums; fragments by ldmatrix, transposed on the way
// where a tile lies the other way round. float: FFMA, true float32, 8 x 4 outputs per thread (12 loads of 16 bytes for
// 128 multiply-adds); three TF32 products would be no more accurate than 2^-21 and hardly faster.
// A tile lies as its tensor does: [64 outputs][inner], or [inner][64 outputs] ("tall"). Rows are 16 bytes longer than
// their data, so that 8 rows at one column lie in different banks.
#pragma once

#include "cuda/attention_parts.cuh"

namespace rnnkern::cuda {

constexpr int kTile = 64, kTileThreads = 128;
template <class S>
constexpr int kTileInner = 128 / int(sizeof(S));
template <class S, bool kTall>
constexpr int kTileRow = (kTall ? kTile : kTileInner<S>)+16 / int(sizeof(S));  // elements
constexpr int kTileBytes = kTile * (128 + 16);                                 // tall ones take no more

// Copies rows [first, first + kRows) of columns [column, column + kColumns), asynchronously where rows are aligned;
// zeros in the place of what is not valid or beyond the end.
template <int kRows, int kColumns, int kRow, class S, class Valid>
RNNKERN_DEVICE void load_tile(S* to, const S* from, int64_t row_stride, bool aligned, const Valid& valid, int64_t first,
                              int64_t rows, int64_t column, int64_t columns) {
  constexpr int kVector = 16 / int(sizeof(S));
  const int width = aligned ? kVector : 1, across = kColumns / width;
  for (int i = thread_index(); i < kRows * across; i += kTileThreads) {
    const int r = i / across, c = i % across * width;
    const bool there = first + r < rows && column + c < columns && valid.valid(first + r);
    const S* source = from + (first + r) * row_stride + column + c;
    if (aligned)
      copy_async<16>(to + r * kRow + c, there ? source : from,
                     there ? int(smaller(columns - column - c, kVector)) * int(sizeof(S)) : 0);
    else
      store(to + r * kRow + c, there ? load(source) : from_float<S>(0.0f));
  }
}

// 16-bit elements.
template <class S, bool kTallA, bool kTallB>
class TileProduct {
 public:
  RNNKERN_DEVICE TileProduct() {
    RNNKERN_UNROLLED
    for (int i = 0; i < 2; ++i) {
      RNNKERN_UNROLLED
      for (int j = 0; j < 4; ++j) {
        RNNKERN_UNROLLED
        for (int c = 0; c < 4; ++c) sum_[i][j][c] = 0.0f;
      }
    }
  }

  RNNKERN_DEVICE void add(const S* a_tile, const S* b_tile) {
    constexpr int kRowA = kTileRow<S, kTallA>, kRowB = kTileRow<S, kTallB>;
    const int lane = lane_index(), low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    RNNKERN_UNROLLED
    for (int k = 0; k < kTileInner<S>; k += 16) {
      uint32_t a[2][4], b[2][4];
      RNNKERN_UNROLLED
      for (int i = 0; i < 2; ++i) {  // matrices: rows, rows + 8, then the same of inner + 8
        const int m = first_row() + 16 * i;
        load_matrices<kTallA>(a[i], kTallA ? a_tile + (k + third + low) * kRowA + m + second
                                           : a_tile + (m + second + low) * kRowA + k + third);
      }
      RNNKERN_UNROLLED
      for (int j = 0; j < 2; ++j) {  // matrices: inner, inner + 8, then the same of columns + 8
        const int n = first_column() + 16 * j;
        load_matrices<kTallB>(b[j], kTallB ? b_tile + (k + second + low) * kRowB + n + third
                                           : b_tile + (n + third + low) * kRowB + k + second);
      }
      RNNKERN_UNROLLED
      for (int i = 0; i < 2; ++i) {
        RNNKERN_UNROLLED
        for (int j = 0; j < 4; ++j) {
          const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_16x8x16<S>(sum_[i][j], a[i], column);
        }
      }
    }
  }

  // visit(row, column, distance, first, second), within the tile: two results of a row, at column and column +
  // distance.
  template <class Visit>
  RNNKERN_DEVICE void for_each_pair(const Visit& visit) const {
    const int group = lane_index() / 4, pair = lane_index() % 4;
    RNNKERN_UNROLLED
    for (int i = 0; i < 2; ++i) {
      RNNKERN_UNROLLED
      for (int half = 0; half < 2; ++half) {
        RNNKERN_UNROLLED
        for (int j = 0; j < 4; ++j)
          visit(first_row() + 16 * i + 8 * half + group, first_column() + 8 * j + 2 * pair, 1, sum_[i][j][2 * half],
                sum_[i][j][2 * half + 1]);
      }
    }
  }

 private:
  RNNKERN_DEVICE static int first_row() { return warp_index() / 2 * 32; }
  RNNKERN_DEVICE static int first_column() { return warp_index() % 2 * 32; }

  float sum_[2][4][4];
};

template <bool kTallA, bool kTallB>
class TileProduct<float, kTallA, kTallB> {
 public:
  RNNKERN_DEVICE TileProduct() {
    RNNKERN_UNROLLED
    for (int i = 0; i < 8; ++i) {
      RNNKERN_UNROLLED
      for (int j = 0; j < 4; ++j) sum_[i][j] = 0.0f;
    }
  }

  RNNKERN_DEVICE void add(const float* a_tile, const float* b_tile) {
    for (int k = 0; k < kTileInner<float>; k += 4) {
      float a[8][4], b[4][4];  // [output][inner]
      load_fragment<kTallA>(a, a_tile, k, thread_index() / 16, 8);
      load_fragment<kTallB>(b, b_tile, k, thread_index() % 16, 16);
      RNNKERN_UNROLLED
      for (int inner = 0; inner < 4; ++inner) {
        RNNKERN_UNROLLED
        for (int i = 0; i < 8; ++i) {
          RNNKERN_UNROLLED
          for (int j = 0; j < 4; ++j) sum_[i][j] = multiply_add(a[i][inner], b[j][inner], sum_[i][j]);
        }
      }
    }
  }

  template <class Visit>
  RNNKERN_DEVICE void for_each_pair(const Visit& visit) const {
    RNNKERN_UNROLLED
    for (int i = 0; i < 8; ++i) {
      RNNKERN_UNROLLED
      for (int j = 0; j < 4; j += 2)
        visit(place<kTallA>(thread_index() / 16, 8, i), place<kTallB>(thread_index() % 16, 16, j), kTallB ? 1 : 16,
              sum_[i][j], sum_[i][j + 1]);
    }
  }

 private:
  // Which output is a thread's i-th along a side that `threads` share: four at a time lie side by side in a tall tile,
  // and are read together; of another tile, threads read different rows.
  template <bool kTall>
  RNNKERN_DEVICE static int place(int thread, int threads, int i) {
    return kTall ? i / 4 * 4 * threads + thread * 4 + i % 4 : thread + threads * i;
  }

  template <bool kTall, int kCount>
  RNNKERN_DEVICE static void load_fragment(float (&to)[kCount][4], const float* tile, int k, int thread, int threads) {
    using Vector = Vec<float, 4>;
    constexpr int kRow = kTileRow<float, kTall>;
    if constexpr (kTall) {
      RNNKERN_UNROLLED
      for (int inner = 0; inner < 4; ++inner) {
        RNNKERN_UNROLLED
        for (int i = 0; i < kCount; i += 4) {
          const Vector four =
              load(reinterpret_cast<const Vector*>(tile + (k + inner) * kRow + place<kTall>(thread, threads, i)));
          RNNKERN_UNROLLED
          for (int e = 0; e < 4; ++e) to[i + e][inner] = four.at[e];
        }
      }
    } else {
      RNNKERN_UNROLLED
      for (int i = 0; i < kCount; ++i) {
        const Vector four = load(reinterpret_cast<const Vector*>(tile + place<kTall>(thread, threads, i) * kRow + k));
        RNNKERN_UNROLLED
        for (int inner = 0; inner < 4; ++inner) to[i][inner] = four.at[inner];
      }
    }
  }

  float sum_[8][4];
};

}  // namespace rnnkern::cuda
