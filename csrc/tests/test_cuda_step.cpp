// The fused steps, emulated, against the definition in double: sizes that fit nothing, alignments, lengths, schedules.
#include <algorithm>
#include <cstring>

#include "check_emulator.h"
#include "cuda/layer.h"
#include "cuda/step_launch.cuh"
#include "reference_layer.h"
#include "rnnkern_cells.h"
#include "rnnkern_lists.h"

using namespace rnnkern_test;
using namespace rnnkern::cuda;

namespace {

// Random values that S can hold, from an address that is `offset` elements past an aligned one.
template <class S>
struct Array {
  Global<S> memory;
  S* data;
  Vector values;
  Array(size_t count, unsigned seed, double scale, int offset)
      : memory(count + size_t(offset), from_float<S>(0.0f)), data(memory.data() + offset) {
    for (double value : random_vector<double>(count, seed, scale)) {
      data[values.size()] = from_float<S>(float(value));
      values.push_back(double(to_float(data[values.size()])));
    }
  }
};
template <class S>
Global<S> poisoned(size_t count) {
  return Global<S>(count, from_float<S>(std::nanf("")));
}

template <class S>
double tolerance_of(double largest) {
  const double rounding = sizeof(S) == 4 ? 0.0 : std::is_same_v<S, Bf16> ? 1.0 / 256 : 1.0 / 2048;
  return rounding * largest + 3e-6;
}
template <class S>
void check_near(const char* name, const S* actual, const Vector& expected) {
  double error = 0.0, largest = 1.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(double(to_float(actual[i])) - expected[i]);
    error = difference > error || std::isnan(difference) ? difference : error;
    largest = std::max(largest, std::abs(expected[i]));
    if (std::isnan(error)) break;
  }
  CHECK(error <= tolerance_of<S>(largest), "%s is off by %g", name, error);
}

struct Size {
  int B, I, H;
  int offset = 0;
  bool bias = true;
};

template <class Cell, class S>
struct CellProblem {
  static constexpr int G = Cell::kGates;
  Size size;
  Array<S> x, h, w_ih, w_hh, b_ih, b_hh;
  Array<float> c;
  Global<S> h_next;
  Global<float> c_next;

  explicit CellProblem(const Size& s)
      : size(s),
        x(size_t(s.B * s.I), 1, 1.0, s.offset),
        h(size_t(s.B * s.H), 2, 0.5, s.offset),
        w_ih(size_t(G * s.H * s.I), 3, 1 / std::sqrt(s.I), s.offset),
        w_hh(size_t(G * s.H * s.H), 4, 1 / std::sqrt(s.H), s.offset),
        b_ih(size_t(G * s.H), 5, 0.5, 0),
        b_hh(size_t(G * s.H), 6, 0.5, 0),
        c(size_t(s.B * s.H), 7, 1.0, 0),
        h_next(poisoned<S>(size_t(s.B * s.H))),
        c_next(poisoned<float>(size_t(s.B * s.H))) {}

  bool two_states() const { return Cell::kStates > 1; }
  // Of the rows from `first` on.
  CellStep<S> arguments(int first, int count) {
    const int64_t state = int64_t(first) * size.H;
    return {count,
            size.I,
            size.H,
            x.data + first * size.I,
            h.data + state,
            two_states() ? c.data + state : nullptr,
            w_ih.data,
            w_hh.data,
            size.bias ? b_ih.data : nullptr,
            size.bias ? b_hh.data : nullptr,
            h_next.data() + state,
            two_states() ? c_next.data() + state : nullptr};
  }
  CellStep<S> arguments() { return arguments(0, size.B); }

  Result expected() const {
    Problem p{};
    p.T = 1;
    p.B = size.B;
    p.I = size.I;
    p.H = size.H;
    p.D = 1;
    p.lengths.assign(size_t(size.B), 1);
    p.x = x.values;
    p.h0 = h.values;
    p.c0 = c.values;
    p.w_ih[0] = w_ih.values;
    p.w_hh[0] = w_hh.values;
    p.b_ih[0] = size.bias ? b_ih.values : Vector(b_ih.values.size(), 0.0);
    p.b_hh[0] = size.bias ? b_hh.values : Vector(b_hh.values.size(), 0.0);
    const Vector states(h.values.size(), 0.0);
    return reference_layer<Cell>(p, {states, states, states, states});
  }
  void check(const Result& expected) const {
    check_near("h'", h_next.values.data(), expected.h_n);
    if (two_states()) check_near("c'", c_next.values.data(), expected.c_n);
  }
};

