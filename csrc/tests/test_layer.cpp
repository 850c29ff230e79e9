// The engines against the reference in double: every cell, both directions, lengths, resets, odd sizes, every gradient;
// and the same bits for any number of threads. 16-bit storage is compared more loosely, and outputs only: rounding h
// moves the gradients too far for one tolerance (the Python tests hold them against torch's). So are int8 weights,
// whose rounded values the reference has too.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "cpu/layer.h"
#include "cpu/workspace.h"
#include "reference_layer.h"
#include "rnnkern_cells.h"
#include "rnnkern_lists.h"

using namespace rnnkern;
using namespace rnnkern_test;

// Storage types: of 16 bits, only such values are stored as have no more than 8 significant bits and 2^-6 < |x| < 4.
double value_of(double x) { return x; }
double value_of(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
double value_of(Float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();
  const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return x.bits >> 15 ? -magnitude : magnitude;
}
double coarse(double x) { return std::min(255.0, std::max(-255.0, std::round(x * 64))) / 64; }
template <class S>
S stored(double x) {
  return S(x);
}
template <>
Bfloat16 stored<Bfloat16>(double x) {
  const float value = float(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {uint16_t(bits >> 16)};
}
template <>
Float16 stored<Float16>(double x) {
  const float value = float(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t magnitude = bits & 0x7fffffff;
  return {uint16_t((bits >> 16 & 0x8000) | (magnitude ? (magnitude >> 13) - (112 << 10) : 0))};
}
template <class S>
constexpr Dtype kDtype = sizeof(S) == 8 ? Dtype::f64 : Dtype::f32;
template <>
constexpr Dtype kDtype<Bfloat16> = Dtype::bf16;
template <>
constexpr Dtype kDtype<Float16> = Dtype::f16;
// Largest error, relative to the largest value.
template <class S>
constexpr double kTolerance = sizeof(S) == 8 ? 1e-12 : 1e-5;
template <>
constexpr double kTolerance<Bfloat16> = 2e-2;
template <>
constexpr double kTolerance<Float16> = 2.5e-3;

// Rounding moves x by up to 4 / 65534 here; 300 of them times weights of 1/7 make 8e-5, five times that is not met.
constexpr double kInt8Tolerance = 4e-4;

template <class S>
struct Buffers {  // a call's tensors, every output poisoned with NaN
  using C = std::conditional_t<sizeof(S) == 8, double, float>;
  std::vector<S> x, h0, weights[8], y, h_n, dx, dh0, dw[8];
  std::vector<C> c0, c_n, c_all, saved, dc0;
};

template <class S>
std::vector<S> narrowed(const Vector& from) {
  std::vector<S> to;
  for (double x : from) to.push_back(stored<S>(x));
  return to;
}
template <class S>
std::vector<S> poisoned(size_t count) {
  std::vector<S> values(count);
  if (count > 0) std::memset(values.data(), 0xff, count * sizeof(S));
  return values;
}

template <class T>
void check_close(const std::string& what, const std::vector<T>& actual, const Vector& expected, double tolerance) {
  if (kSanitized) return;
  double scale = 1, error = 0;
  bool finite = actual.size() == expected.size();
  for (size_t i = 0; i < expected.size() && finite; ++i) {
    scale = std::max(scale, std::abs(expected[i]));
    error = std::max(error, std::abs(value_of(actual[i]) - expected[i]));
    finite = std::isfinite(value_of(actual[i]));
  }
  CHECK(finite && error < scale * tolerance, "%s: error %.3g at scale %.3g", what.c_str(), error, scale);
}

template <class T>
void check_same(const std::string& what, const std::vector<T>& a, const std::vector<T>& b) {
  CHECK(a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0),
        "%s: not the same bits", what.c_str());
}

// Null where all rows have every step: the engines divide such rows otherwise.
const int64_t* lengths_of(const Problem& p) {
  const bool all = std::all_of(p.lengths.begin(), p.lengths.end(), [&](int64_t n) { return n == p.T; });
  return all ? nullptr : p.lengths.data();
}

template <class T>
Buffers<T> run_layer(int cell, const Problem& p, const OutputGradients& out, const ParallelFor& parallel) {
  const bool two_states = cell_traits()[size_t(cell)].states > 1;
  using C = typename Buffers<T>::C;
  Buffers<T> b;
  b.x = narrowed<T>(p.x);
  b.h0 = narrowed<T>(p.h0);
  b.c0 = narrowed<C>(p.c0);
  LayerInputs in{};
  in.dtype = kDtype<T>;
  in.T = p.T, in.B = p.B, in.I = p.I, in.H = p.H, in.D = p.D;
  in.x = b.x.data();
  in.x_time = p.B * p.I;
  in.x_batch = p.I;
  in.h0 = b.h0.data();
  in.c0 = two_states ? b.c0.data() : nullptr;
  in.lengths = lengths_of(p);
  in.resets = p.resets.empty() ? nullptr : p.resets.data();
  for (int d = 0; d < p.D; ++d) {
    const Vector* from[4] = {&p.w_ih[d], &p.w_hh[d], &p.b_ih[d], &p.b_hh[d]};
    for (int i = 0; i < 4; ++i) {
      b.weights[4 * d + i] = narrowed<T>(*from[i]);
      b.dw[4 * d + i] = poisoned<T>(from[i]->size());
    }
    in.weights[d] = {b.weights[4 * d].data(), b.weights[4 * d + 1].data(), b.weights[4 * d + 2].data(),
                     b.weights[4 * d + 3].data()};
  }
  const size_t sequence = size_t(p.T * p.B * p.D * p.H);
  b.y = poisoned<T>(sequence);
  b.c_all = poisoned<C>(sequence);
  b.h_n = poisoned<T>(p.h0.size());
  b.c_n = poisoned<C>(p.h0.size());
  b.saved = poisoned<C>(size_t(saved_size(cell, in)));
  b.dx = poisoned<T>(p.x.size());
  b.dh0 = poisoned<T>(p.h0.size());
  b.dc0 = poisoned<C>(p.h0.size());
  C *c_n = two_states ? b.c_n.data() : nullptr, *c_all = two_states ? b.c_all.data() : nullptr;
  layer_forward(cell, in, {b.y.data(), b.h_n.data(), c_n, c_all, b.saved.data()}, parallel);
  if (parallel.awake) {  // which counts without gradients
    const std::vector<T> y = b.y;
    b.y = poisoned<T>(sequence);
    layer_forward(cell, in, {b.y.data(), b.h_n.data(), c_n, c_all, nullptr}, parallel);
    check_same("inference", y, b.y);
  }
  const std::vector<T> dy = narrowed<T>(out.dy), dh_n = narrowed<T>(out.dh_n);
  const std::vector<C> dc_n = narrowed<C>(out.dc_n), dc_all = narrowed<C>(out.dc_all);
  LayerGradients grad{};
  grad.dy = dy.data();
  grad.dh_n = dh_n.data();
  grad.dc_n = two_states ? dc_n.data() : nullptr;
  grad.dc_all = two_states ? dc_all.data() : nullptr;
  grad.y = b.y.data();
  grad.saved = b.saved.data();
  grad.dx = b.dx.data();
  grad.dh0 = b.dh0.data();
  grad.dc0 = two_states ? b.dc0.data() : nullptr;
  for (int d = 0; d < p.D; ++d) {
    grad.weights[d] = {b.dw[4 * d].data(), b.dw[4 * d + 1].data(), b.dw[4 * d + 2].data(), b.dw[4 * d + 3].data()};
  }
  grad.need_dw = true;
  grad.clip = p.clip;
  layer_backward(cell, in, grad, parallel);
  return b;
}

struct Case {
  int64_t T, B, I, H;
  int D;
  bool lengths, resets;
  double clip = 0;
};

template <class Cell>
Problem make_problem(const Case& c, unsigned seed) {
  Problem p{c.T, c.B, c.I, c.H, c.D, {}, {}, {}, {}, {}, {}, {}, {}, {}, c.clip};
  for (int64_t b = 0; b < c.B; ++b) p.lengths.push_back(c.lengths ? (b * 7 + 3) % (c.T + 1) : c.T);
  if (c.resets) {
    for (int64_t i = 0; i < c.T * c.B; ++i) p.resets.push_back(i * 5 % 7 == 0);
  }
  const double scale = 1 / std::sqrt(double(c.H));
  p.x = random_vector<double>(size_t(c.T * c.B * c.I), seed);
  p.h0 = random_vector<double>(size_t(c.D * c.B * c.H), seed + 1);
  p.c0 = random_vector<double>(p.h0.size(), seed + 2);
  for (int d = 0; d < c.D; ++d) {
    const size_t rows = size_t(Cell::kGates * c.H);
    p.w_ih[d] = random_vector<double>(rows * size_t(c.I), seed + 3 + d, scale);
    p.w_hh[d] = random_vector<double>(rows * size_t(c.H), seed + 5 + d, scale);
    p.b_ih[d] = random_vector<double>(rows, seed + 7 + d, scale);
    p.b_hh[d] = random_vector<double>(rows, seed + 9 + d, scale);
  }
  return p;
}

std::string words(const std::string& name, const Case& c) {
  return name + " T" + std::to_string(c.T) + " B" + std::to_string(c.B) + " I" + std::to_string(c.I) + " H" +
         std::to_string(c.H) + " D" + std::to_string(c.D) + (c.lengths ? " lengths" : "") +
         (c.resets ? " resets" : "") + (c.clip > 0 ? " clip" : "");
}

template <class Cell, class T>
void check_case(const std::string& name, const Case& c) {
  const int cell = find_cell(name);
  const unsigned seed = unsigned(c.T * 1000 + c.H);
  Problem p = make_problem<Cell>(c, seed);
  OutputGradients out;
  out.dy = random_vector<double>(size_t(c.T * c.B * c.D * c.H), seed + 11);
  out.dc_all = random_vector<double>(out.dy.size(), seed + 12);
  // Where no step is, no gradient comes from it.
  for (int64_t t = 0; t < c.T; ++t) {
    for (int64_t b = 0; b < c.B; ++b) {
      for (int64_t i = 0; i < c.D * c.H && t >= p.lengths[b]; ++i) out.dy[(t * c.B + b) * c.D * c.H + i] = 1e30;
    }
  }
  out.dh_n = random_vector<double>(p.h0.size(), seed + 13);
  out.dc_n = random_vector<double>(p.h0.size(), seed + 14);
  // The engines read T: the reference starts from the same rounded values.
  if (sizeof(T) < 8) {
    for (Vector* v : {&p.x, &p.h0, &p.c0, &p.w_ih[0], &p.w_ih[1], &p.w_hh[0], &p.w_hh[1], &p.b_ih[0], &p.b_ih[1],
                      &p.b_hh[0], &p.b_hh[1], &out.dy, &out.dc_all, &out.dh_n, &out.dc_n}) {
      for (double& value : *v) value = sizeof(T) == 2 ? coarse(value) : float(value);
    }
  }
  Result expected;
  if (!kSanitized) expected = reference_layer<Cell>(p, out);
  const Buffers<T> one = run_layer<T>(cell, p, out, {run_in_turn, 1});
  const std::string where = words(name, c) + (kDtype<T> == Dtype::f64    ? " double "
                                              : kDtype<T> == Dtype::bf16 ? " bfloat16 "
                                              : kDtype<T> == Dtype::f16  ? " float16 "
                                                                         : " float ");
  const bool two_states = Cell::kStates > 1;
  check_close(where + "y", one.y, expected.y, kTolerance<T>);
  check_close(where + "h_n", one.h_n, expected.h_n, kTolerance<T>);
  if (two_states) {
    check_close(where + "c_n", one.c_n, expected.c_n, kTolerance<T>);
    check_close(where + "c_all", one.c_all, expected.c_all, kTolerance<T>);
  }
  if (sizeof(T) > 2) {
    check_close(where + "dx", one.dx, expected.dx, kTolerance<T>);
    check_close(where + "dh0", one.dh0, expected.dh0, kTolerance<T>);
    if (two_states) check_close(where + "dc0", one.dc0, expected.dc0, kTolerance<T>);
    for (int d = 0; d < c.D; ++d) {
      check_close(where + "dw_ih", one.dw[4 * d], expected.dw_ih[d], kTolerance<T>);
      check_close(where + "dw_hh", one.dw[4 * d + 1], expected.dw_hh[d], kTolerance<T>);
      check_close(where + "db_ih", one.dw[4 * d + 2], expected.db_ih[d], kTolerance<T>);
      check_close(where + "db_hh", one.dw[4 * d + 3], expected.db_hh[d], kTolerance<T>);
    }
  }
  for (const ParallelFor& parallel :
       {ParallelFor{run_on_threads, 2}, ParallelFor{run_on_threads, 3}, ParallelFor{run_on_threads, 4},
        ParallelFor{run_on_threads, 2, true}, ParallelFor{run_in_turn, 2}}) {
    const Buffers<T> other = run_layer<T>(cell, p, out, parallel);
    const std::string threads = where + std::to_string(parallel.threads) + " threads ";
    check_same(threads + "y", one.y, other.y);
    check_same(threads + "h_n", one.h_n, other.h_n);
    check_same(threads + "dx", one.dx, other.dx);
    check_same(threads + "dh0", one.dh0, other.dh0);
    if (two_states) check_same(threads + "dc0", one.dc0, other.dc0);
    for (int i = 0; i < 4 * c.D; ++i) check_same(threads + "dw", one.dw[i], other.dw[i]);
  }
}

// A matrix whose rows are int8 times a scale, which is what it holds from then on.
struct Int8Matrix {
  std::vector<int8_t> values;
  std::vector<float> scale;
  Int8Matrix(Vector& w, size_t rows) : values(w.size()), scale(rows) {
    const size_t columns = w.size() / rows;
    for (size_t r = 0; r < rows; ++r) {
      double largest = 0;
      for (size_t k = 0; k < columns; ++k) largest = std::max(largest, std::abs(w[r * columns + k]));
      scale[r] = float(largest / 127);
      for (size_t i = r * columns; i < (r + 1) * columns; ++i) {
        values[i] = int8_t(std::round(w[i] / std::max(double(scale[r]), 1e-30)));
        w[i] = values[i] * double(scale[r]);
      }
    }
  }
};

template <class Cell>
void check_int8(const std::string& name, const Case& c) {
  const int cell = find_cell(name);
  const unsigned seed = unsigned(c.T * 1000 + c.H);
  Problem p = make_problem<Cell>(c, seed);
  const std::vector<float> x = narrowed<float>(p.x), h0 = narrowed<float>(p.h0), c0 = narrowed<float>(p.c0);
  LayerInputs in{};
  in.dtype = Dtype::f32w8;
  in.T = c.T, in.B = c.B, in.I = c.I, in.H = c.H, in.D = c.D;
  in.x = x.data();
  in.x_time = c.B * c.I;
  in.x_batch = c.I;
  in.h0 = h0.data();
  in.c0 = Cell::kStates > 1 ? c0.data() : nullptr;
  in.lengths = lengths_of(p);
  in.resets = p.resets.empty() ? nullptr : p.resets.data();
  std::vector<Int8Matrix> matrices;
  std::vector<std::vector<float>> biases;
  for (int d = 0; d < c.D; ++d) {
    for (Vector* w : {&p.w_ih[d], &p.w_hh[d]}) matrices.emplace_back(*w, size_t(Cell::kGates * c.H));
    for (Vector* b : {&p.b_ih[d], &p.b_hh[d]}) biases.push_back(narrowed<float>(*b));
  }
  for (size_t d = 0; d < size_t(c.D); ++d) {
    const Int8Matrix &w_ih = matrices[2 * d], &w_hh = matrices[2 * d + 1];
    in.weights[d] = {w_ih.values.data(),       w_hh.values.data(), biases[2 * d].data(),
                     biases[2 * d + 1].data(), w_ih.scale.data(),  w_hh.scale.data()};
  }
  OutputGradients none;
  none.dy = none.dc_all = Vector(size_t(c.T * c.B * c.D * c.H));
  none.dh_n = none.dc_n = Vector(p.h0.size());
  Result expected;
  if (!kSanitized) expected = reference_layer<Cell>(p, none);
  const std::string where = words(name, c) + " int8 ";
  std::vector<float> packed(size_t(packed_size(cell, in)));
  pack_layer(cell, in, packed.data(), {run_in_turn, 1});
  std::vector<float> first_y, first_h_n, first_c_n;
  for (const ParallelFor& parallel : {ParallelFor{run_in_turn, 1}, ParallelFor{run_on_threads, 2, true},
                                      ParallelFor{run_on_threads, 3}, ParallelFor{run_in_turn, 2}}) {
    for (const void* pack : {static_cast<const void*>(nullptr), static_cast<const void*>(packed.data())}) {
      in.packed = pack;
      std::vector<float> y = poisoned<float>(none.dy.size()), h_n = poisoned<float>(p.h0.size()),
                         c_n = poisoned<float>(Cell::kStates > 1 ? p.h0.size() : 0);
      layer_forward(cell, in, {y.data(), h_n.data(), Cell::kStates > 1 ? c_n.data() : nullptr, nullptr, nullptr},
                    parallel);
      if (first_y.empty()) {
        check_close(where + "y", y, expected.y, kInt8Tolerance);
        check_close(where + "h_n", h_n, expected.h_n, kInt8Tolerance);
        if (Cell::kStates > 1) check_close(where + "c_n", c_n, expected.c_n, kInt8Tolerance);
        first_y = y, first_h_n = h_n, first_c_n = c_n;
      }
      check_same(where + "y", first_y, y);
      check_same(where + "h_n", first_h_n, h_n);
      check_same(where + "c_n", first_c_n, c_n);
    }
  }
}

template <class Cell>
void check_cell(const std::string& name) {
  const Case cases[] = {
      {1, 1, 1, 1, 1, false, false},    {3, 2, 5, 17, 2, false, false},   {7, 3, 10, 33, 2, true, true},
      {4, 40, 24, 48, 1, false, false}, {5, 35, 20, 40, 2, true, true},   {5, 19, 33, 64, 1, true, false},
      {40, 1, 70, 96, 1, false, true},  {30, 9, 40, 60, 2, true, true},   {2, 70, 300, 50, 1, true, true},
      {33, 8, 20, 64, 1, false, false}, {0, 3, 4, 5, 1, false, false},    {4, 3, 0, 20, 1, true, true},
      {300, 2, 8, 20, 1, true, true},   {2, 3, 600, 560, 2, false, true}, {9, 5, 12, 33, 2, true, true, 0.05},
  };
  for (const Case& c : cases) {
    check_case<Cell, double>(name, c);
    check_case<Cell, float>(name, c);
    check_case<Cell, Bfloat16>(name, c);
    check_case<Cell, Float16>(name, c);
    check_int8<Cell>(name, c);
  }
}

int main() {
  return run_tests([] {
    set_poison(true);
#define RNNKERN_CHECK_CELL(cell, Struct) check_cell<Struct>(#cell);
    RNNKERN_FOR_EACH_CELL(RNNKERN_CHECK_CELL)
  });
}
