// The persistent CUDA engines, emulated, against the stepwise engine's kernels with products by plain loops (the same
// roundings to storage, so close in every dtype) and against the reference in double: every cell, dtype and product,
// both directions, lengths, packed rows, resets, odd sizes, several ways to cut a layer, schedules of several seeds.
//
// The reference takes x and W_ih; here I = D G H and W_ih picks: then gx is x, and dx is dgx.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "cuda/launchers.h"
#include "emulator/emulator.h"
#include "reference_layer.h"
#include "rnnkern_cells.h"
#include "rnnkern_lists.h"

using namespace rnnkern;
using namespace rnnkern_test;
using namespace rnnkern::cuda;

namespace {

struct Case {
  int T, B, H, D;
  enum Rows { even, ragged, packed } rows;
  bool resets;
  double clip;
};

std::string describe(const Case& c) {
  const char* const rows[] = {"", " ragged", " packed"};
  return "T" + std::to_string(c.T) + " B" + std::to_string(c.B) + " H" + std::to_string(c.H) + " D" +
         std::to_string(c.D) + rows[c.rows] + (c.resets ? " resets" : "") + (c.clip > 0 ? " clip" : "");
}

template <class S>
constexpr Dtype kDtype = std::is_same_v<S, float>  ? Dtype::f32
                         : std::is_same_v<S, Bf16> ? Dtype::bf16
                                                   : Dtype::f16;
const char* name_of(Dtype dtype) {
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
ForwardResult<Cell, S> stepwise_forward(Layer<Cell, S>& l, const CellLaunchers& launchers) {
  const int G = Cell::kGates, H = l.c.H;
  std::vector<S> h = poisoned<S>(l.h0.size());
  std::vector<float> c = poisoned<float>(l.h0.size()), gh = poisoned<float>(l.h0.size() * G);
  emulator::GlobalMemory memory;
  allow(memory, h, c, gh);
  return forward(l, [&](const Forward<void, void>& f) {
    StepForward<void, void> a{f, 0, h.data(), Cell::kStates > 1 ? c.data() : nullptr, gh.data()};
    launchers.stepwise.begin(a, nullptr);
    for (; a.step < l.c.T; ++a.step) {
      multiply(l, h, H, G * H, false, gh);
      launchers.stepwise.next_step(a, nullptr);
    }
  });
}

template <class Cell, class S>
BackwardResult<S> stepwise_backward(Layer<Cell, S>& l, const ForwardResult<Cell, S>& f, const std::vector<S>& h_before,
                                    const CellLaunchers& launchers) {
  const int G = Cell::kGates, H = l.c.H;
  std::vector<S> dgh = poisoned<S>(l.h0.size() * G);
  std::vector<float> product = poisoned<float>(l.h0.size()), direct = product, dc = product;
  emulator::GlobalMemory memory;
  allow(memory, dgh, product, direct, dc);
  return backward(l, f, h_before, [&](const Backward<void, void>& b) {
    StepBackward<void, void> a{
        b, l.c.T, dgh.data(), product.data(), direct.data(), Cell::kStates > 1 ? dc.data() : nullptr};
    while (a.step-- > 0) {
      launchers.stepwise.step_backward(a, nullptr);
      multiply(l, dgh, G * H, H, true, product);
    }
    launchers.stepwise.end_backward(a, nullptr);
  });
}

// NaN where `expected` is, and elsewhere as close as `tolerance` of the largest value.
template <class T>
void check_close(const std::string& what, const std::vector<T>& got, const std::vector<T>& expected, double tolerance) {
  double largest = 0, error = 0;
  bool finite = true;
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = to_float(got[i]), y = to_float(expected[i]);
    finite = finite && std::isnan(x) == std::isnan(y);
    if (std::isnan(y)) continue;
    largest = std::max(largest, std::fabs(y));
    error = std::max(error, std::fabs(x - y));
  }
  CHECK(finite && error <= tolerance * largest, "%s: error %g of %g, written where expected: %d", what.c_str(), error,
        largest, finite);
}

struct Engines {
  Engine engine;
  Product product;
  int blocks, n_tiles;     // 0: as planned
  int groups_at_once = 0;  // 0: as many as an H100 holds
};

PersistentPlan plan(const Engines& e, Pass pass, int gates, int bytes, const Case& c) {
  const int products = bytes == 4 && e.product == Product::tf32x3 ? 3 : 1;
  return plan_persistent({e.engine, pass, gates, bytes, products, c.H, c.B, c.D, e.blocks, e.n_tiles}, device_facts(),
                         [&](const LaunchShape& shape) {
                           return e.groups_at_once ? e.groups_at_once * shape.blocks
                                                   : 132 / shape.cluster * shape.cluster;
                         });
}

template <class Cell, class S>
class Checks {
 public:
  Checks(int cell, const char* name, const Case& c)
      : layer_(c),
        launchers_(cell_launchers(cell, kDtype<S>)),
        where_(name + std::string(" ") + name_of(kDtype<S>) + " " + describe(c) + " "),
        forward_(stepwise_forward(layer_, launchers_)),
        h_before_(poisoned<S>(forward_.y.size())) {
    emulator::GlobalMemory memory;
    allow(memory, layer_.h0, forward_.y, h_before_, layer_.p.lengths, layer_.p.resets, layer_.offsets);
    launchers_.stepwise.previous_h({layer_.sequence(), c.H, layer_.h0.data(), forward_.y.data(), h_before_.data()},
                                   nullptr);
    backward_ = stepwise_backward(layer_, forward_, h_before_, launchers_);
  }

