// The persistent CUDA engines, emulated, against the stepwise engine's kernels (the same roundings to storage, so close
// in every dtype) and against the reference in double: every cell, dtype and product, both directions, lengths, packed
// rows, resets, odd sizes, several ways to cut a layer, schedules of several seeds.
#include "cuda_layer.h"
#include "rnnkern_cells.h"
#include "rnnkern_lists.h"

using namespace rnnkern_test;

namespace {

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

// More blocks than a launch can have are refused, and not counted modulo 2^32.
void check_too_many_blocks() {
  std::string said;
  try {
    const Sequence sequence{int64_t(1) << 30, int64_t(1) << 30, 1 << 20, 1, nullptr, nullptr, nullptr};
    cell_launchers(0, Dtype::f32).stepwise.previous_h({sequence, 512, nullptr, nullptr, nullptr}, nullptr);
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  CHECK(said.find("previous_h needs 4503599627370496 blocks") == 0, "%s", said.c_str());
}

}  // namespace

int main() {
  check_plans();
  check_too_many_blocks();
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
