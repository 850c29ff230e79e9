// A layer for the tests of CUDA's engines: inputs, the reference in double, and the stepwise engine's kernels with
// products by plain loops in the place of torch's.
//
// The reference takes x and W_ih; here I = D G H and W_ih picks: then gx is x, and dx is dgx.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "cuda/launchers.h"
#include "emulator/emulator.h"
#include "reference_layer.h"

namespace rnnkern_test {

using namespace rnnkern;
using namespace rnnkern::cuda;

struct Case {
  int T, B, H, D;
  enum Rows { even, ragged, packed } rows;
  bool resets;
  double clip;
};

inline std::string describe(const Case& c) {
  const char* const rows[] = {"", " ragged", " packed"};
  return "T" + std::to_string(c.T) + " B" + std::to_string(c.B) + " H" + std::to_string(c.H) + " D" +
         std::to_string(c.D) + rows[c.rows] + (c.resets ? " resets" : "") + (c.clip > 0 ? " clip" : "");
}

template <class S>
constexpr Dtype kDtype = std::is_same_v<S, float>  ? Dtype::f32
                         : std::is_same_v<S, Bf16> ? Dtype::bf16
                                                   : Dtype::f16;
inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::f32 ? "float" : dtype == Dtype::bf16 ? "bfloat16" : "float16";
}

template <class S>
std::vector<S> stored(const Vector& from) {
  std::vector<S> to;
  for (double value : from) to.push_back(from_float<S>(float(value)));
  return to;
}
template <class S>
void round_to(Vector& values) {
  for (double& value : values) value = to_float(from_float<S>(float(value)));
}
template <class S>
std::vector<S> poisoned(size_t count) {
  std::vector<S> values(count);
  std::memset(static_cast<void*>(values.data()), 0xFF, count * sizeof(S));
  return values;
}

// A layer, its inputs and what the reference makes of them.
template <class Cell, class S>
struct Layer {
  static constexpr int G = Cell::kGates;
  static constexpr bool kCell = Cell::kStates > 1;
  Case c;
  Problem p;
  OutputGradients out;
  Result expected;
  std::vector<int64_t> offsets;
  int64_t N;
  std::vector<S> gx, w[2], b_ih[2], b_hh[2], h0, dy, dh_n;
  std::vector<float> c0, dc_n, dc_all;

  explicit Layer(const Case& c_) : c(c_) {
    const size_t states = size_t(c.D * c.B * c.H), rows = size_t(G * c.H), inputs = size_t(c.D) * rows;
    p.T = c.T, p.B = c.B, p.I = int64_t(inputs), p.H = c.H, p.D = c.D;
    for (int b = 0; b < c.B; ++b)
      p.lengths.push_back(c.rows == Case::even     ? c.T
                          : c.rows == Case::ragged ? (b * 7 + 3) % (c.T + 1)
                                                   : std::max(1, c.T - b));
    for (int i = 0; i < c.T * c.B && c.resets; ++i) p.resets.push_back(i * 5 % 7 == 0);
    const double scale = 1 / std::sqrt(double(c.H));
    p.x = random_vector<double>(size_t(c.T * c.B) * inputs, 1);
    p.h0 = random_vector<double>(states, 2);
    p.c0 = random_vector<double>(states, 3);
    out.dy = random_vector<double>(size_t(c.T * c.B * c.D * c.H), 4);
    out.dc_all = random_vector<double>(out.dy.size(), 5);
    out.dh_n = random_vector<double>(states, 6);
    out.dc_n = random_vector<double>(states, 7);
    for (Vector* v : {&p.x, &p.h0, &out.dy, &out.dh_n}) round_to<S>(*v);
    for (Vector* v : {&p.c0, &out.dc_n, &out.dc_all}) round_to<float>(*v);
    for (int d = 0; d < c.D; ++d) {
      p.w_ih[d].assign(rows * inputs, 0.0);
      for (size_t row = 0; row < rows; ++row) p.w_ih[d][row * inputs + size_t(d) * rows + row] = 1;
      p.w_hh[d] = random_vector<double>(rows * size_t(c.H), unsigned(8 + d), scale);
      p.b_ih[d] = random_vector<double>(rows, unsigned(10 + d), scale);
      p.b_hh[d] = random_vector<double>(rows, unsigned(12 + d), scale);
      for (Vector* v : {&p.w_hh[d], &p.b_ih[d], &p.b_hh[d]}) round_to<S>(*v);
      w[d] = stored<S>(p.w_hh[d]);
      b_ih[d] = stored<S>(p.b_ih[d]);
      b_hh[d] = stored<S>(p.b_hh[d]);
    }
    if (c.clip <= 0) expected = reference_layer<Cell>(p, out);  // which does not clip
    for (int t = 0, n = 0; c.rows == Case::packed && t <= c.T; ++t) {
      offsets.push_back(n);
      for (int b = 0; b < c.B; ++b) n += t < p.lengths[size_t(b)];
    }
    N = c.rows == Case::packed ? offsets.back() : c.T * c.B;
    gx = stored<S>(gathered(p.x, int(inputs)));
    dy = stored<S>(gathered(out.dy, c.D * c.H));
    dc_all = stored<float>(gathered(out.dc_all, c.D * c.H));
    h0 = stored<S>(p.h0);
    dh_n = stored<S>(out.dh_n);
    c0 = stored<float>(p.c0);
    dc_n = stored<float>(out.dc_n);
  }

