// Backward of one layer, in chunks of steps against the order of forward; see layer_engine.h for who does what.
//
// For each step of a chunk: dh = W_hh^T dgh of the step just done, then the cell's pointwise backward, whose gate
// gradients may be limited. When a chunk is done, while its gate gradients are warm: dx = W_ih^T dgx by rows, and dW +=
// dg^T [x, h] by units, each chunk's sum made afresh and added to the total (one long chain would be several times less
// accurate). The length of a chunk depends on B alone, because it is part of the canonical order of summation.
//
// Gate gradients lie in slots, [slot block][chunk row][16]: first the recurrent part of the split gates, then the gates
// that dgx and dgh share, then the input part of the split gates: dgh is slots [0, G), dgx slots [split, split + G).
#pragma once

#include "cpu/layer_engine.h"
#include "cpu/layer_weight_gradients.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class S>
class Backward {
  using T = Compute<S>;
  using V = Vec<T>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  static constexpr int kSplit = Cell::kSplitGates, kSlots = GateSlots<kGates, kSplit>::kCount;
  static constexpr int kSavedWidth = (kSaved + kStates - 1) * kBlock;
  static constexpr int64_t kPanelRows = 48, kPanelBlocks = 8, kInputPanels = 4;
  static constexpr int64_t kRunBlocks = kRun / kBlock / kGates;  // unit blocks in a run
  static_assert(kRunBlocks > 0, "a cell has at most 16 gates");

  using Slots = GateSlots<kGates, kSplit>;

 public:
  static size_t bytes(const LayerPlan& plan) { return Backward(plan, LayerGradients{}, -1, nullptr).bytes_; }

  // Panels of 16 columns of the transposed weights of one direction: first those of W_hh, then those of W_ih.
  static int64_t panels(const LayerInputs& in) { return blocks_of(in.H) + blocks_of(in.I); }
  static int64_t panel_bytes(const LayerInputs& in) {
    return blocks_of(in.H) * kGates * kBlock * kBlock * int64_t(sizeof(T));
  }

  static void pack_transposed(const LayerPlan& plan, int d, int64_t begin, int64_t end) {
    const Backward engine(plan, LayerGradients{}, -1, plan.workspace);
    for (int64_t panel = begin; panel < end; ++panel) {
      const bool hidden = panel < engine.blocks_;
      const int64_t column = hidden ? panel : panel - engine.blocks_;
      engine.pack_panels(d, hidden, column, 1,
                         (hidden ? engine.w_hh_ : engine.w_ih_)[d] + column * engine.panel_stride_);
    }
  }

  static void run(const LayerPlan& plan, const LayerGradients& grad, const Member& member) {
    const Share share = share_of(plan, member);
    Backward engine(plan, grad, member.index, plan.workspace);
    for (int d = share.first_direction; d < share.last_direction; ++d) engine.run_direction(d, share, member);
  }

  static void finish(const LayerPlan& plan, const LayerGradients& grad, int64_t begin, int64_t end) {
    const Backward engine(plan, grad, -1, plan.workspace);
    if (grad.dx) engine.finish_dx(begin, end);
    if (grad.need_dw && begin == 0) engine.weights_.finish();
  }

