// The product of a step: a block's rows of weights, which stay in registers, times what the group exchanged.
//
// As in the mma, weights are its rows, the rows of the batch its columns. The sum runs over k blocks of 64 bytes of
// values, two mma each; within a block lane `pair` of 4 takes the 16 bytes at 16 pair from both operands, in place of
// the order that the mma numbers them in: what is multiplied by what stays the same, and one 16-byte load feeds two
// mma. The operand lies [k block][row][64 bytes], so that the 8 lanes of a quarter of a 16-byte load cover 128 bytes:
// no bank conflicts, no padding.
//
// Warps: m_warps x k_warps, each warp_m_tiles x warp_k_blocks tiles of weights of 16 rows x 64 bytes. The first
// register_k_blocks of them are in registers (8 of a lane each), the rest in shared memory in the lanes' order. Partial
// sums of the k_warps go to shared memory, [k_warps][rows][sum_stride], and are added in order by whoever needs them.
// Two accumulators per tile, of even and odd mma: mma follow one another in a chain at 33 clocks each.
#pragma once

#include <cstring>

#include "cuda/device.h"
#include "cuda/persistent.h"

namespace rnnkern::cuda {

using Words = Vec<uint32_t, 4>;

// Storage types and their multiplication: d += a b.
template <class S_>
struct Half {
  using S = S_;
  static constexpr int kProducts = 1;
  RNNKERN_DEVICE static uint32_t prepare(uint32_t word) { return word; }
  RNNKERN_DEVICE static void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x16<S>(d, a, b);
  }
};
struct Tf32 {
  using S = float;
  static constexpr int kProducts = 1;
  RNNKERN_DEVICE static uint32_t prepare(uint32_t word) { return round_tf32(float_of(word)); }
  RNNKERN_DEVICE static void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x8_tf32(d, a, b);
  }
};
// Tf32 of words that are floats, whatever these are: finite ones stay finite, where TF32's range would end a little
// earlier.
struct Tf32OfAll {
  RNNKERN_DEVICE static uint32_t rounded(uint32_t word) {
    const uint32_t nearest = round_tf32(float_of(word)), size = 0x7FFFFFFFu, infinity = 0x7F800000u;
    return (nearest & size) == infinity && (word & size) < infinity ? word & ~0x1FFFu : nearest;
  }
  RNNKERN_DEVICE static void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t a_tf32[4] = {rounded(a[0]), rounded(a[1]), rounded(a[2]), rounded(a[3])};
    const uint32_t b_tf32[2] = {rounded(b[0]), rounded(b[1])};
    mma_16x8x8_tf32(d, a_tf32, b_tf32);
  }
};
// fp32 by 3xTF32: x = high + low; low times low is left out, 2^-22 of the product. An operand that is infinite, or that
// TF32 rounds to infinity, has no such parts (inf - inf is NaN): its sums are NaN, and are taken again by Tf32OfAll.
struct Tf32x3 {
  using S = float;
  using WhereNaN = Tf32OfAll;
  static constexpr int kProducts = 3;
  RNNKERN_DEVICE static uint32_t prepare(uint32_t word) { return word; }
  template <int N>
  RNNKERN_DEVICE static void split(const uint32_t (&x)[N], uint32_t (&high)[N], uint32_t (&low)[N]) {
    RNNKERN_UNROLLED
    for (int i = 0; i < N; ++i) {
      high[i] = round_tf32(float_of(x[i]));
      low[i] = round_tf32(float_of(x[i]) - float_of(high[i]));
    }
  }
  RNNKERN_DEVICE static void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    split(a, a_high, a_low);
    split(b, b_high, b_low);
    mma_16x8x8_tf32(d, a_low, b_high);
    mma_16x8x8_tf32(d, a_high, b_low);
    mma_16x8x8_tf32(d, a_high, b_high);
  }
};