  int64_t place(int t, int b) const { return offsets.empty() ? t * c.B + b : offsets[size_t(t)] + b; }
  // From [T, B, columns] to [N, columns].
  Vector gathered(const Vector& from, int columns) const {
    Vector to(size_t(N * columns));
    for (int t = 0; t < c.T; ++t) {
      for (int b = 0; b < c.B; ++b) {
        if (c.rows == Case::packed && t >= p.lengths[size_t(b)]) continue;
        for (int i = 0; i < columns; ++i)
          to[size_t(place(t, b) * columns + i)] = from[size_t((t * c.B + b) * columns + i)];
      }
    }
    return to;
  }
  Sequence sequence() const {
    return {c.T,
            N,
            c.B,
            c.D,
            c.rows == Case::even ? nullptr : p.lengths.data(),
            offsets.empty() ? nullptr : offsets.data(),
            c.resets ? p.resets.data() : nullptr};
  }
};

template <class Cell, class S>
struct ForwardResult {
  std::vector<S> y, h_n, saved;
  std::vector<float> c_n, c_all, c_before;
};
template <class S>
struct BackwardResult {
  std::vector<S> dgx, dgh;
  std::vector<float> dh0, dc0;
};

// Tells the emulator of every vector.
template <class... Vectors>
void allow(emulator::GlobalMemory& memory, const Vectors&... vectors) {
  (memory.add(vectors.data(), vectors.size() * sizeof(vectors[0])), ...);
}
template <class Cell, class S>
void allow_layer(emulator::GlobalMemory& memory, const Layer<Cell, S>& l) {
  allow(memory, l.gx, l.w[0], l.w[1], l.b_ih[0], l.b_ih[1], l.b_hh[0], l.b_hh[1], l.h0, l.dy, l.dh_n, l.c0, l.dc_n,
        l.dc_all, l.p.lengths, l.p.resets, l.offsets);
}

// run(arguments) computes; types as the launchers take them.
template <class Cell, class S, class Run>
ForwardResult<Cell, S> forward(Layer<Cell, S>& l, const Run& run) {
  const size_t states = l.h0.size(), outputs = size_t(l.N * l.c.D * l.c.H);
  ForwardResult<Cell, S> r{poisoned<S>(outputs),    poisoned<S>(states),      poisoned<S>(outputs * Cell::kSaved),
                           poisoned<float>(states), poisoned<float>(outputs), poisoned<float>(outputs)};
  emulator::GlobalMemory memory;
  allow_layer(memory, l);
  allow(memory, r.y, r.h_n, r.saved, r.c_n, r.c_all, r.c_before);
  const bool cell = Cell::kStates > 1;
  run(Forward<void, void>{l.sequence(),
                          l.c.H,
                          l.gx.data(),
                          {l.w[0].data(), l.w[1].data()},
                          {l.b_ih[0].data(), l.b_ih[1].data()},
                          {l.b_hh[0].data(), l.b_hh[1].data()},
                          l.h0.data(),
                          cell ? l.c0.data() : nullptr,
                          r.y.data(),
                          r.h_n.data(),
                          cell ? r.c_n.data() : nullptr,
                          cell ? r.c_all.data() : nullptr,
                          r.saved.data(),
                          cell ? r.c_before.data() : nullptr});
  return r;
}

