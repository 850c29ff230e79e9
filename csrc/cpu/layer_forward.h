// Forward of one layer: project a chunk of steps, then run them; see layer_engine.h for who does what.
//
// Per step and group of unit blocks: the two halves of W_hh h as raw sums in a scratch panel that stays in the L1
// cache, then the cell's pointwise part over the panel. Everything per unit is stored in blocks of 16 units,
// [block][row][gate][16], which is the order in which it is read again.
//
// Int8Weights: the products take x and h as integers, each row of x and each half of a row of h with a scale of its
// own; all else, the state too, is as in float.
#pragma once

#include "cpu/layer_engine.h"
#include "cpu/quantize.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class S>
class Forward {
  using T = Compute<S>;
  using V = Vec<T>;
  using A = Element<S>;              // of x, h and weights, as the products read them
  using Row = RowElement<A>;         // of x and h,
  using W = WeightElement<A>;        // of weights
  using State = Stored<Element<S>>;  // of h from step to step
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  static constexpr int kWidth = kGates * kBlock, kPanelWidth = panel_width(kGates);
  static constexpr int kSavedWidth = (kSaved + kStates - 1) * kBlock;
  static constexpr int64_t kLongestRun = kQuantized<A> ? 512 : kRun;
  static_assert(!kQuantized<A> || kLongestRun <= kExactTerms, "a run of integers is exact");
  static constexpr int64_t kPanelRows = 48, kPanelBlocks = 8;

  // A row at a step: where its units lie in y, whether the step is its last, whether its state is zero after it.
  struct StepRow {
    int64_t out;
    bool last, fresh;
  };

 public:
  static size_t bytes(const LayerPlan& plan) { return Forward(plan, LayerOutputs{}, nullptr, -1).bytes_; }

  static void run(const LayerPlan& plan, const LayerOutputs& out, const Member& member) {
    const Share share = share_of(plan, member);
    Forward engine(plan, out, plan.workspace, member.index);
    for (int d = share.first_direction; d < share.last_direction; ++d) engine.run_direction(d, share);
  }

 private:
  // The workspace: states that all members see, then each member's scratch. A null workspace only counts the bytes.
  Forward(const LayerPlan& plan, const LayerOutputs& out, void* workspace, int member)
      : plan_(plan),
        in_(*plan.in),
        out_(out),
        blocks_(blocks_of(plan.in->H)),
        inputs_(padded<A>(plan.in->I)),
        hidden_(padded<A>(plan.in->H)) {
    Arena arena(workspace);
    panel_blocks_ = plan.packed ? kPanelBlocks : 4;  // what is packed as it is used should stay in the cache
    row_stride_ = padded_stride(in_.H);
    x_stride_ = padded_stride(in_.I);
    for (int d = 0; d < in_.D; ++d) {
      for (State*& h : h_[d]) h = arena.take<State>(size_t(in_.B * row_stride_));
      for (int s = 1; s < kStates; ++s) state_[d][s] = arena.take<T>(size_t(blocks_ * in_.B * kBlock));
    }
    // Steps whose inputs are projected together: enough rows to stream the weights as fast as they are multiplied.
    const bool beyond_cache = in_.H * in_.I * kGates * int64_t(sizeof(W)) > int64_t(4) << 20;
    const int64_t rows = splits_batch(in_, plan.members) ? in_.B / plan.members : in_.B;
    chunk_ = max_of(int64_t(1), min_of(plan.steps, (beyond_cache ? 384 : 128) / max_of(int64_t(1), rows)));
    const int64_t chunk_rows = chunk_ * in_.B;  // a member may have all rows of a step
    for (int i = 0; i < plan.members; ++i) {
      Row* x = arena.take<Row>(size_t(chunk_rows * x_stride_));
      float* x_scale = arena.take<float>(size_t(kQuantized<A> ? chunk_rows : 0));
      Row* rounded_h = arena.take<Row>(size_t(kQuantized<A> ? in_.B * row_stride_ : 0));
      float* h_scale = arena.take<float>(size_t(kQuantized<A> ? 2 * in_.B : 0));
      T* gx = arena.take<T>(size_t(blocks_ * chunk_rows * kWidth));
      T* half0 = arena.take<T>(size_t(kPanelBlocks * min_of(kPanelRows, in_.B) * kWidth));
      T* half1 = arena.take<T>(size_t(kPanelBlocks * min_of(kPanelRows, in_.B) * kWidth));
      int64_t* first_row = arena.take<int64_t>(size_t(chunk_ + 1));
      StepRow* step_rows = arena.take<StepRow>(size_t(in_.B));
      T* bias = arena.take<T>(kPanelBlocks * kWidth);
      W* weights = arena.take<W>(size_t(plan.packed ? 0 : panel_blocks_ * max_of(inputs_, hidden_) * kWidth));
      if (i == member) {
        bias_ = bias;
        weights_ = weights;
        x_ = x;
        x_scale_ = x_scale;
        rounded_h_ = rounded_h;
        h_scale_[0] = h_scale;
        h_scale_[1] = h_scale + in_.B;
        gx_ = gx;
        half_[0] = half0;
        half_[1] = half1;
        first_row_ = first_row;
        step_rows_ = step_rows;
      }
    }
    bytes_ = arena.used();
  }