  void check(const Engines& e) {
    const double tolerance = sizeof(S) == 4           ? e.product == Product::tf32 ? 4e-3 : 4e-6
                             : std::is_same_v<S, F16> ? 4e-3
                                                      : 3e-2;
    const std::string where = where_ + (e.engine == Engine::cluster ? "cluster " : "grid ") +
                              (e.product == Product::tf32 ? "tf32 " : "") + std::to_string(e.blocks) + " blocks " +
                              std::to_string(e.n_tiles) + " n_tiles ";
    try {
      const ForwardResult<Cell, S> f = run_forward(e);
      check_close(where + "y", f.y, forward_.y, tolerance);
      check_close(where + "h_n", f.h_n, forward_.h_n, tolerance);
      check_close(where + "saved", f.saved, forward_.saved, tolerance);
      check_close(where + "c_n", f.c_n, forward_.c_n, tolerance);
      check_close(where + "c_all", f.c_all, forward_.c_all, tolerance);
      check_close(where + "c_before", f.c_before, forward_.c_before, tolerance);
      const BackwardResult<S> b = run_backward(e);
      check_close(where + "dgx", b.dgx, backward_.dgx, tolerance);
      check_close(where + "dgh", b.dgh, backward_.dgh, tolerance);
      check_close(where + "dh0", b.dh0, backward_.dh0, tolerance);
      check_close(where + "dc0", b.dc0, backward_.dc0, tolerance);
      if (layer_.c.clip <= 0) check_reference(where, f, b, std::max(tolerance, 1e-5));
    } catch (const std::runtime_error& error) {
      CHECK(false, "%s: %s", where.c_str(), error.what());
    }
  }

 private:
  ForwardResult<Cell, S> run_forward(const Engines& e) {
    const PersistentPlan plan = ::plan(e, Pass::forward, Cell::kGates, sizeof(S), layer_.c);
    std::vector<Vec<float, 4>> workspace = poisoned<Vec<float, 4>>(plan.workspace_bytes / 16 + 1);
    emulator::GlobalMemory memory;
    memory.add(workspace.data(), plan.workspace_bytes);
    return forward(layer_, [&](const Forward<void, void>& f) {
      launchers_.persistent.forward(plan, e.engine, e.product, f, workspace.data(), nullptr);
    });
  }
  BackwardResult<S> run_backward(const Engines& e) {
    const PersistentPlan plan = ::plan(e, Pass::backward, Cell::kGates, sizeof(S), layer_.c);
    std::vector<Vec<float, 4>> workspace = poisoned<Vec<float, 4>>(plan.workspace_bytes / 16 + 1);
    emulator::GlobalMemory memory;
    memory.add(workspace.data(), plan.workspace_bytes);
    return backward(layer_, forward_, h_before_, [&](const Backward<void, void>& b) {
      launchers_.persistent.backward(plan, e.engine, e.product, b, workspace.data(), nullptr);
    });
  }

  // Rounding h and dgh to 16 bits moves gradients too far from the reference's for one tolerance.
  void check_reference(const std::string& where, const ForwardResult<Cell, S>& f, const BackwardResult<S>& b,
                       double tolerance) {
    const Case& c = layer_.c;
    const Result& expected = layer_.expected;
    const int outputs = c.D * c.H, G = Cell::kGates;
    check_rows(where + "reference y", f.y, layer_.gathered(expected.y, outputs), outputs, tolerance);
    check_rows(where + "reference h_n", f.h_n, expected.h_n, 0, tolerance);
    if (Cell::kStates > 1) {
      check_rows(where + "reference c_all", f.c_all, layer_.gathered(expected.c_all, outputs), outputs, tolerance);
      check_rows(where + "reference c_n", f.c_n, expected.c_n, 0, tolerance);
    }
    if (sizeof(S) == 2) return;
    check_rows(where + "reference dgx", b.dgx, layer_.gathered(expected.dx, outputs * G), outputs * G, tolerance);
    check_rows(where + "reference dh0", b.dh0, expected.dh0, 0, tolerance);
    if (Cell::kStates > 1) check_rows(where + "reference dc0", b.dc0, expected.dc0, 0, tolerance);
    for (int d = 0; d < c.D; ++d) {  // dgh, by the gradient of the bias that it sums to
      std::vector<float> db(size_t(G * c.H), 0.0f);
      for (int t = 0; t < c.T; ++t) {
        for (int row = 0; row < c.B; ++row) {
          for (int i = 0; i < G * c.H && t < layer_.p.lengths[size_t(row)]; ++i)
            db[size_t(i)] += to_float(b.dgh[size_t((layer_.place(t, row) * c.D + d) * G * c.H + i)]);
        }
      }
      check_rows(where + "reference db_hh", db, expected.db_hh[d], 0, tolerance);
    }
  }
  // Of [N, columns], rows past their end may hold anything; columns = 0: none are.
  template <class T>
  void check_rows(const std::string& what, const std::vector<T>& got, const Vector& expected, int columns,
                  double tolerance) {
    std::vector<float> narrow, wide;
    const auto take = [&](size_t at) {
      narrow.push_back(to_float(got[at]));
      wide.push_back(float(expected[at]));
    };
    if (columns == 0) {
      for (size_t i = 0; i < got.size(); ++i) take(i);
    }
    for (int t = 0; t < layer_.c.T; ++t) {
      for (int b = 0; b < layer_.c.B; ++b) {
        for (int i = 0; i < columns && t < layer_.p.lengths[size_t(b)]; ++i)
          take(size_t(layer_.place(t, b) * columns + i));
      }
    }
    check_close(what, narrow, wide, tolerance);
  }