// 16 bytes of a row of values, from column k; zero past `valid` of them. `aligned`: rows start at multiples of 16
// bytes.
template <class S>
RNNKERN_DEVICE Words load_piece(const S* row, int64_t k, int valid, bool aligned) {
  constexpr int kGranule = 16 / sizeof(S);
  if (aligned && valid >= kGranule) return load(reinterpret_cast<const Words*>(row + k));
  Vec<S, kGranule> values;
  RNNKERN_UNROLLED
  for (int i = 0; i < kGranule; ++i) values.at[i] = i < valid ? load(row + k + i) : from_float<S>(0.0f);
  Words words;
  memcpy(&words, &values, sizeof words);
  return words;
}

template <class Math, Pass pass>
struct SliceProduct {
  static constexpr int kM = warp_m_tiles(pass), kK = register_k_blocks(pass);
  // k blocks whose operand is loaded before the first is multiplied: as many as registers are left for.
  static constexpr int kAhead = Math::kProducts == 3 ? 2 : pass == Pass::forward ? 3 : 4;
  const PersistentLayout& layout;
  uint32_t weights[kM][kK][8];
  int m_first, m_count, k_first, k_count;  // this warp's tiles; none for warps past the last

  RNNKERN_DEVICE explicit SliceProduct(const PersistentLayout& layout_) : layout(layout_) {
    const int m_warp = warp_index() % layout.m_warps, k_warp = warp_index() / layout.m_warps;
    const auto least = [](int a, int b) { return a < b ? a : b; };
    m_first = m_warp * kM;
    m_count = least(kM, layout.m_tiles - m_first);
    k_first = k_warp * layout.warp_k_blocks;
    k_count = k_warp < layout.k_warps ? least(layout.warp_k_blocks, layout.k_blocks - k_first) : 0;
  }

  // The tiles past the registers, in shared memory: [warp][k][m][2][lane].
  RNNKERN_DEVICE Words* shared_tile(int k, int m) const {
    const int overflow = layout.warp_k_blocks - kK, tile = (warp_index() * overflow + k - kK) * kM + m;
    return reinterpret_cast<Words*>(shared_memory() + layout.at_weights + tile * kTileBytes) + lane_index();
  }

  // piece(m, p) gives the 16 bytes p of row m of the block's weights.
  template <class Piece>
  RNNKERN_DEVICE void load_weights(const Piece& piece) {
    const int row = m_first * 16 + lane_index() / 4, first = k_first * 4 + lane_index() % 4;
    const auto prepared = [&](int m, int k) {
      Words words = piece(row + m, first + k * 4);
      RNNKERN_UNROLLED
      for (int i = 0; i < 4; ++i) words.at[i] = Math::prepare(words.at[i]);
      return words;
    };
    RNNKERN_UNROLLED
    for (int m = 0; m < kM; ++m) {
      RNNKERN_UNROLLED
      for (int k = 0; k < kK; ++k) {
        if (m >= m_count || k >= k_count) continue;
        RNNKERN_UNROLLED
        for (int half = 0; half < 2; ++half) {
          const Words words = prepared(m * 16 + half * 8, k);
          RNNKERN_UNROLLED
          for (int i = 0; i < 4; ++i) weights[m][k][i / 2 * 4 + i % 2 * 2 + half] = words.at[i];
        }
      }
    }
    for (int k = kK; k < k_count; ++k) {
      for (int m = 0; m < m_count; ++m) {
        store(shared_tile(k, m), prepared(m * 16, k));
        store(shared_tile(k, m) + 32, prepared(m * 16 + 8, k));
      }
    }
  }

  // operand(k, place): as an exchange gives it. Leaves partial sums in `sums`.
  template <class Operand>
  RNNKERN_DEVICE void run(const Operand& operand, float* sums) const {
    if (k_count <= 0) return;
    float* const own = sums + warp_index() / layout.m_warps * layout.rows * layout.sum_stride + m_first * 16;
    bool missed = false;
    RNNKERN_UNROLL(1)
    for (int n = 0; n < layout.n_tiles; ++n) {
      float d[kM][2][4] = {};
      add_tiles<Math, kAhead>(d, operand, n);
      for_each_sum(d, own, n, [&](float* to, float sum) {
        store(to, sum);
        missed = missed || sum != sum;
      });
    }
    if constexpr (Math::kProducts == 3) {
      if (!any_lane(missed)) return;
      RNNKERN_UNROLL(1)
      for (int n = 0; n < layout.n_tiles; ++n) {
        float d[kM][2][4] = {};
        add_tiles<typename Math::WhereNaN, 1>(d, operand, n);
        for_each_sum(d, own, n, [&](float* to, float sum) {
          const float first = load(to);
          if (first != first) store(to, sum);
        });
      }
    }
  }

