// Gradients of a layer's weights and biases, and what they share with the backward engine: its order and gate slots.
#pragma once

#include "cpu/layer_engine.h"

namespace rnnkern::RNNKERN_ISA {

// Slots of the gate gradients of a unit block, see layer_backward.h.
template <int kGates, int kSplit>
struct GateSlots {
  static constexpr int kCount = kGates + kSplit;
  static constexpr int of_dgh(int gate) { return gate >= kGates - kSplit ? gate - (kGates - kSplit) : kSplit + gate; }
  static constexpr int of_dgx(int gate) { return kSplit + gate; }
  static constexpr int gate_of_dgh(int slot) { return slot < kSplit ? kGates - kSplit + slot : slot - kSplit; }
};

// Backward's order of steps in direction d. m counts the rows sorted by length.
struct BackwardOrder {
  const LayerPlan& plan;
  int d;
  int64_t time(int64_t step) const { return d == 0 ? plan.steps - 1 - step : step; }
  int64_t before(int64_t t) const { return d == 0 ? t - 1 : t + 1; }  // the step that forward made before t
  bool first_step(int64_t t, int64_t m) const { return d == 0 ? t == 0 : t + 1 == plan.length[m]; }
  bool fresh(int64_t t, int64_t m) const { return fresh_state(*plan.in, d, t, plan.order[m], plan.length[m]); }
};

constexpr int64_t kChunkRows = 256;  // steps of a chunk times B, where B is smaller

template <class S, int kGates, int kSplit>
class WeightGradients {
  using T = Compute<S>;
  using V = Vec<T>;
  using Slots = GateSlots<kGates, kSplit>;
  static constexpr bool kInPlace = sizeof(S) == sizeof(T);  // sums are made in the compute type

 public:
  static constexpr int kPanel = 3;        // column blocks at a time
  static constexpr int64_t kFewRows = 4;  // of a chunk: too few for tiles

  // Blocks of 16 elements in add's `columns`.
  static int64_t columns_size(const LayerPlan& plan) { return kPanel * max_of(kChunkRows, plan.in->B); }

  WeightGradients(const LayerPlan& plan, const LayerGradients& grad) : plan_(plan), in_(*plan.in), grad_(grad) {}

  void place(Arena& arena) {
    const int64_t rows = kGates * in_.H, sizes[4] = {rows * in_.I, rows * in_.H, rows, rows};
    for (int d = 0; d < in_.D; ++d) {
      const LayerGradients::Weights& out = grad_.weights[d];
      void* const outs[4] = {out.dw_ih, out.dw_hh, out.db_ih, out.db_hh};
      for (int i = 0; i < 4; ++i) {
        sums_[d][i] = kInPlace ? static_cast<T*>(outs[i]) : arena.take<T>(size_t(sizes[i]));
      }
    }
  }

  // Zeros for the units of the blocks `own`: there are no steps.
  void clear(int d, const Range& own) const {
    const int64_t first = own.begin * kBlock, units = min_of(own.end * kBlock, in_.H) - first;
    const int64_t widths[4] = {in_.I, in_.H, 1, 1};
    for (int64_t gate = 0; gate < kGates && units > 0; ++gate) {
      for (int i = 0; i < 4; ++i) {
        T* row = sums_[d][i] ? sums_[d][i] + (gate * in_.H + first) * widths[i] : nullptr;
        if (row) memset(row, 0, size_t(units * widths[i]) * sizeof(T));
      }
    }
  }

  // dW_hh += dgh^T h, dW_ih += dgx^T x, db += sums over a chunk's steps, for the units of the blocks `own`.
  // gates: [unit block][slot][chunk row][16], `stride` elements per slot; the other two are scratch memory.
  void add(int d, const Range& own, const Range& steps, const T* gates, int64_t stride, int64_t rows, T* columns,
           T* square) const {
    const bool first = steps.begin == 0;
    const auto slot_rows = [&](int64_t block, int slot) { return gates + (block * Slots::kCount + slot) * stride; };
    for (int64_t block = own.begin; block < own.end; ++block) {
      for (int gate = 0; gate < kGates; ++gate) {
        add_bias(sums_[d][2], slot_rows(block, Slots::of_dgx(gate)), block, gate, rows, first);
        add_bias(sums_[d][3], slot_rows(block, Slots::of_dgh(gate)), block, gate, rows, first);
      }
    }
    for (const bool hidden : {true, false}) {
      const int64_t width = hidden ? in_.H : in_.I, column_blocks = blocks_of(width);
      if (rows <= kFewRows && column_blocks * rows <= columns_size(plan_)) {
        for (int64_t i = 0; i < column_blocks; ++i) {
          gather_columns(d, hidden, steps, i * kBlock, columns + i * rows * kBlock);
        }
        for (int64_t block = own.begin; block < own.end; ++block) {
          for (int gate = 0; gate < kGates; ++gate) {
            add_rows(slot_rows(block, hidden ? Slots::of_dgh(gate) : Slots::of_dgx(gate)), columns, rows, width,
                     min_of(int64_t(kBlock), in_.H - block * kBlock),
                     sums_[d][hidden ? 1 : 0] + (gate * in_.H + block * kBlock) * width, first);
          }
        }
        continue;
      }
      const int64_t panels = (column_blocks + kPanel - 1) / kPanel;
      for (int64_t part = 0; part < panels; ++part) {
        const auto [panel, end] = piece({0, column_blocks}, panels, part);
        const int64_t count = end - panel;
        for (int64_t i = 0; i < count; ++i) {
          gather_columns(d, hidden, steps, (panel + i) * kBlock, columns + i * rows * kBlock);
        }
        for (int64_t block = own.begin; block < own.end; ++block) {
          const int64_t units = min_of(int64_t(kBlock), in_.H - block * kBlock);
          for (int gate = 0; gate < kGates; ++gate) {
            const T* from = slot_rows(block, hidden ? Slots::of_dgh(gate) : Slots::of_dgx(gate));
            const RowOperand<T> dgates{from, 1, int(rows), kBlock};
            T* to = sums_[d][hidden ? 1 : 0] + (gate * in_.H + block * kBlock) * width + panel * kBlock;
            if ((panel + count) * kBlock <= width) {
              gemm_transposed<T>(units, count, dgates, {columns, rows * kBlock},
                                 {to, kBlock, width, first ? Start::zero : Start::add});
              continue;
            }
            gemm_transposed<T>(units, count, dgates, {columns, rows * kBlock},
                               {square, kBlock * kBlock, kBlock, Start::zero});
            for (int64_t i = 0; i < count; ++i) {
              const int64_t valid = min_of(int64_t(kBlock), width - (panel + i) * kBlock);
              add_square(square + i * kBlock * kBlock, to + i * kBlock, width, units, valid, first);
            }
          }
        }
      }
    }
  }