template <class Cell, class S>
void test_cell() {
  const Size sizes[] = {{1, 1, 1},      {1, 40, 24},  {3, 17, 33},         {9, 64, 16},
                        {1, 64, 16, 1}, {2, 1200, 9}, {17, 3, 5, 0, false}};
  for (const Size& size : sizes) {
    CellProblem<Cell, S> problem(size);
    const Result expected = problem.expected();
    std::vector<S> first;
    for (unsigned seed : {0, 1, 2}) {
      emulator::set_seed(seed);
      problem.h_next.values.assign(problem.h_next.values.size(), from_float<S>(std::nanf("")));
      const CellStep<S> step = problem.arguments();
      launch_step<Cell, S, CellStep>(typed<CellStep<void>>(step), nullptr);
      problem.check(expected);
      if (first.empty()) first = problem.h_next.values;
      CHECK(std::memcmp(first.data(), problem.h_next.data(), first.size() * sizeof(S)) == 0, "seeds differ");
    }
    // A row alone gives the same bits, where its address is as aligned as in the batch.
    if (size.offset == 0 && size.I * sizeof(S) % 16 == 0 && size.H * sizeof(S) % 16 == 0) {
      for (int b = 0; b < size.B; ++b) {
        const CellStep<S> step = problem.arguments(b, 1);
        launch_step<Cell, S, CellStep>(typed<CellStep<void>>(step), nullptr);
      }
      CHECK(std::memcmp(first.data(), problem.h_next.data(), first.size() * sizeof(S)) == 0, "rows differ");
    }
  }
  // c may be written in place, h may not.
  CellProblem<Cell, S> problem({2, 4, 8});
  const Result expected = problem.expected();
  CellStep<S> step = problem.arguments();
  if (problem.two_states()) step.c_next = problem.c.data;
  launch_step<Cell, S, CellStep>(typed<CellStep<void>>(step), nullptr);
  check_near("h'", problem.h_next.data(), expected.h_n);
  if (problem.two_states()) check_near("c' in place", problem.c.data, expected.c_n);
  step.h_next = problem.h.data;
  bool refused = false;
  try {
    launch_step<Cell, S, CellStep>(typed<CellStep<void>>(step), nullptr);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused, "h is written in place");
}

struct AttentionSize {
  Size cell;
  int64_t Tk;
  int D, Dv;
  bool additive, projected;
  bool time_first = false;  // keys and values [Tk, B, ...]
};

template <class Cell, class S>
struct AttentionProblem {
  AttentionSize size;
  CellProblem<Cell, S> cell;
  Array<S> w_query, key, value, vector;
  Global<int64_t> lengths;
  Global<S> context;
  Global<float> query, parts;
  Global<unsigned> counters;
  float scale = 0.7f;

  explicit AttentionProblem(const AttentionSize& s)
      : size(s),
        cell(s.cell),
        w_query(size_t(s.D * s.cell.H), 11, 1.0, s.cell.offset),
        key(size_t(s.cell.B * s.Tk * s.D), 12, 1.0, s.cell.offset),
        value(size_t(s.cell.B * s.Tk * s.Dv), 13, 1.0, s.cell.offset),
        vector(size_t(s.D), 14, 1.0, s.cell.offset),
        lengths(size_t(s.cell.B), s.Tk),
        context(poisoned<S>(size_t(s.cell.B * s.Dv))),
        query(poisoned<float>(size_t(s.cell.B * s.D))),
        parts(poisoned<float>(size_t(s.cell.B * step_splits(s.Tk) * (s.Dv + 2)))),
        counters(size_t(step_counters(s.cell.B)), 0u) {
    for (int b = 1; b < s.cell.B; ++b) lengths[size_t(b)] = (b * 37 - 37) % (s.Tk + 1);  // row 1 has none
    for (int64_t b = 0; b < s.cell.B; ++b) {                                             // padding is never read
      for (int64_t k = lengths[size_t(b)]; k < s.Tk; ++k) {
        for (int d = 0; d < s.D; ++d) key.data[place(b, k) * s.D + d] = from_float<S>(std::nanf(""));
        for (int d = 0; d < s.Dv; ++d) value.data[place(b, k) * s.Dv + d] = from_float<S>(std::nanf(""));
      }
    }
    lengths[0] = s.Tk + 5;  // taken as Tk
  }
  int64_t place(int64_t b, int64_t k) const { return size.time_first ? k * size.cell.B + b : b * size.Tk + k; }

  StepRows<S> rows(const S* data, int columns) const {
    if (size.time_first) return {data, columns, int64_t(size.cell.B) * columns};
    return {data, size.Tk * columns, columns};
  }
  AttentionStep<S> arguments() {
    return {cell.arguments(),
            size.Tk,
            size.D,
            size.Dv,
            size.projected ? w_query.data : nullptr,
            rows(key.data, size.D),
            rows(value.data, size.Dv),
            size.additive ? vector.data : nullptr,
            scale,
            lengths.data(),
            context.data(),
            query.data(),
            parts.data(),
            counters.data()};
  }