 private:
  Backward(const LayerPlan& plan, const LayerGradients& grad, int member, void* workspace)
      : plan_(plan), in_(*plan.in), grad_(grad), blocks_(blocks_of(plan.in->H)), weights_(plan, grad) {
    Arena arena(workspace);
    const int64_t input_blocks = blocks_of(in_.I);
    panel_stride_ = panel_bytes(in_) / int64_t(sizeof(T));
    chunk_ = max_of(int64_t(1), kChunkRows / max_of(int64_t(1), in_.B));
    const int64_t longest = min_of(chunk_, plan.steps);
    // An odd number of cache lines: slot blocks fall into different sets.
    rows_stride_ = (longest * in_.B | 1) * kBlock;
    for (int d = 0; d < in_.D; ++d) {
      T* const packed = static_cast<T*>(plan.packed);
      w_hh_[d] = packed ? packed + d * (blocks_ + input_blocks) * panel_stride_ : nullptr;
      w_ih_[d] = packed ? w_hh_[d] + blocks_ * panel_stride_ : nullptr;
      gates_[d][0] = arena.take<T>(size_t(blocks_ * kSlots * rows_stride_));
      gates_[d][1] = plan.steps > chunk_ ? arena.take<T>(size_t(blocks_ * kSlots * rows_stride_)) : gates_[d][0];
      for (T*& carry : carry_[d]) carry = arena.take<T>(size_t(blocks_ * in_.B * kBlock));
      dx_[d] = in_.D == 2
                   ? arena.take<T>(size_t((in_.packed_rows ? plan.first_row[plan.steps] : in_.T * in_.B) * in_.I))
                   : nullptr;
    }
    weights_.place(arena);
    // Also what weights_ takes for the tiles past a weight's last column.
    const int64_t panel = max_of(kPanelBlocks * min_of(kPanelRows, max_of(in_.B, longest * in_.B)) * kBlock,
                                 int64_t(weights_.kPanel) * kBlock * kBlock);
    for (int i = 0; i < plan.members; ++i) {
      T* half0 = arena.take<T>(size_t(panel));
      T* half1 = arena.take<T>(size_t(panel));
      T* columns = arena.take<T>(size_t(weights_.columns_size(plan) * kBlock));
      int64_t* first_row = arena.take<int64_t>(size_t(longest + 1));
      T* panels = arena.take<T>(size_t(plan.pack ? 0 : kInputPanels * panel_stride_));
      if (i == member) {
        panels_ = panels;
        half_[0] = half0;
        half_[1] = half1;
        columns_ = columns;
        first_row_ = first_row;
      }
    }
    bytes_ = arena.used();
  }