  // N rows of the product, `apart` apart, from where k_warps begin with the first; when all warps have run and met.
  template <int N>
  RNNKERN_DEVICE static void add_up(const PersistentLayout& layout, const float* at, int apart, float (&totals)[N]) {
    RNNKERN_UNROLLED
    for (int i = 0; i < N; ++i) totals[i] = 0;
    RNNKERN_UNROLL(N > 2 ? 1 : 4)
    for (int k = 0; k < layout.k_warps; ++k, at += layout.rows * layout.sum_stride) {
      RNNKERN_UNROLLED
      for (int i = 0; i < N; ++i) totals[i] += load(at + i * apart);
    }
  }

 private:
  // Adds the product with rows 8 n .. 8 n + 7 to d.
  template <class Multiply, int ahead, class Operand>
  RNNKERN_DEVICE void add_tiles(float (&d)[kM][2][4], const Operand& operand, int n) const {
    const int group = lane_index() / 4, pair = lane_index() % 4;
    const int place = (k_first * layout.rows + n * 8 + group) * 64 + pair * 16, next = layout.rows * 64;
    RNNKERN_UNROLLED
    for (int part = 0; part < kK; part += ahead) {
      Words values[ahead];
      RNNKERN_UNROLLED
      for (int i = 0; i < ahead; ++i) {
        if (part + i < kK && part + i < k_count)
          values[i] = prepared(operand(k_first + part + i, place + (part + i) * next));
      }
      RNNKERN_UNROLLED
      for (int i = 0; i < ahead; ++i) {
        if (part + i >= kK || part + i >= k_count) continue;
        RNNKERN_UNROLLED
        for (int m = 0; m < kM; ++m) {
          if (m < m_count) multiply<Multiply>(d[m], weights[m][part + i], values[i]);
        }
      }
    }
    RNNKERN_UNROLL(1)
    for (int k = kK; k < k_count; ++k) {
      const Words more = prepared(operand(k_first + k, place + k * next));
      RNNKERN_UNROLLED
      for (int m = 0; m < kM; ++m) {
        if (m >= m_count) continue;
        const Words low = load(shared_tile(k, m)), high = load(shared_tile(k, m) + 32);
        const uint32_t tile[8] = {low.at[0], high.at[0], low.at[1], high.at[1],
                                  low.at[2], high.at[2], low.at[3], high.at[3]};
        multiply<Multiply>(d[m], tile, more);
      }
    }
  }
  // visit(where it belongs, a sum of this lane).
  template <class Visit>
  RNNKERN_DEVICE void for_each_sum(const float (&d)[kM][2][4], float* own, int n, const Visit& visit) const {
    const int group = lane_index() / 4, pair = lane_index() % 4;
    RNNKERN_UNROLLED
    for (int m = 0; m < kM; ++m) {
      if (m >= m_count) continue;
      RNNKERN_UNROLLED
      for (int i = 0; i < 4; ++i)
        visit(own + (n * 8 + pair * 2 + i % 2) * layout.sum_stride + m * 16 + i / 2 * 8 + group,
              d[m][0][i] + d[m][1][i]);
    }
  }

  RNNKERN_DEVICE static Words prepared(Words words) {
    RNNKERN_UNROLLED
    for (int i = 0; i < 4; ++i) words.at[i] = Math::prepare(words.at[i]);
    return words;
  }
  template <class Multiply>
  RNNKERN_DEVICE static void multiply(float (&d)[2][4], const uint32_t (&tile)[8], const Words& values) {
    RNNKERN_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const uint32_t a[4] = {tile[half * 4], tile[half * 4 + 1], tile[half * 4 + 2], tile[half * 4 + 3]};
      const uint32_t b[2] = {values.at[half * 2], values.at[half * 2 + 1]};
      Multiply::multiply_add(d[half], a, b);
    }
  }
};

}  // namespace rnnkern::cuda