  // From the h' that the kernel gave: its rounding is its own matter.
  Vector expected() const {
    Vector result;
    for (int64_t b = 0; b < size.cell.B; ++b) {
      const S* const h = cell.h_next.values.data() + b * size.cell.H;
      Vector q(size_t(size.D), 0.0), weights, row(size_t(size.Dv), 0.0);
      for (int d = 0; d < size.D; ++d) {
        if (!size.projected) q[size_t(d)] = double(to_float(h[d]));
        for (int u = 0; size.projected && u < size.cell.H; ++u)
          q[size_t(d)] += w_query.values[size_t(d * size.cell.H + u)] * double(to_float(h[u]));
      }
      const int64_t length = std::min(lengths.values[size_t(b)], size.Tk);
      double sum = 0.0, largest = -1e300;
      for (int64_t k = 0; k < length; ++k) {
        double score = 0.0;
        for (int d = 0; d < size.D; ++d) {
          const double element = key.values[size_t(place(b, k) * size.D + d)];
          score += size.additive ? vector.values[size_t(d)] * std::tanh(q[size_t(d)] + element)
                                 : double(scale) * q[size_t(d)] * element;
        }
        weights.push_back(score);
        largest = std::max(largest, score);
      }
      for (double& weight : weights) sum += weight = std::exp(weight - largest);
      for (int64_t k = 0; k < length; ++k) {
        for (int d = 0; d < size.Dv; ++d)
          row[size_t(d)] += weights[size_t(k)] / sum * value.values[size_t(place(b, k) * size.Dv + d)];
      }
      result.insert(result.end(), row.begin(), row.end());
    }
    return result;
  }

  // With fewer blocks than the launcher would take, each has several jobs.
  template <int kRows>
  void launch_few(int blocks) {
    LaunchShape shape{blocks, step::kThreads, step::kAttentionShared<Cell, kRows, S>};
    shape.cooperative = true;
    launch("attention_step", step::attention_step<Cell, kRows, S>, shape, arguments(), nullptr);
  }
};

template <class Cell, class S>
void test_attention(const AttentionSize& size, unsigned seeds) {
  AttentionProblem<Cell, S> problem(size);
  const Result expected = problem.cell.expected();
  std::vector<S> first;
  for (unsigned seed = 0; seed < seeds; ++seed) {
    emulator::set_seed(seed);
    problem.context.values.assign(problem.context.values.size(), from_float<S>(std::nanf("")));
    if (seed == 0) {
      const AttentionStep<S> step = problem.arguments();
      launch_step<Cell, S, AttentionStep>(typed<AttentionStep<void>>(step), nullptr);
    } else if (size.cell.B == 1) {
      problem.template launch_few<1>(2);
    } else {
      problem.template launch_few<step::kMostRows>(int(seed) + 1);
    }
    problem.cell.check(expected);
    check_near("context", problem.context.data(), problem.expected());
    for (unsigned count : problem.counters.values) CHECK(count == 0, "a counter is left at %u", count);
    if (first.empty()) first = problem.context.values;
    CHECK(std::memcmp(first.data(), problem.context.data(), first.size() * sizeof(S)) == 0, "launches differ");
  }
}

template <class Cell, class S>
void test_attentions() {
  const AttentionSize sizes[] = {
      {{1, 16, 24}, 100, 24, 40, false, false},     // aligned rows
      {{3, 5, 7}, 70, 7, 9, false, false, true},    // elements
      {{2, 8, 9}, 33, 16, 300, true, true},         // several stretches of values
      {{1, 8, 16, 1}, 31, 16, 16, true, false},     // nothing aligned, one part
      {{10, 4, 5}, 40, 600, 8, false, true, true},  // two tiles of rows, several stretches of keys
      {{2, 3, 4}, 0, 4, 5, false, false},           // no keys
  };
  for (const AttentionSize& size : sizes) test_attention<Cell, S>(size, 3);
}

}  // namespace

int main() {
#define RNNKERN_TEST_STEP(cell, Struct) \
  test_cell<rnnkern::Struct, float>();  \
  test_cell<rnnkern::Struct, Bf16>();   \
  test_cell<rnnkern::Struct, F16>();
  RNNKERN_FOR_EACH_CELL(RNNKERN_TEST_STEP)
  test_attentions<rnnkern::Lstm, float>();
  test_attentions<rnnkern::Gru, Bf16>();
  test_attentions<rnnkern::Gru, F16>();
  test_attention<rnnkern::RnnTanh, float>({{3, 5, 7}, 70, 7, 9, true, false}, 8);
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
