// A cell's step: x W_ih^T, h W_hh^T, biases and the pointwise part in one launch.
//
// A block owns few units (one of a cell of four sums, four of a cell of one) of up to 8 batch rows, with all their
// gates. Its four warps take turns with stretches of 32 x 16 bytes of k; a lane loads 16 bytes of each weight row and
// each input row and multiplies by FFMA. Sums over lanes by shuffles, over warps through shared memory, in an order
// that sizes alone decide. Gates whose input and recurrent parts are only ever added share one sum.
//
// Weights are read once for 8 batch rows: the floor is their bytes. LSTM, H = I = 512, bfloat16: 4 MB, 0.8 us from L2
// (5.5 TB/s) and 1 us from memory; 512 blocks, 16 warps per SM, each with four 16-byte weight loads per lane in flight:
// 32 KB per SM, which is more than bandwidth times latency (12 to 25 KB). FFMA at B = 8: 17 M products, 0.6 us. Inputs
// (16 KB) come from L1 after the first block of an SM. Above 8 rows, blocks of several row tiles read the same weights,
// at first from L2; the tensor cores overtake this somewhere above B = 32.
//
// Matrices whose rows do not all begin at multiples of 16 bytes are loaded by elements, two at a time.
#pragma once

#include "cuda/real.h"
#include "cuda/step.h"

namespace rnnkern::cuda::step {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kMostRows = 8;

// Elements that a lane takes of a row at a time, and a warp.
template <class S, bool kAligned>
constexpr int kWidth = kAligned ? 16 / int(sizeof(S)) : 2;
template <class S, bool kAligned>
constexpr int kStretch = 32 * kWidth<S, kAligned>;

constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Sums of a block: [kSlots, kUnits, kRows]. Slot g is gate g, slot kGates + i the recurrent part of split gate i.
template <int kGates_, int kSplit_, int kRows_>
struct Tile {
  static constexpr int kGates = kGates_, kSplit = kSplit_, kRows = kRows_, kSlots = kGates + kSplit;
  static constexpr int kUnits = kSlots < 4 ? 4 / kSlots : 1;
  static constexpr int kSums = power_of_two_from(kSlots * kUnits * kRows);
  RNNKERN_FN static constexpr int at(int slot, int unit, int row) { return (slot * kUnits + unit) * kRows + row; }
  RNNKERN_FN static constexpr int recurrent_slot(int gate) { return gate < kGates - kSplit ? gate : gate + kSplit; }

  RNNKERN_FN static int row_tiles(int B) { return (B + kRows - 1) / kRows; }
  RNNKERN_FN static int jobs(int H, int B) { return (H + kUnits - 1) / kUnits * row_tiles(B); }
};

// A weight matrix of [gates, units, k] and the input that it multiplies, [B, k].
template <class S>
struct Product {
  const S *w, *in;
  int units, B, k;

