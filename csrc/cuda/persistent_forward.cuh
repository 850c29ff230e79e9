// The persistent engines' forward: round r computes step r - 1 from h that round r - 1 sent; round 0 sends h0.
#pragma once

#include "cuda/persistent.cuh"
#include "cuda/real.h"

namespace rnnkern::cuda {

template <class Cell, class Math_>
class ForwardPass {
 public:
  using Math = Math_;
  using S = typename Math::S;
  using Layer = Forward<S, float>;
  static constexpr Pass kPass = Pass::forward;
  using Product = SliceProduct<Math, kPass>;
  static constexpr int G = Cell::kGates, kSent = 1;
  static constexpr bool kCell = Cell::kStates > 1;

  // Row gate * units + u of the block's weights is that gate's of its unit u. Biases go to shared memory,
  // [2][G][units].
  RNNKERN_DEVICE static void load_weights(const Layer& layer, const PersistentLayout& layout, const Task& task,
                                          Product& product) {
    constexpr int kGranule = 16 / sizeof(S);
    const S* const w = layer.w_hh[task.direction];
    const int H = layer.H, first = task.rank * layout.units;
    const bool aligned = H % kGranule == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0;
    product.load_weights([&](int m, int piece) {
      const int gate = m / layout.units, unit = first + m % layout.units, k = piece * kGranule;
      if (gate >= G || unit >= H || k >= H) return Words{};
      return load_piece(w + (int64_t(gate) * H + unit) * H, k, H - k, aligned);
    });
    const S *const b_ih = layer.b_ih[task.direction], *const b_hh = layer.b_hh[task.direction];
    float* const to = bias(layout);
    for (int at = thread_index(); at < 2 * G * layout.units; at += block_threads()) {
      const int unit = first + at % layout.units, row = at / layout.units;
      const S* const from = row < G ? b_ih : b_hh;
      store(to + at, from && unit < H ? to_float(load(from + int64_t(row % G) * H + unit)) : 0.0f);
    }
  }

  RNNKERN_DEVICE ForwardPass(const Layer& layer, const PersistentLayout& layout, const Task& task, int)
      : f(layer), layout_(layout), direction_(task.direction), first_unit_(task.rank * layout.units) {
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) items_[i] = make_item(layer, layout, task, i);
  }

  RNNKERN_DEVICE void compute(int round, const float* sums, S (&values)[kItems][1]) {
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) {
      const Item& item = items_[i];
      if (round == 0)
        begin(i);
      else if (round <= item.length)
        step(i, sums);
      values[i][0] = round <= item.length ? h_[i] : from_float<S>(0.0f);  // past its end no one reads it
    }
  }

  // What step round - 1 reads.
  RNNKERN_DEVICE void fetch(int round) {
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) {
      const Item& item = items_[i];
      if (round > item.length) continue;
      const int64_t at = place(item, round - 1) * G;
      RNNKERN_UNROLLED
      for (int g = 0; g < G; ++g) gx_[i][g] = load(f.gx + (at + g) * f.H + item.unit);
      fresh_[i] = round < item.length && item.row(direction_).starts(f.sequence, round);
    }
  }

  // What step round - 1 leaves.
  RNNKERN_DEVICE void put(int round) {
    if (round == 0) return;
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) {
      const Item& item = items_[i];
      if (round > item.length) continue;
      const int64_t H = f.H, at = place(item, round - 1), out = at * H + item.unit;
      store(f.y + out, y_[i]);
      if (f.saved) {
        RNNKERN_UNROLLED
        for (int j = 0; j < Cell::kSaved; ++j)
          store_streaming(f.saved + (at * Cell::kSaved + j) * H + item.unit, saved_[i][j]);
      }
      if constexpr (kCell) {
        if (f.saved) store_streaming(f.c_before + out, c_[i]);
        if (f.c_all) store_streaming(f.c_all + out, c_after_[i]);
        c_[i] = fresh_[i] ? 0.0f : c_after_[i];
      }
      if (round == item.length) {
        store(f.h_n + state_place(item), y_[i]);
        if constexpr (kCell) store(f.c_n + state_place(item), c_after_[i]);
      }
    }
  }

 private:
  RNNKERN_DEVICE static float* bias(const PersistentLayout& layout) {
    return reinterpret_cast<float*>(shared_memory() + layout.at_bias);
  }

  // In [N, D].
  RNNKERN_DEVICE int64_t place(const Item& item, int step) const {
    return item.row(direction_).place(f.sequence, step) * f.sequence.D + direction_;
  }
  // In [D, B, H].
  RNNKERN_DEVICE int64_t state_place(const Item& item) const {
    return (int64_t(direction_) * f.sequence.B + item.b) * f.H + item.unit;
  }

  RNNKERN_DEVICE void begin(int i) {
    const Item& item = items_[i];
    h_[i] = from_float<S>(0.0f);
    c_[i] = 0;
    if (item.length < 0) return;
    const int64_t at = state_place(item);
    const bool zero = item.row(direction_).starts(f.sequence, 0), empty = item.length == 0;
    const S h = load(f.h0 + at);
    if (!zero) h_[i] = h;
    if (empty) store(f.h_n + at, h);
    if constexpr (kCell) {
      const float c = load(f.c0 + at);
      if (!zero) c_[i] = c;
      if (empty) store(f.c_n + at, c);
    }
  }

  RNNKERN_DEVICE void step(int i, const float* sums) {
    const Item& item = items_[i];
    Float gx[G], gh[G], state[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
    float products[G];
    Product::add_up(layout_, sums + item.sum, layout_.units, products);
    const float* const biases = bias(layout_) + item.unit - first_unit_;
    RNNKERN_UNROLLED
    for (int g = 0; g < G; ++g) {
      gx[g] = to_float(gx_[i][g]) + load(biases + g * layout_.units);
      gh[g] = products[g] + load(biases + (G + g) * layout_.units);
    }
    state[0] = to_float(h_[i]);
    if constexpr (kCell) state[1] = c_[i];
    Cell::forward(gx, gh, state, next, saved);
    y_[i] = from_float<S>(next[0].value);
    h_[i] = fresh_[i] ? from_float<S>(0.0f) : y_[i];
    RNNKERN_UNROLLED
    for (int j = 0; j < Cell::kSaved; ++j) saved_[i][j] = from_float<S>(saved[j].value);
    if constexpr (kCell) c_after_[i] = next[1].value;
  }

  const Layer& f;
  const PersistentLayout& layout_;
  const int direction_, first_unit_;
  Item items_[kItems];
  S h_[kItems];                  // that the next step reads
  float c_[kItems];              // likewise
  S gx_[kItems][G], y_[kItems];  // of the step
  bool fresh_[kItems];           // the step after it starts an episode
  S saved_[kItems][Cell::kSaved];
  float c_after_[kItems];
};

}  // namespace rnnkern::cuda