template <class Cell, class S, class Run>
BackwardResult<S> backward(Layer<Cell, S>& l, const ForwardResult<Cell, S>& f, const std::vector<S>& h_before,
                           const Run& run) {
  const size_t gates = size_t(l.N * l.c.D * l.c.H) * Cell::kGates;
  const bool cell = Cell::kStates > 1, split = Cell::kSplitGates > 0;
  BackwardResult<S> r{poisoned<S>(gates), poisoned<S>(gates), poisoned<float>(l.h0.size()),
                      poisoned<float>(l.h0.size())};
  emulator::GlobalMemory memory;
  allow_layer(memory, l);
  allow(memory, f.saved, f.c_before, h_before, r.dgx, r.dgh, r.dh0, r.dc0);
  run(Backward<void, void>{l.sequence(),
                           l.c.H,
                           {l.w[0].data(), l.w[1].data()},
                           l.dy.data(),
                           l.dh_n.data(),
                           cell ? l.dc_n.data() : nullptr,
                           nullptr,
                           cell ? l.dc_all.data() : nullptr,
                           f.saved.data(),
                           cell ? f.c_before.data() : nullptr,
                           h_before.data(),
                           l.c.clip,
                           split ? r.dgx.data() : r.dgh.data(),
                           r.dgh.data(),
                           r.dh0.data(),
                           cell ? r.dc0.data() : nullptr});
  if (!split) r.dgx = r.dgh;
  return r;
}

// What torch does between the stepwise engine's kernels: out[d, b, m] = sum over k of a[d, b, k] w[d][m, k] or [k, m].
template <class Cell, class S>
void multiply(const Layer<Cell, S>& l, const std::vector<S>& a, int K, int M, bool transposed,
              std::vector<float>& out) {
  for (int64_t row = 0; row < l.c.D * l.c.B; ++row) {
    const std::vector<S>& w = l.w[row / l.c.B];
    for (int64_t m = 0; m < M; ++m) {
      float sum = 0;
      for (int64_t k = 0; k < K; ++k)
        sum += to_float(a[size_t(row * K + k)]) * to_float(w[size_t(transposed ? k * M + m : m * K + k)]);
      out[size_t(row * M + m)] = sum;
    }
  }
}

template <class Cell, class S>
void run_stepwise(const Layer<Cell, S>& l, const CellLaunchers& launchers, const Forward<void, void>& f) {
  const int G = Cell::kGates, H = l.c.H;
  std::vector<S> h = poisoned<S>(l.h0.size());
  std::vector<float> c = poisoned<float>(l.h0.size()), gh = poisoned<float>(l.h0.size() * G);
  emulator::GlobalMemory memory;
  allow(memory, h, c, gh);
  StepForward<void, void> a{f, 0, h.data(), Cell::kStates > 1 ? c.data() : nullptr, gh.data()};
  launchers.stepwise.begin(a, nullptr);
  for (; a.step < f.sequence.T; ++a.step) {
    multiply(l, h, H, G * H, false, gh);
    launchers.stepwise.next_step(a, nullptr);
  }
}
template <class Cell, class S>
ForwardResult<Cell, S> stepwise_forward(Layer<Cell, S>& l, const CellLaunchers& launchers) {
  return forward(l, [&](const Forward<void, void>& f) { run_stepwise(l, launchers, f); });
}

template <class Cell, class S>
void run_stepwise(const Layer<Cell, S>& l, const CellLaunchers& launchers, const Backward<void, void>& b) {
  const int G = Cell::kGates, H = l.c.H;
  std::vector<S> dgh = poisoned<S>(l.h0.size() * G);
  std::vector<float> product = poisoned<float>(l.h0.size()), direct = product, dc = product;
  emulator::GlobalMemory memory;
  allow(memory, dgh, product, direct, dc);
  StepBackward<void, void> a{
      b, b.sequence.T, dgh.data(), product.data(), direct.data(), Cell::kStates > 1 ? dc.data() : nullptr};
  while (a.step-- > 0) {
    launchers.stepwise.step_backward(a, nullptr);
    multiply(l, dgh, G * H, H, true, product);
  }
  launchers.stepwise.end_backward(a, nullptr);
}
template <class Cell, class S>
BackwardResult<S> stepwise_backward(Layer<Cell, S>& l, const ForwardResult<Cell, S>& f, const std::vector<S>& h_before,
                                    const CellLaunchers& launchers) {
  return backward(l, f, h_before, [&](const Backward<void, void>& b) { run_stepwise(l, launchers, b); });
}

}  // namespace rnnkern_test