  RNNKERN_DEVICE bool aligned() const {
    return (reinterpret_cast<uint64_t>(w) | reinterpret_cast<uint64_t>(in) | uint64_t(k) * sizeof(S)) % 16 == 0;
  }
  RNNKERN_DEVICE int stretches() const {
    const int stretch = aligned() ? kStretch<S, true> : kStretch<S, false>;
    return (k + stretch - 1) / stretch;
  }
};

// Element j of the lane's part of a stretch is element `element(stretch, j)` of the row.
template <class S, bool kAligned>
RNNKERN_DEVICE int element(int stretch, int j) {
  return stretch * kStretch<S, kAligned> + (kAligned ? lane_index() * kWidth<S, kAligned> + j : j * 32 + lane_index());
}

// The lane's part of a stretch of a row of `count` elements; zero past its end, where nothing is read.
template <bool kAligned, class S>
RNNKERN_DEVICE Vec<S, kWidth<S, kAligned>> load_part(const S* row, int stretch, int count) {
  Vec<S, kWidth<S, kAligned>> part;
  if constexpr (kAligned) {
    const int k = element<S, true>(stretch, 0);
    RNNKERN_UNROLLED
    for (int j = 0; j < kWidth<S, kAligned>; ++j) part.at[j] = from_float<S>(0.0f);
    if (k < count) part = load(reinterpret_cast<const Vec<S, kWidth<S, kAligned>>*>(row + k));
  } else {
    RNNKERN_UNROLLED
    for (int j = 0; j < kWidth<S, kAligned>; ++j) {
      const int k = element<S, false>(stretch, j);
      part.at[j] = k < count ? load(row + k) : from_float<S>(0.0f);
    }
  }
  return part;
}

// Sums each of N values over the warp's lanes: halves are exchanged with lanes 16, 8, 4, 2, 1 apart, so that each lane
// goes on with half of the values. Leaves values lane N / 32 and following, or value lane / (32 / N), in front.
template <int kDistance = 16, int N>
RNNKERN_DEVICE void sum_over_lanes(float (&values)[N]) {
  static_assert((N & (N - 1)) == 0, "");
  if constexpr (kDistance > 0 && N > 1) {
    const bool upper = (lane_index() & kDistance) != 0;
    float kept[N / 2];
    RNNKERN_UNROLLED
    for (int i = 0; i < N / 2; ++i) {
      const float keep = upper ? values[N / 2 + i] : values[i], give = upper ? values[i] : values[N / 2 + i];
      kept[i] = keep + shuffle_xor(give, kDistance);
    }
    sum_over_lanes<kDistance / 2>(kept);
    RNNKERN_UNROLLED
    for (int i = 0; i < N / 2; ++i) values[i] = kept[i];
  } else if constexpr (kDistance > 0) {
    values[0] += shuffle_xor(values[0], kDistance);
    sum_over_lanes<kDistance / 2>(values);
  }
}
// Stores what sum_over_lanes left, in order.
template <int N>
RNNKERN_DEVICE void store_sums(float* to, const float (&values)[N]) {
  if constexpr (N >= 32) {
    RNNKERN_UNROLLED
    for (int i = 0; i < N / 32; ++i) store(to + lane_index() * (N / 32) + i, values[i]);
  } else if (lane_index() % (32 / N) == 0) {
    store(to + lane_index() / (32 / N), values[0]);
  }
}

// Adds the products of the warp's stretches, from `stretch` on. Units and rows past the last repeat the last.
template <class Tile, bool kRecurrent, bool kAligned, class S>
RNNKERN_DEVICE void add_products(float (&sums)[Tile::kSums], const Product<S>& p, int unit0, int row0, int stretch) {
  for (; stretch * kStretch<S, kAligned> < p.k; stretch += kWarps) {
    Vec<S, kWidth<S, kAligned>> w[Tile::kGates][Tile::kUnits], in[Tile::kRows];
    RNNKERN_UNROLLED
    for (int g = 0; g < Tile::kGates; ++g) {
      RNNKERN_UNROLLED
      for (int i = 0; i < Tile::kUnits; ++i) {
        const int64_t row = int64_t(g) * p.units + (unit0 + i < p.units ? unit0 + i : p.units - 1);
        w[g][i] = load_part<kAligned>(p.w + row * p.k, stretch, p.k);
      }
    }
    RNNKERN_UNROLLED
    for (int r = 0; r < Tile::kRows; ++r) {
      const int64_t row = row0 + r < p.B ? row0 + r : p.B - 1;
      in[r] = load_part<kAligned>(p.in + row * p.k, stretch, p.k);
    }
    RNNKERN_UNROLLED
    for (int j = 0; j < kWidth<S, kAligned>; ++j) {
      RNNKERN_UNROLLED
      for (int r = 0; r < Tile::kRows; ++r) {
        const float x = to_float(in[r].at[j]);
        RNNKERN_UNROLLED
        for (int g = 0; g < Tile::kGates; ++g) {
          RNNKERN_UNROLLED
          for (int i = 0; i < Tile::kUnits; ++i) {
            float& sum = sums[Tile::at(kRecurrent ? Tile::recurrent_slot(g) : g, i, r)];
            sum = multiply_add(to_float(w[g][i].at[j]), x, sum);
          }
        }
      }
    }
  }
}
template <class Tile, bool kRecurrent, class S>
RNNKERN_DEVICE void add_products(float (&sums)[Tile::kSums], const Product<S>& p, int unit0, int row0, int stretch) {
  if (p.aligned())
    add_products<Tile, kRecurrent, true>(sums, p, unit0, row0, stretch);
  else
    add_products<Tile, kRecurrent, false>(sums, p, unit0, row0, stretch);
}

// The block's sums over all of k. `shared` [kWarps, kSums] gets each warp's; sum_of reads them, after a barrier.
template <class Tile>
RNNKERN_DEVICE void share_sums(float (&sums)[Tile::kSums], float* shared) {
  sum_over_lanes(sums);
  store_sums(shared + warp_index() * Tile::kSums, sums);
  sync_block();
}
template <class Tile>
RNNKERN_DEVICE float sum_of(const float* shared, int slot, int unit, int row) {
  float sum = 0.0f;
  RNNKERN_UNROLLED
  for (int warp = 0; warp < kWarps; ++warp) sum += load(shared + warp * Tile::kSums + Tile::at(slot, unit, row));
  return sum;
}

// The unit and row of the tile that a thread finishes; false for threads without one.
template <class Tile>
struct Finished {
  int i, r, unit, row;
  bool exists;
  RNNKERN_DEVICE Finished(int unit0, int row0, int units, int B)
      : i(thread_index() / Tile::kRows),
        r(thread_index() % Tile::kRows),
        unit(unit0 + i),
        row(row0 + r),
        exists(i < Tile::kUnits && unit < units && row < B) {}
};

template <class Cell, int kRows>
using CellTile = Tile<Cell::kGates, Cell::kSplitGates, kRows>;

// One job: a tile of units and rows. `query`, if any, gets h' too, as floats.
template <class Cell, int kRows, class S>
RNNKERN_DEVICE void step_cell(const CellStep<S>& a, int job, float* query, float* shared) {
  using T = CellTile<Cell, kRows>;
  constexpr int G = Cell::kGates, kShared = G - Cell::kSplitGates;
  const int unit0 = job / T::row_tiles(a.B) * T::kUnits, row0 = job % T::row_tiles(a.B) * kRows;
  const Product<S> input{a.w_ih, a.x, a.H, a.B, a.I}, recurrent{a.w_hh, a.h, a.H, a.B, a.H};
  const int warp = warp_index();
  float sums[T::kSums] = {};
  add_products<T, false>(sums, input, unit0, row0, warp);
  add_products<T, true>(sums, recurrent, unit0, row0, (warp + kWarps - input.stretches() % kWarps) % kWarps);
  share_sums<T>(sums, shared);

  const Finished<T> own(unit0, row0, a.H, a.B);
  if (!own.exists) return;
  Float gx[G], gh[G], state[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
  RNNKERN_UNROLLED
  for (int g = 0; g < G; ++g) {
    const int at = g * a.H + own.unit;
    gx[g] = sum_of<T>(shared, g, own.i, own.r);
    gh[g] = g < kShared ? 0.0f : sum_of<T>(shared, T::recurrent_slot(g), own.i, own.r);
    if (a.b_ih) gx[g] = gx[g] + Float(to_float(load(a.b_ih + at)));
    if (a.b_hh) gh[g] = gh[g] + Float(to_float(load(a.b_hh + at)));
  }
  const int64_t at = int64_t(own.row) * a.H + own.unit;
  state[0] = to_float(load(a.h + at));
  if constexpr (Cell::kStates > 1) state[1] = load(a.c + at);
  Cell::forward(gx, gh, state, next, saved);
  const S h = from_float<S>(next[0].value);
  store(a.h_next + at, h);
  if (query) store(query + at, to_float(h));
  if constexpr (Cell::kStates > 1) store(a.c_next + at, next[1].value);
}

template <class Cell, int kRows>
constexpr size_t kCellShared = sizeof(float) * kWarps * CellTile<Cell, kRows>::kSums;

template <class Cell, int kRows, class S>
RNNKERN_KERNEL(kThreads, 4)
cell_step(RNNKERN_ARGUMENT CellStep<S> a) {
  step_cell<Cell, kRows>(a, block_index(), nullptr, reinterpret_cast<float*>(shared_memory()));
}

}  // namespace rnnkern::cuda::step
