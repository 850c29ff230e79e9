// The persistent engines' backward: round r computes step L - 1 - r, L the longest row of the tile, from dgh of the
// step after it that round r - 1 sent; round L computes dh0.
#pragma once

#include "cuda/persistent.cuh"
#include "cuda/real.h"

namespace rnnkern::cuda {

template <class Cell, class Math_>
class BackwardPass {
 public:
  using Math = Math_;
  using S = typename Math::S;
  using Layer = Backward<S, float>;
  static constexpr Pass kPass = Pass::backward;
  using Product = SliceProduct<Math, kPass>;
  static constexpr int G = Cell::kGates, kSent = G;
  static constexpr bool kCell = Cell::kStates > 1;

  // Row u of the block's weights is the column of its unit u in W_hh, in the order in which dgh is sent.
  RNNKERN_DEVICE static void load_weights(const Layer& layer, const PersistentLayout& layout, const Task& task,
                                          Product& product) {
    constexpr int kGranule = 16 / sizeof(S);
    const S* const w = layer.w_hh[task.direction];
    const int H = layer.H, pieces = layout.units / kGranule;  // of a gate of a block
    product.load_weights([&](int m, int piece) {
      const int column = task.rank * layout.units + m, rank = piece / (G * pieces);
      const int gate = piece / pieces - rank * G, unit = rank * layout.units + piece % pieces * kGranule;
      const S* const from = w + (int64_t(gate) * H + unit) * H + column;
      Vec<S, kGranule> values;
      RNNKERN_UNROLLED
      for (int j = 0; j < kGranule; ++j) {
        const bool inside = m < layout.units && column < H && unit + j < H;
        values.at[j] = inside ? load(from + int64_t(j) * H) : from_float<S>(0.0f);
      }
      Words words;
      memcpy(&words, &values, sizeof words);
      return words;
    });
  }

  RNNKERN_DEVICE BackwardPass(const Layer& layer, const PersistentLayout& layout, const Task& task, int longest)
      : w(layer), layout_(layout), longest_(longest), direction_(task.direction) {
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) {
      items_[i] = make_item(layer, layout, task, i);
      carried_[i] = false;
      direct_[i] = dc_[i] = 0;
      if (items_[i].length < 0) continue;
      if (w.dh_carry)
        direct_[i] = load(w.dh_carry + state_place(items_[i]));
      else if (w.dh_n)
        direct_[i] = to_float(load(w.dh_n + state_place(items_[i])));
      if (kCell && w.dc_n) dc_[i] = load(w.dc_n + state_place(items_[i]));
    }
    fetch(0);
  }

  RNNKERN_DEVICE void compute(int round, const float* sums, S (&values)[kItems][G]) {
    const int step = longest_ - 1 - round;
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) {
      const Item& item = items_[i];
      float dh = direct_[i];
      if (carried_[i]) {
        float product[1];
        Product::add_up(layout_, sums + item.sum, 0, product);
        dh += product[0];
      }
      if (step < 0)
        direct_[i] = dh;
      else if (step < item.length)
        step_backward(i, dh);
      RNNKERN_UNROLLED
      for (int g = 0; g < G; ++g) {
        const bool zero = step < 0 || step >= item.length;
        values[i][g] = zero ? from_float<S>(0.0f) : from_float<S>(dgh_[i][g]);
      }
    }
  }

  // What round `round` reads.
  RNNKERN_DEVICE void fetch(int round) {
    const int step = longest_ - 1 - round;
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) {
      const Item& item = items_[i];
      if (step < 0 || step >= item.length) continue;
      const int64_t H = w.H, at = place(item, step), out = at * H + item.unit;
      RNNKERN_UNROLLED
      for (int j = 0; j < Cell::kSaved; ++j) saved_[i][j] = load(w.saved + (at * Cell::kSaved + j) * H + item.unit);
      h_before_[i] = load(w.h_before + out);
      dy_[i] = w.dy ? load(w.dy + out) : from_float<S>(0.0f);
      if constexpr (kCell) {
        c_before_[i] = load(w.c_before + out);
        if (w.dc_all) dc_[i] += load(w.dc_all + out);  // rare: better to wait for it than to keep it in registers
      }
      fresh_[i] = item.row(direction_).starts(w.sequence, step);
    }
  }

  // What round `round` leaves.
  RNNKERN_DEVICE void put(int round) {
    const int step = longest_ - 1 - round;
    RNNKERN_UNROLLED
    for (int i = 0; i < kItems; ++i) {
      const Item& item = items_[i];
      if (step < 0 && item.length >= 0) {
        store(w.dh0 + state_place(item), direct_[i]);
        if (kCell && w.dc0) store(w.dc0 + state_place(item), dc_[i]);
      }
      if (step < 0 || step >= item.length) continue;
      const int64_t H = w.H, at = place(item, step);
      RNNKERN_UNROLLED
      for (int g = 0; g < G; ++g) {
        if (Cell::kSplitGates > 0) store_streaming(w.dgx + (at * G + g) * H + item.unit, from_float<S>(dgx_[i][g]));
        store_streaming(w.dgh + (at * G + g) * H + item.unit, from_float<S>(dgh_[i][g]));
      }
    }
  }

 private:
  // In [N, D].
  RNNKERN_DEVICE int64_t place(const Item& item, int step) const {
    return item.row(direction_).place(w.sequence, step) * w.sequence.D + direction_;
  }
  // In [D, B, H].
  RNNKERN_DEVICE int64_t state_place(const Item& item) const {
    return (int64_t(direction_) * w.sequence.B + item.b) * w.H + item.unit;
  }

  RNNKERN_DEVICE float clipped(float value) const {
    const float clip = float(w.clip);
    if (!(clip > 0)) return value;
    return value > clip ? clip : value < -clip ? -clip : value;  // NaN stays NaN
  }

  RNNKERN_DEVICE void step_backward(int i, float dh) {
    Float saved[Cell::kSaved], state[Cell::kStates], dnext[Cell::kStates], dgx[G], dgh[G], dstate[Cell::kStates];
    RNNKERN_UNROLLED
    for (int j = 0; j < Cell::kSaved; ++j) saved[j] = to_float(saved_[i][j]);
    state[0] = to_float(h_before_[i]);
    dnext[0] = dh + to_float(dy_[i]);
    if constexpr (kCell) {
      state[1] = c_before_[i];
      dnext[1] = dc_[i];
    }
    Cell::backward(saved, state, dnext, dgx, dgh, dstate);
    RNNKERN_UNROLLED
    for (int g = 0; g < G; ++g) {
      dgx_[i][g] = clipped(dgx[g].value);
      dgh_[i][g] = clipped(dgh[g].value);
    }
    // Nothing crosses the start of an episode.
    carried_[i] = !fresh_[i];
    direct_[i] = fresh_[i] ? 0.0f : dstate[0].value;
    if constexpr (kCell) dc_[i] = fresh_[i] ? 0.0f : dstate[1].value;
  }

  const Layer& w;
  const PersistentLayout& layout_;
  const int longest_, direction_;
  Item items_[kItems];
  float direct_[kItems];  // dL/dh but for the product of dgh: dh_n, later what the cell passes on
  float dc_[kItems];
  bool carried_[kItems];                                           // the product belongs to this row
  S saved_[kItems][Cell::kSaved], h_before_[kItems], dy_[kItems];  // of the step
  float c_before_[kItems];
  bool fresh_[kItems];  // the step starts an episode
  float dgx_[kItems][G], dgh_[kItems][G];
};

}  // namespace rnnkern::cuda