  // Rounds the sums to storage.
  void finish() const {
    if (kInPlace) return;
    const int64_t rows = kGates * in_.H;
    for (int d = 0; d < in_.D; ++d) {
      const LayerGradients::Weights& out = grad_.weights[d];
      void* const outs[4] = {out.dw_ih, out.dw_hh, out.db_ih, out.db_hh};
      const int64_t sizes[4] = {rows * in_.I, rows * in_.H, rows, rows};
      for (int i = 0; i < 4; ++i) {
        if (outs[i]) convert_row(sums_[d][i], static_cast<S*>(outs[i]), sizes[i]);
      }
    }
  }

 private:
  static void add_square(const T* from, T* to, int64_t stride, int64_t rows, int64_t columns, bool first) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int j = 0; j < kBlock && j < columns; j += V::kLanes) {
        const int lanes = int(min_of(int64_t(V::kLanes), columns - j));
        const V sum = V::load(from + r * kBlock + j);
        T* at = to + r * stride + j;
        store_lanes(at, first ? sum : load_lanes(at, lanes) + sum, lanes);
      }
    }
  }

  // The sum over a few chunk rows, each row of the weights from end to end: what takes time is to write them.
  static void add_rows(const T* dgates, const T* columns, int64_t rows, int64_t width, int64_t units, T* to,
                       bool first) {
    for (int64_t unit = 0; unit < units; ++unit, to += width) {
      for (int64_t column = 0; column < width; column += V::kLanes) {
        const T* from = columns + (column / kBlock * rows) * kBlock + column % kBlock;
        V sum(T(0));
        for (int64_t r = 0; r < rows; ++r) sum = fma(V(dgates[r * kBlock + unit]), V::load(from + r * kBlock), sum);
        const int lanes = int(min_of(int64_t(V::kLanes), width - column));
        store_lanes(to + column, first ? sum : load_lanes(to + column, lanes) + sum, lanes);
      }
    }
  }

  void add_bias(T* sums, const T* from, int64_t block, int gate, int64_t rows, bool first) const {
    const int64_t units = in_.H - block * kBlock;
    if (!sums) return;
    for (int j = 0; j < kBlock && j < units; j += V::kLanes) {
      const int lanes = int(min_of(int64_t(V::kLanes), units - j));
      V sum(T(0));
      for (int64_t r = 0; r < rows; ++r) sum = sum + V::load(from + r * kBlock + j);
      T* at = sums + gate * in_.H + block * kBlock + j;
      store_lanes(at, first ? sum : load_lanes(at, lanes) + sum, lanes);
    }
  }

  // Sixteen columns of what a chunk's steps read, x or the h before each step: [chunk row][16].
  void gather_columns(int d, bool hidden, const Range& steps, int64_t column, T* to) const {
    const BackwardOrder order{plan_, d};
    const int64_t width = hidden ? in_.H : in_.I;
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      const int64_t t = order.time(step);
      for (int64_t m = 0; m < plan_.alive[t]; ++m, to += kBlock) {
        const int64_t b = plan_.order[m];
        const S* from;
        if (!hidden) {
          from = input_row<S>(plan_, t, m);
        } else if (order.fresh(t, m)) {
          memset(to, 0, kBlock * sizeof(T));
          continue;
        } else if (order.first_step(t, m)) {
          from = static_cast<const S*>(in_.h0) + (d * in_.B + b) * in_.H;
        } else {
          from = static_cast<const S*>(grad_.y) + (row_at(plan_, order.before(t), m) * in_.D + d) * in_.H;
        }
        for (int j = 0; j < kBlock; j += V::kLanes) {
          const int lanes = int(min_of(int64_t(V::kLanes), width - column - j));
          (lanes > 0 ? load_lanes(from + column + j, lanes) : V(T(0))).store(to + j);
          if (column + j + kPanel * kBlock < width) __builtin_prefetch(from + column + j + kPanel * kBlock);
        }
      }
    }
  }

  const LayerPlan& plan_;
  const LayerInputs& in_;
  const LayerGradients& grad_;
  T* sums_[2][4];  // [direction]: dw_ih [G*H, I], dw_hh [G*H, H], db_ih [G*H], db_hh [G*H]; null where not wanted
};

}  // namespace rnnkern::RNNKERN_ISA