  // Column blocks [block, block + count) of the transposed weights, [column block][unit block][slot][16 units][16].
  void pack_panels(int d, bool hidden, int64_t block, int64_t count, T* to) const {
    const int64_t columns = hidden ? in_.H : in_.I;
    const S* from = static_cast<const S*>(hidden ? in_.weights[d].w_hh : in_.weights[d].w_ih);
    for (int64_t k = 0; k < blocks_ * kGates * kBlock; ++k) {
      const int slot = int(k / kBlock % kGates), gate = hidden ? Slots::gate_of_dgh(slot) : slot;
      const int64_t unit = k / (kBlock * kGates) * kBlock + k % kBlock;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t column = (block + i) * kBlock;
        for (int j = 0; j < kBlock; j += V::kLanes) {
          const int lanes = unit < in_.H ? int(min_of(int64_t(V::kLanes), columns - column - j)) : 0;
          const S* row = from + (gate * in_.H + unit) * columns + column + j;
          (lanes > 0 ? load_lanes(row, lanes) : V(T(0))).store(to + i * panel_stride_ + k * kBlock + j);
        }
      }
    }
  }
  // The same where they are packed beforehand (`packed`), or packed now.
  const T* panels_of(const T* packed, int d, bool hidden, int64_t block, int64_t count) const {
    if (plan_.pack) return packed + block * panel_stride_;
    pack_panels(d, hidden, block, count, panels_);
    return panels_;
  }

  int64_t row_of(int64_t m) const { return plan_.order[m]; }
  T* gates(int d, int64_t chunk, int64_t block, int slot) const {
    return gates_[d][chunk & 1] + (block * kSlots + slot) * rows_stride_;
  }

  void run_direction(int d, const Share& share, const Member& member) {
    const Range rows = rows_of(plan_, share), blocks = blocks_of(plan_, share), own = part_of(blocks_, share);
    const BackwardOrder order{plan_, d};
    start(d, rows, blocks);
    if (grad_.need_dw && plan_.steps == 0) weights_.clear(d, own);
    const T* done = nullptr;  // gate gradients of the step just done, from their first row
    int64_t done_rows = 0, done_time = 0;
    for (int64_t step = 0, chunk = 0; step < plan_.steps; step += chunk_, ++chunk) {
      const int64_t steps = min_of(chunk_, plan_.steps - step);
      int64_t count = 0;
      for (int64_t i = 0; i < steps; ++i) {
        first_row_[i] = count;
        count += plan_.alive[order.time(step + i)];
      }
      first_row_[steps] = count;
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t t = order.time(step + i);
        run_step(d, share, rows, blocks, t, chunk, first_row_[i], step + i, done, done_rows, done_time);
        if (share.unit_split) plan_.flags[share.base + share.index].raise(step + i + 1);
        done = gates(d, chunk, 0, 0) + first_row_[i] * kBlock;
        done_rows = plan_.alive[t];
        done_time = t;
      }
      // All gate gradients of the chunk are needed now; after this the other buffer is free again.
      member.barrier();
      if (grad_.dx) {  // by rows, or by columns where each weight is to be read once
        const Range all_rows{0, count}, all_columns{0, blocks_of(in_.I)};
        const bool by_columns = !plan_.pack;
        input_gradients(d, by_columns ? all_rows : part_of(count, share),
                        by_columns ? part_of(all_columns.end, share) : all_columns, step, steps, chunk);
      }
      if (grad_.need_dw) {
        weights_.add(d, own, {step, step + steps}, gates(d, chunk, 0, 0), rows_stride_, count, columns_, half_[0]);
      }
    }
    run_step(d, share, rows, blocks, -1, 0, 0, plan_.steps, done, done_rows, done_time);
  }

  // The carried gradients start from those of the final states; rows without steps pass them straight through.
  void start(int d, const Range& rows, const Range& blocks) {
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const int64_t b = row_of(m);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        const int64_t unit = block * kBlock, at = (d * in_.B + b) * in_.H + unit;
        for (int s = 0; s < kStates; ++s) {
          T* carry = carry_[d][s] + (block * in_.B + m) * kBlock;
          for (int j = 0; j < kBlock; j += V::kLanes) {
            const int lanes = int(min_of(int64_t(V::kLanes), in_.H - unit - j));
            V value(T(0));
            if (lanes > 0 && s == 0 && grad_.dh_n)
              value = load_lanes(static_cast<const S*>(grad_.dh_n) + at + j, lanes);
            if (lanes > 0 && s > 0 && grad_.dc_n) value = load_lanes(static_cast<const T*>(grad_.dc_n) + at + j, lanes);
            value.store(carry + j);
            if (lanes > 0 && plan_.length[m] == 0) store_initial(s, at + j, value, lanes);
          }
        }
      }
    }
  }

  void store_initial(int s, int64_t at, V value, int lanes) const {
    if (!grad_.dh0) return;
    if (s == 0) {
      store_lanes(static_cast<S*>(grad_.dh0) + at, value, lanes);
    } else {
      store_lanes(static_cast<T*>(grad_.dc0) + at, value, lanes);
    }
  }

  // One step back: rows that were alive in the step just done get dh through W_hh; those of them that are not alive at
  // t have reached their beginning. t = -1: all have.
  void run_step(int d, const Share& share, const Range& rows, const Range& blocks, int64_t t, int64_t chunk,
                int64_t chunk_row, int64_t step, const T* done, int64_t done_rows, int64_t done_time) {
    const int64_t alive = t < 0 ? 0 : rows_alive(plan_, rows, t);
    const int64_t done_here = max_of(int64_t(0), min_of(done_rows, rows.end) - rows.begin), cut = half_cut(blocks_);
    const int64_t through = grad_.dh0 ? done_here : min_of(alive, done_here);  // rows that have come to their beginning
    const int64_t count = max_of(alive, through);                              // matter for dh0 and dc0 only
    bool waited = !share.unit_split || step == 0;
    const auto wait = [&] {
      if (!waited) wait_for_others(plan_, share, step);
      waited = true;
    };
    const int own = blocks.begin == 0 && blocks.end >= cut ? 0 : blocks.begin <= cut && blocks.end == blocks_ ? 1 : -1;
    const int64_t panel_blocks = count <= 3 && plan_.pack ? kPanelBlocks : kInputPanels;
    const int64_t panels = (blocks.end - blocks.begin + panel_blocks - 1) / panel_blocks;
    for (int64_t i = 0; i < panels; ++i) {
      const auto [begin, end] = piece(blocks, panels, step & 1 ? panels - 1 - i : i);
      const int64_t panel = end - begin;
      const T* weights = through > 0 ? panels_of(w_hh_[d], d, true, begin, panel) : nullptr;
      for (int64_t m = 0; m < count; m += kPanelRows) {
        const int64_t panel_rows = min_of(kPanelRows, count - m);
        for (int64_t r = m; r < min_of(m + panel_rows, alive); ++r) prefetch_row(d, t, rows.begin + r, {begin, end});
        const int64_t product_rows = max_of(int64_t(0), min_of(panel_rows, through - m));
        if (own < 0) wait();
        for (int turn = 0; turn < 2; ++turn) {
          const int half = own == 1 ? 1 - turn : turn;
          if (turn == 1) wait();
          if (product_rows > 0) multiply(weights, done + (rows.begin + m) * kBlock, product_rows, panel, half);
        }
        for (int64_t block = 0; block < panel; ++block) {
          for (int64_t r = 0; r < panel_rows; ++r) {
            const T* sums = m + r < through ? half_[0] + (block * product_rows + r) * kBlock : nullptr;
            pointwise(d, rows.begin + m + r, begin + block, t, m + r < alive, chunk, chunk_row, sums, done_time);
          }
        }
      }
    }
    wait();
  }

  // What pointwise will read of row m at time t, while the product is made: it comes from memory, a line per array.
  void prefetch_row(int d, int64_t t, int64_t m, const Range& blocks) const {
    const BackwardOrder order{plan_, d};
    const int64_t end = min_of(blocks.end * kBlock, in_.H);
    for (int64_t unit = blocks.begin * kBlock; unit < end; unit += int64_t(64 / sizeof(S))) {
      const int64_t column = d * in_.H + unit;
      if (grad_.dy) __builtin_prefetch(static_cast<const S*>(grad_.dy) + row_at(plan_, t, m) * in_.D * in_.H + column);
      if (!order.first_step(t, m)) {
        const int64_t row = row_at(plan_, order.before(t), m);
        __builtin_prefetch(static_cast<const S*>(grad_.y) + row * in_.D * in_.H + column);
      }
    }
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const T* kept = saved(d, t, block, m);
      for (int64_t i = 0; i < kSavedWidth; i += int64_t(64 / sizeof(T))) __builtin_prefetch(kept + i);
    }
  }

  // half_[half] = W_hh^T dgh for a panel of blocks, over the gates of one half of the units.
  void multiply(const T* weights, const T* dgh, int64_t rows, int64_t blocks, int half) {
    const int64_t cut = half_cut(blocks_), first = half == 0 ? 0 : cut, last = half == 0 ? cut : blocks_;
    for (int64_t k = first; k < last || k == first; k += kRunBlocks) {
      gemm<T, 1, Walk::runs>(rows, blocks,
                             {dgh + k * kSlots * rows_stride_, kBlock, kBlock, 1, kGates, rows_stride_,
                              int(min_of(kRunBlocks, last - k)), kSlots * rows_stride_},
                             {weights + k * kGates * kBlock * kBlock, panel_stride_},
                             {half_[half], rows * kBlock, kBlock, k == first ? Start::zero : Start::add});
    }
  }

  void pointwise(int d, int64_t m, int64_t block, int64_t t, bool alive, int64_t chunk, int64_t chunk_row,
                 const T* sums, int64_t done_time) {
    const int64_t b = row_of(m), H = in_.H, unit = block * kBlock, initial = (d * in_.B + b) * H + unit;
    const int64_t at = alive ? (row_at(plan_, t, m) * in_.D + d) * H + unit : 0;
    const BackwardOrder order{plan_, d};
    const bool cut = sums && order.fresh(done_time, m);  // no gradient crosses a reset
    // The state before step t: zero, the initial one, or that of the step before in this direction's order.
    const bool zero_before = alive && order.fresh(t, m);
    const bool initial_before = alive && !zero_before && order.first_step(t, m);
    const int64_t before = order.before(t);
    const bool after_step = alive && !zero_before && !initial_before;
    const S* h_before = after_step ? static_cast<const S*>(grad_.y) + (row_at(plan_, before, m) * in_.D + d) * H + unit
                                   : static_cast<const S*>(in_.h0) + initial;
    const T* saved_row = alive ? saved(d, t, block, m) : nullptr;
    const int64_t carry_at = (block * in_.B + m) * kBlock;
    for (int j = 0; j < kBlock; j += V::kLanes) {
      const int lanes = int(min_of(int64_t(V::kLanes), H - unit - j));
      V dnext[kStates];
      for (int s = 0; s < kStates; ++s) dnext[s] = V::load(carry_[d][s] + carry_at + j);
      if (sums && !cut) {
        dnext[0] = V::load(sums + j) + V::load(half_[1] + (sums - half_[0]) + j) + dnext[0];
      }
      if (!alive) {
        for (int s = 0; s < kStates && lanes > 0; ++s) store_initial(s, initial + j, dnext[s], lanes);
        continue;
      }
      T* gate_row = gates(d, chunk, block, 0) + (chunk_row + m) * kBlock + j;
      if (lanes <= 0) {
        for (int slot = 0; slot < kSlots; ++slot) V(T(0)).store(gate_row + slot * rows_stride_);
        continue;
      }
      if (grad_.dy) dnext[0] = load_lanes(static_cast<const S*>(grad_.dy) + at + j, lanes) + dnext[0];
      V state[kStates], kept[kSaved], dgx[kGates], dgh[kGates], dstate[kStates];
      for (int k = 0; k < kSaved; ++k) kept[k] = V::load(saved_row + k * kBlock + j);
      state[0] = zero_before ? V(T(0)) : load_lanes(h_before + j, lanes);
      for (int s = 1; s < kStates; ++s) {
        if (grad_.dc_all) dnext[s] = load_lanes(static_cast<const T*>(grad_.dc_all) + at + j, lanes) + dnext[s];
        state[s] = zero_before      ? V(T(0))
                   : initial_before ? load_lanes(static_cast<const T*>(in_.c0) + initial + j, lanes)
                                    : V::load(saved(d, before, block, m) + (kSaved + s - 1) * kBlock + j);
      }
      Cell::backward(kept, state, dnext, dgx, dgh, dstate);
      if (grad_.clip > 0) clip(dgx, dgh);
      // Lanes past H would otherwise carry what a non-finite input left there into the products.
      for (int g = 0; g < kGates; ++g) {
        if (g >= kGates - kSplit) dgx[g].first(lanes).store(gate_row + (kSplit + g) * rows_stride_);
        dgh[g].first(lanes).store(gate_row + Slots::of_dgh(g) * rows_stride_);
      }
      for (int s = 0; s < kStates; ++s) {
        (zero_before ? V(T(0)) : dstate[s]).store(carry_[d][s] + carry_at + j);
      }
    }
  }

  // NaN stays NaN.
  void clip(V (&dgx)[kGates], V (&dgh)[kGates]) const {
    const V low(T(-grad_.clip)), high(T(grad_.clip));
    for (int g = 0; g < kGates; ++g) {
      dgx[g] = larger(low, smaller(high, dgx[g]));
      dgh[g] = larger(low, smaller(high, dgh[g]));
    }
  }

  const T* saved(int d, int64_t t, int64_t block, int64_t m) const {
    return static_cast<const T*>(grad_.saved) + saved_at(plan_, d, t, block, m, kSavedWidth);
  }

  // dx = W_ih^T dgx for chunk rows [rows.begin, rows.end) and column blocks [columns.begin, columns.end).
  void input_gradients(int d, const Range& rows, const Range& columns, int64_t step, int64_t steps, int64_t chunk) {
    const int64_t panels = (columns.end - columns.begin + kInputPanels - 1) / kInputPanels;
    for (int64_t part = 0; part < panels; ++part) {
      const auto [begin, end] = piece(columns, panels, part);
      const int64_t panel = end - begin;
      const T* weights = panels_of(w_ih_[d], d, false, begin, panel);
      int64_t i = 0;
      for (int64_t r = rows.begin; r < rows.end; r += kPanelRows) {
        const int64_t count = min_of(kPanelRows, rows.end - r);
        for (int64_t k = 0; k < blocks_; k += kRunBlocks) {
          gemm<T, 1, Walk::runs>(count, panel,
                                 {gates(d, chunk, k, kSplit) + r * kBlock, kBlock, kBlock, 1, kGates, rows_stride_,
                                  int(min_of(kRunBlocks, blocks_ - k)), kSlots * rows_stride_},
                                 {weights + k * kGates * kBlock * kBlock, panel_stride_},
                                 {half_[0], count * kBlock, kBlock, k == 0 ? Start::zero : Start::add});
        }
        for (int64_t row = r; row < r + count; ++row) {
          while (i + 1 < steps && first_row_[i + 1] <= row) ++i;
          const int64_t t = BackwardOrder{plan_, d}.time(step + i);
          const int64_t at = row_at(plan_, t, row - first_row_[i]) * in_.I;
          for (int64_t block = 0; block < panel; ++block) {
            const int64_t column = (begin + block) * kBlock;
            const T* from = half_[0] + (block * count + row - r) * kBlock;
            for (int j = 0; j < kBlock && column + j < in_.I; j += V::kLanes) {
              const int lanes = int(min_of(int64_t(V::kLanes), in_.I - column - j));
              if (in_.D == 2) {
                store_lanes(dx_[d] + at + column + j, V::load(from + j), lanes);
              } else {
                store_lanes(static_cast<S*>(grad_.dx) + at + column + j, V::load(from + j), lanes);
              }
            }
          }
        }
      }
    }
  }

  // Both directions' parts of dx, and zeros past the rows' ends.
  void finish_dx(int64_t begin, int64_t end) const {
    for (int64_t m = 0; m < in_.B; ++m) {
      const int64_t n = plan_.length[m];
      for (int64_t t = begin; t < (in_.packed_rows ? min_of(n, end) : end); ++t) {
        const int64_t at = row_at(plan_, t, m) * in_.I;
        S* dx = static_cast<S*>(grad_.dx) + at;
        if (t >= n) {
          memset(dx, 0, size_t(in_.I) * sizeof(S));
        } else if (in_.D == 2) {
          for (int64_t k = 0; k < in_.I; k += V::kLanes) {
            const int lanes = int(min_of(int64_t(V::kLanes), in_.I - k));
            store_lanes(dx + k, load_lanes(dx_[0] + at + k, lanes) + load_lanes(dx_[1] + at + k, lanes), lanes);
          }
        }
      }
    }
  }

  const LayerPlan& plan_;
  const LayerInputs& in_;
  const LayerGradients& grad_;
  const int64_t blocks_;
  WeightGradients<S, kGates, kSplit> weights_;
  int64_t panel_stride_, chunk_, rows_stride_;
  T *w_hh_[2], *w_ih_[2];  // [direction]: transposed weights [column block][unit block][slot][16 units][16]
  T* gates_[2][2];         // [direction][chunk & 1]: gate gradients [unit block][slot][chunk row][16]
  T* carry_[2][kStates];   // [direction][state]: gradient that bypasses W_hh, [block][row][16]
  T* dx_[2];               // [direction]: [T][B][I], for two directions
  T *half_[2], *columns_;  // own scratch: [panel block][panel row][16], [block][chunk row][16]
  T* panels_;              // transposed weights packed as they are used, for a few steps
  int64_t* first_row_;     // [chunk step] its first chunk row
  size_t bytes_ = 0;
};

}  // namespace rnnkern::RNNKERN_ISA