  int64_t time_of(int d, int64_t step) const { return d == 0 ? step : plan_.steps - 1 - step; }
  int64_t row_of(int64_t m) const { return plan_.order[m]; }

  // Weights and biases of unit blocks, [block][k][gate][16] and [block][gate][16]: from the packed ones, or packed now,
  // and then valid until the next are asked for.
  const W* input_weights(int d, int64_t block, int64_t count) {
    return plan_.packed ? packed(d).w_ih + block * inputs_ * kWidth : pack(in_.weights[d].w_ih, in_.I, block, count);
  }
  const W* hidden_weights(int d, int64_t block, int64_t count) {
    return plan_.packed ? packed(d).w_hh + block * hidden_ * kWidth : pack(in_.weights[d].w_hh, in_.H, block, count);
  }
  const T* input_bias(int d, int64_t block, int64_t count) {
    return plan_.packed ? packed(d).b_ih + block * kWidth : pack_bias(in_.weights[d].b_ih, block, count);
  }
  const T* hidden_bias(int d, int64_t block, int64_t count) {
    return plan_.packed ? packed(d).b_hh + block * kWidth : pack_bias(in_.weights[d].b_hh, block, count);
  }
  const W* pack(const void* from, int64_t K, int64_t block, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      pack_block<S>(from, weights_ + i * padded<A>(K) * kWidth, kGates, in_.H, K, block + i);
    }
    return weights_;
  }
  const T* pack_bias(const void* from, int64_t block, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      pack_bias_block<S>(from, bias_ + i * kWidth, kGates, in_.H, block + i);
    }
    return bias_;
  }
  Packed<S> packed(int d) const { return Packed<S>(plan_.packed, in_, kGates, d); }

  // Scales of integer weights, which are always packed before.
  const float* input_scale(int d, int64_t block) const {
    return kQuantized<A> ? packed(d).scale_ih + block * kWidth : nullptr;
  }
  const float* hidden_scale(int d, int64_t block) const {
    return kQuantized<A> ? packed(d).scale_hh + block * kWidth : nullptr;
  }

  // Panels of unit blocks: enough blocks in each to keep the multipliers busy when rows or gates are few.
  int64_t panels_of(const Range& blocks, int64_t rows) const {
    const int64_t width = rows <= 3 ? panel_blocks_ : kGates == 1 ? 4 : 1;
    return (blocks.end - blocks.begin + width - 1) / width;
  }

  void run_direction(int d, const Share& share) {
    const Range rows = rows_of(plan_, share), blocks = blocks_of(plan_, share);
    start(d, rows, blocks);
    if (share.unit_split) plan_.flags[share.base + share.index].raise(1);
    for (int64_t step = 0; step < plan_.steps; step += chunk_) {
      const int64_t steps = min_of(chunk_, plan_.steps - step);
      project(d, rows, blocks, step, steps);
      for (int64_t i = 0; i < steps; ++i) {
        run_step(d, share, rows, blocks, step + i, first_row_[i]);
        if (share.unit_split) plan_.flags[share.base + share.index].raise(step + i + 2);
      }
    }
  }

  // Initial states, final states of rows without steps, and zeros past each row's end.
  void start(int d, const Range& rows, const Range& blocks) {
    const int64_t H = in_.H, unit = blocks.begin * kBlock,
                  units = max_of(int64_t(0), min_of(blocks.end * kBlock, H) - unit);
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const int64_t b = row_of(m), from = (d * in_.B + b) * H + unit;
      const Stored<S>* h0 = static_cast<const Stored<S>*>(in_.h0) + from;
      if (plan_.length[m] == 0) memcpy(static_cast<Stored<S>*>(out_.h_n) + from, h0, size_t(units) * sizeof(*h0));
      const bool fresh = d == 0 && reset_at(in_, 0, b);
      // Rows that the reverse direction starts later may read either buffer first.
      for (int i = 0; i < (plan_.length[m] < plan_.steps ? 2 : 1); ++i) {
        State* h = h_[d][i] + m * row_stride_ + unit;
        if (fresh) {
          memset(h, 0, size_t(units) * sizeof(State));
        } else {
          convert_row(h0, h, units);
        }
        if (unit + units == H) memset(h + units, 0, size_t(hidden_ - H) * sizeof(State));
      }
      for (int s = 1; s < kStates; ++s) {
        const T* c0 = static_cast<const T*>(in_.c0) + from;
        if (plan_.length[m] == 0) memcpy(static_cast<T*>(out_.c_n) + from, c0, size_t(units) * sizeof(T));
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
          T* c = state_[d][s] + (block * in_.B + m) * kBlock;
          for (int64_t j = 0; j < kBlock; ++j) {
            const int64_t u = (block - blocks.begin) * kBlock + j;
            c[j] = fresh || u >= units ? T(0) : c0[u];
          }
        }
      }
      for (int64_t t = plan_.length[m]; t < in_.T && !in_.packed_rows; ++t) {
        const int64_t at = (row_at(plan_, t, m) * in_.D + d) * H + unit;
        memset(static_cast<Stored<S>*>(out_.y) + at, 0, size_t(units) * sizeof(Stored<S>));
        if (out_.c_all) memset(static_cast<T*>(out_.c_all) + at, 0, size_t(units) * sizeof(T));
      }
    }
  }

  // gx = W_ih x + b_ih for the rows alive in steps [step, step + steps).
  void project(int d, const Range& rows, const Range& blocks, int64_t step, int64_t steps) {
    int64_t count = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t t = time_of(d, step + i), alive = rows_alive(plan_, rows, t);
      first_row_[i] = count;
      for (int64_t m = 0; m < alive; ++m) {
        Row* row = x_ + (count + m) * x_stride_;
        const Stored<S>* x = input_row<Stored<S>>(plan_, t, rows.begin + m);
        if constexpr (kQuantized<A>) {
          x_scale_[count + m] = quantize_row(x, in_.I, row, inputs_);
        } else {
          convert_row(x, row, in_.I);
          memset(row + in_.I, 0, size_t(inputs_ - in_.I) * sizeof(Row));
        }
      }
      count += alive;
    }
    gx_stride_ = count * kWidth;
    const int64_t panels = panels_of(blocks, count);
    for (int64_t i = 0; i < panels; ++i) {
      const auto [block, end] = piece(blocks, panels, i);
      const int64_t panel = end - block;  // its weights stay in the cache
      T* gx = gx_ + (block - blocks.begin) * gx_stride_;
      const W* weights = input_weights(d, block, panel);
      const W* next = plan_.packed && i + 1 < panels ? weights + panel * inputs_ * kWidth : weights;
      const T* bias = input_bias(d, block, panel);
      for (int64_t k = 0; k < inputs_ || k == 0; k += kLongestRun) {
        gemm<A, kGates>(count, panel, run_of(x_, x_stride_, x_scale_, k, inputs_),
                        {weights + k * kPanelWidth, inputs_ * kPanelWidth,
                         k + kLongestRun < inputs_ ? kLongestRun * kPanelWidth : next - weights - k * kPanelWidth,
                         input_scale(d, block)},
                        {gx, gx_stride_, kWidth, k == 0 ? Start::bias : Start::add, bias});
      }
    }
  }

  void run_step(int d, const Share& share, const Range& rows, const Range& blocks, int64_t step, int64_t chunk_row) {
    const int64_t t = time_of(d, step), alive = rows_alive(plan_, rows, t), cut = half_cut(blocks_);
    const State* h = h_[d][step & 1] + rows.begin * row_stride_;
    bool waited = !share.unit_split, rounded[2] = {false, false};
    const auto wait = [&] {
      if (!waited) wait_for_others(plan_, share, step + 1);
      waited = true;
    };
    // The half whose h this member made itself can be multiplied before the others are ready.
    const int own = blocks.begin == 0 && blocks.end >= cut ? 0 : blocks.begin <= cut && blocks.end == blocks_ ? 1 : -1;
    const int64_t panels = panels_of(blocks, alive);
    start_step(d, rows, alive, t);
    for (int64_t i = 0; i < panels; ++i) {
      // Back and forth, so that what is left in the cache from the last step is used first.
      const auto [begin, end] = piece(blocks, panels, step & 1 ? panels - 1 - i : i);
      const int64_t count = end - begin;
      const W* weights = hidden_weights(d, begin, count);
      const W* next = weights;
      if (plan_.packed && i + 1 < panels) {
        next += (piece(blocks, panels, step & 1 ? panels - 2 - i : i + 1).begin - begin) * hidden_ * kWidth;
      }
      for (int64_t m = 0; m < alive; m += kPanelRows) {
        const int64_t panel_rows = min_of(kPanelRows, alive - m);
        if (own < 0) wait();
        for (int turn = 0; turn < 2; ++turn) {
          const int half = own == 1 ? 1 - turn : turn;
          if (turn == 1) wait();
          const Row* h_rows;
          if constexpr (kQuantized<A>) {
            if (!rounded[half]) round_half(h, alive, half);
            rounded[half] = true;
            h_rows = rounded_h_;
          } else {
            h_rows = h;
          }
          multiply(weights, turn == 0 ? weights : next, hidden_scale(d, begin), h_rows, m, panel_rows, count, half);
        }
        for (int64_t block = 0; block < count; ++block) {
          pointwise(d, rows.begin + m, panel_rows, step, t, begin + block, block * panel_rows * kWidth, step_rows_ + m,
                    gx_ + (begin + block - blocks.begin) * gx_stride_ + (chunk_row + m) * kWidth);
        }
      }
    }
    wait();
  }

  // One half of rows [0, rows) of h as integers.
  void round_half(const State* h, int64_t rows, int half) {
    const int64_t cut = half_cut(blocks_) * kBlock;
    const int64_t first = half == 0 ? 0 : cut, count = (half == 0 ? cut : in_.H) - first;
    for (int64_t m = 0; m < rows; ++m) {
      Row* to = rounded_h_ + m * row_stride_ + first;
      h_scale_[half][m] = quantize_row(h + m * row_stride_ + first, count, to, half == 0 ? count : hidden_ - first);
    }
  }

  // A run of rows that begins at k and ends at `last`, if it is not too long.
  static RowOperand<Row> run_of(const Row* rows, int64_t stride, const float* scale, int64_t k, int64_t last) {
    RowOperand<Row> run{rows + k, stride, int(min_of(kLongestRun, last - k))};
    run.scale = scale;
    return run;
  }

  // half_[half] = W_hh h over the units of one half, for rows [m, m + rows). The other half is next to be multiplied,
  // with weights `next`.
  void multiply(const W* weights, const W* next, const float* scale, const Row* h, int64_t m, int64_t rows,
                int64_t blocks, int half) {
    const int64_t cut = half_cut(blocks_) * kBlock;
    const int64_t first = half == 0 ? 0 : cut, last = half == 0 ? cut : hidden_;
    const int64_t ahead = next - weights + (cut - 2 * first) * kPanelWidth;
    for (int64_t k = first; k < last || k == first; k += kLongestRun) {
      gemm<A, kGates>(rows, blocks, run_of(h + m * row_stride_, row_stride_, h_scale_[half] + m, k, last),
                      {weights + k * kPanelWidth, hidden_ * kPanelWidth,
                       k + kLongestRun < last ? kLongestRun * kPanelWidth : ahead - (k - first) * kPanelWidth, scale},
                      {half_[half], rows * kWidth, kWidth, k == first ? Start::zero : Start::add});
    }
  }

  // What the rows alive at a step share over all unit blocks.
  void start_step(int d, const Range& rows, int64_t alive, int64_t t) {
    for (int64_t i = 0; i < alive; ++i) {
      const int64_t m = rows.begin + i, b = row_of(m), n = plan_.length[m];
      const bool last = d == 0 ? t + 1 == n : t == 0;
      const bool fresh = !last && fresh_state(in_, d, d == 0 ? t + 1 : t - 1, b, n);
      step_rows_[i] = {(row_at(plan_, t, m) * in_.D + d) * in_.H, last, fresh};
    }
  }

  // The cell over one unit block of rows [row, row + count); sums at half_[.] + panel, gx its first row. Everything
  // that the rows have in common is read before them: stores could change it for all the compiler knows.
  void pointwise(int d, int64_t row, int64_t count, int64_t step, int64_t t, int64_t block, int64_t panel,
                 const StepRow* step_rows, const T* gx_rows) {
    const int64_t H = in_.H, unit = block * kBlock, row_stride = row_stride_;
    const State* h = h_[d][step & 1] + row * row_stride + unit;
    State* h_next = h_[d][~step & 1] + row * row_stride + unit;
    const T *bias = hidden_bias(d, block, 1), *sum0 = half_[0] + panel, *sum1 = half_[1] + panel;
    T* states[kStates];
    for (int s = 1; s < kStates; ++s) states[s] = state_[d][s] + (block * in_.B + row) * kBlock;
    Stored<S>* const y = static_cast<Stored<S>*>(out_.y) + unit;
    T* const c_all = out_.c_all ? static_cast<T*>(out_.c_all) + unit : nullptr;
    T* saved_row = out_.saved ? static_cast<T*>(out_.saved) + saved_at(plan_, d, t, block, row, kSavedWidth) : nullptr;
    const int units = int(min_of(int64_t(kBlock), H - unit));
    for (int64_t i = 0; i < count; ++i) {
      const StepRow at = step_rows[i];
      RNNKERN_UNROLL
      for (int j = 0; j < kBlock; j += V::kLanes) {
        const int lanes = max_of(0, min_of(V::kLanes, units - j));
        V gx[kGates], gh[kGates], state[kStates], next[kStates], saved[kSaved];
        RNNKERN_UNROLL
        for (int g = 0; g < kGates; ++g) {
          const int64_t k = i * kWidth + g * kBlock + j;
          gx[g] = V::load(gx_rows + k);
          gh[g] = V::load(sum0 + k) + V::load(sum1 + k) + V::load(bias + g * kBlock + j);
        }
        state[0] = load_lanes(h + i * row_stride + j, V::kLanes);
        for (int s = 1; s < kStates; ++s) state[s] = V::load(states[s] + i * kBlock + j);
        Cell::forward(gx, gh, state, next, saved);
        next[0] = store_lanes(y + at.out + j, next[0], lanes);
        // Products in pairs may read one unit past H, where an infinite input leaves anything.
        const V h_value = kTerms<A> > 1 ? next[0].first(lanes) : next[0];
        store_lanes(h_next + i * row_stride + j, at.fresh ? V(T(0)) : h_value, V::kLanes);
        for (int s = 1; s < kStates; ++s) {
          (at.fresh ? V(T(0)) : next[s]).store(states[s] + i * kBlock + j);
          if (c_all) next[s].store_n(c_all + at.out + j, lanes);
        }
        if (at.last) {
          const int64_t final_at = (d * in_.B + row_of(row + i)) * H + unit + j;
          store_lanes(static_cast<Stored<S>*>(out_.h_n) + final_at, next[0], lanes);
          for (int s = 1; s < kStates; ++s) next[s].store_n(static_cast<T*>(out_.c_n) + final_at, lanes);
        }
        if (saved_row) {
          T* to = saved_row + i * kSavedWidth + j;
          for (int k = 0; k < kSaved; ++k) saved[k].store(to + k * kBlock);
          for (int s = 1; s < kStates; ++s) next[s].store(to + (kSaved + s - 1) * kBlock);
        }
      }
    }
  }

  const LayerPlan& plan_;
  const LayerInputs& in_;
  const LayerOutputs& out_;
  const int64_t blocks_, inputs_, hidden_;  // inputs_ and hidden_: I and H as the products see them
  int64_t panel_blocks_, row_stride_, x_stride_, chunk_;
  State* h_[2][2];        // [direction][step & 1]: [row][row_stride_]
  T* state_[2][kStates];  // [direction][state]: [block][row][16]; the first is unused
  // Own scratch: [chunk row][x_stride_], [block][chunk row][gate][16], [panel block][panel row][gate][16].
  Row* x_;
  float* x_scale_;     // [chunk row], of integers; so the next two
  Row* rounded_h_;     // [row][row_stride_]
  float* h_scale_[2];  // [half][row]
  T *gx_, *half_[2];
  int64_t* first_row_;  // [chunk step] its first chunk row
  StepRow* step_rows_;  // [row alive at the step]
  W* weights_;          // what is packed as it is used, if the plan has nothing packed; so the next
  T* bias_;
  int64_t gx_stride_ = 0;  // elements of a block of gx_
  size_t bytes_ = 0;
};

}  // namespace rnnkern::RNNKERN_ISA