  Layer<Cell, S> layer_;
  const CellLaunchers& launchers_;
  const std::string where_;
  const ForwardResult<Cell, S> forward_;
  std::vector<S> h_before_;
  BackwardResult<S> backward_;
};

template <class Cell, class S>
void check_cell(int cell, const char* name) {
  const auto check = [&](const Case& c, std::vector<Engines> engines) {
    Checks<Cell, S> checks(cell, name, c);
    for (const Engines& e : engines) checks.check(e);
  };
  constexpr Engine cluster = Engine::cluster, grid = Engine::grid;
  std::vector<Product> products = {Product::tf32x3};
  if (sizeof(S) == 4) products.push_back(Product::tf32);
  for (Product product : products) {
    check({1, 1, 1, 1, Case::even, false, 0}, {{cluster, product, 0, 0}, {grid, product, 0, 0}});
    check({5, 3, 17, 2, Case::ragged, true, 0},
          {{cluster, product, 1, 0}, {cluster, product, 2, 1}, {grid, product, 0, 0}});
    check({5, 9, 17, 2, Case::packed, false, 0}, {{cluster, product, 2, 2}, {grid, product, 0, 1}});
  }
  const Product product = Product::tf32x3;
  // Groups that take several tiles, also of both directions.
  check({5, 17, 17, 2, Case::ragged, true, 0},
        {{grid, product, 0, 1, 1}, {grid, product, 0, 1, 4}, {cluster, product, 2, 1}});
  check({2, 17, 40, 1, Case::even, true, 0.05},
        {{cluster, product, 4, 1}, {cluster, product, 4, 4}, {grid, product, 0, 2}});
  check({5, 3, 40, 2, Case::ragged, false, 0.05}, {{cluster, product, 4, 1}, {grid, product, 0, 1}});
  check({2, 3, 100, 2, Case::ragged, true, 0}, {{cluster, product, 0, 0}, {grid, product, 0, 0}});
  // Weights beyond the registers, in shared memory.
  if (sizeof(S) == 4 && Cell::kGates == 4)
    check({2, 3, 144, 1, Case::even, false, 0}, {{cluster, product, 4, 0}, {grid, product, 3, 0}});
}

// What fits on an H100, and what does not.
void check_plans() {
  const auto why_not = [](Engine engine, Pass pass, int gates, int bytes, int H, int B) {
    return plan({engine, Product::tf32x3, 0, 0}, pass, gates, bytes, {1, B, H, 1, Case::even, false, 0}).why_not;
  };
  for (Pass pass : {Pass::forward, Pass::backward}) {
    for (int B : {1, 8, 64, 300}) {
      for (int gates : {1, 3, 4}) {
        for (int H : {1, 8, 100, 256, 512, 2048}) {
          for (int bytes : {2, 4}) {
            if (H <= (bytes == 2 ? 512 : 256))
              CHECK(why_not(Engine::cluster, pass, gates, bytes, H, B) == "", "%d gates H %d B %d, %d bytes: %s", gates,
                    H, B, bytes, why_not(Engine::cluster, pass, gates, bytes, H, B).c_str());
            if (H <= 512)
              CHECK(why_not(Engine::grid, pass, gates, bytes, H, B) == "", "%d gates H %d B %d, %d bytes: %s", gates, H,
                    B, bytes, why_not(Engine::grid, pass, gates, bytes, H, B).c_str());
          }
        }
      }
    }
    const std::string why = why_not(Engine::cluster, pass, 4, 2, 2048, 8);
    CHECK(why.find("H = 2048") != std::string::npos, "%s", why.c_str());
  }
}

}  // namespace

int main() {
  check_plans();
  for (unsigned seed : {0u, 1u, 2u, 3u}) {
    emulator::set_seed(seed);
    int cell = 0;
#define RNNKERN_CHECK(name, Struct)       \
  check_cell<Struct, float>(cell, #name); \
  check_cell<Struct, Bf16>(cell, #name);  \
  check_cell<Struct, F16>(cell++, #name);
    RNNKERN_FOR_EACH_CELL(RNNKERN_CHECK)
#undef RNNKERN_CHECK
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
