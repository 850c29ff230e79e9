#include "cuda/engine.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace rnnkern::cuda {
namespace {

// Estimates in clocks, not measurements; 1800 are a microsecond.
constexpr double kStepwiseClocks = 9000;  // a step of the stepwise engine: a product and a kernel, 2.5 us each
constexpr double kPrologueClocks = 9000;  // before a persistent kernel's first step: its launch, weights to the chip
constexpr double kProductClocks =
    9000;  // the product before a recurrence, small as a chunk's is, and what waits for it
constexpr double kHostClocks =
    27000;                          // of the host to launch a chunk, 15 us: a product, waits, a kernel, cutting tensors
constexpr int64_t kMost = 1 << 20;  // of H and B for the persistent engines, whose sizes are 32-bit
constexpr size_t kPlans = 4096;     // that are kept: a program of many batch sizes must not fill the memory

// Plans ask the device for occupancy, which takes longer than a short layer.
std::shared_ptr<const PersistentPlan> plan_of(const EngineRequest& r, Engine engine, Product product, int share) {
  using Key = std::tuple<int, int, Dtype, Engine, Pass, Product, int64_t, int64_t, int, int>;
  static std::map<Key, std::shared_ptr<const PersistentPlan>> plans;
  static std::mutex mutex;
  const Key key(current_device(), r.cell, r.dtype, engine, r.pass, product, r.H, r.B, r.D, share);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kPlans) plans.clear();
  const PersistentLaunchers& launchers = cell_launchers(r.cell, r.dtype).persistent;
  return plans[key] = std::make_shared<const PersistentPlan>(
             launchers.plan(engine, r.pass, product, int(r.H), int(r.B), r.D, share));
}

// The persistent engine of the least clocks per step on one of `share` parts of the device, if there is one; else
// why_not of the plan says why the named one is none.
EngineChoice best_persistent(const EngineRequest& r, int share) {
  const Product product = r.tf32 ? Product::tf32 : Product::tf32x3;
  const char* const why_not = r.name == "stepwise"         ? "it is the stepwise engine"
                              : r.dtype == Dtype::f64      ? "float64 is for the stepwise engine"
                              : r.B == 0                   ? "there are no rows"
                              : r.H > kMost || r.B > kMost ? "H or B is too large"
                                                           : nullptr;
  EngineChoice best{false, Engine::cluster, product, nullptr};
  if (why_not) {
    PersistentPlan none{};
    none.why_not = why_not;
    best.plan = std::make_shared<const PersistentPlan>(none);
    return best;
  }
  for (Engine engine : {Engine::cluster, Engine::grid}) {
    if (!r.name.empty() && (r.name == "cluster") != (engine == Engine::cluster)) continue;
    const std::shared_ptr<const PersistentPlan> plan = plan_of(r, engine, product, share);
    const bool runs = plan->why_not.empty();
    if (runs ? !best.persistent || plan->step_clocks < best.plan->step_clocks : !best.persistent)
      best = {runs, engine, product, plan};
  }
  return best;
}

double clocks_of(const EngineChoice& choice, int64_t T) {
  return choice.persistent ? double(T) * choice.plan->step_clocks + kPrologueClocks : double(T) * kStepwiseClocks;
}

// Chunks in a row: each diagonal is as long as a chunk, with what every layer launches before it on one stream, or as
// long as the host takes to launch it.
double wavefront_clocks(const EngineChoice& part, int64_t T, int64_t layers, int64_t chunks) {
  const double device = clocks_of(part, (T + chunks - 1) / chunks) + double(layers) * kProductClocks;
  return double(chunks + layers - 1) * std::max(device, double(layers) * kHostClocks);
}

// For the device the derivative of the above is zero here; more chunks than the host keeps up with take longer.
int64_t best_chunks(const EngineChoice& part, int64_t T, int64_t layers) {
  const double fixed = kPrologueClocks + double(layers) * kProductClocks, host = double(layers) * kHostClocks;
  const double steps = double(T) * part.plan->step_clocks;
  double chunks = std::sqrt(double(layers - 1) * steps / fixed);
  if (host > fixed) chunks = std::min(chunks, steps / (host - fixed));
  return std::max<int64_t>(1, std::min(T, int64_t(std::lround(chunks))));
}

}  // namespace

EngineChoice choose_engine(const EngineRequest& r) {
  const EngineChoice stepwise{false, Engine::cluster, r.tf32 ? Product::tf32 : Product::tf32x3, nullptr};
  if (r.name == "stepwise") return stepwise;
  const bool any = r.name.empty();
  if (!any && r.name != "cluster" && r.name != "grid") throw std::runtime_error("no engine is called '" + r.name + "'");
  const EngineChoice best = best_persistent(r, 1);
  if (!any && !best.persistent && r.B > 0)
    throw std::runtime_error("engine '" + r.name + "' cannot run: " + best.plan->why_not);
  if (!best.persistent || (any && clocks_of(best, r.T) >= clocks_of(stepwise, r.T))) return stepwise;
  return best;
}

StackChoice choose_stack(const EngineRequest& r, int64_t layers, int64_t chunks) {
  const StackChoice one_by_one{layers, 0, choose_engine(r)};
  if (r.T == 0 || r.B == 0 || layers < 2) return one_by_one;
  const EngineChoice part = best_persistent(r, int(std::min(layers, kMost)));
  if (!part.persistent) {
    if (chunks > 0) throw std::runtime_error("a wavefront cannot run: " + part.plan->why_not);
    return one_by_one;
  }
  if (chunks > 0) return {layers, std::min(chunks, r.T), part};
  // Whether a GPU runs two cooperative launches side by side is documented nowhere, and has not been tried. If it does
  // not, a wavefront of them takes longer than layer after layer: only by request.
  if (part.plan->shape.cooperative) return one_by_one;
  chunks = best_chunks(part, r.T, layers);
  const double in_turn = double(layers) * (clocks_of(one_by_one.engine, r.T) + kProductClocks);
  if (chunks == 1 || wavefront_clocks(part, r.T, layers, chunks) >= in_turn) return one_by_one;
  return {layers, chunks, part};
}

std::string EngineChoice::describe() const {
  if (!persistent) return "stepwise";
  const PersistentLayout& l = plan->layout;
  std::string text = std::string(engine == Engine::cluster ? "cluster" : "grid") + ", " + std::to_string(l.groups) +
                     " groups of " + std::to_string(l.blocks) + " blocks, " + std::to_string(l.units) + " units and " +
                     std::to_string(l.rows) + " rows each, " + std::to_string(plan->shape.threads) + " threads, " +
                     std::to_string(plan->shape.shared_bytes) + " bytes of shared memory";
  if (plan->registers > 0) text += ", " + std::to_string(plan->registers) + " registers";
  return text;
}

std::string StackChoice::describe() const {
  if (chunks == 0) return engine.describe();
  return engine.describe() + "; wavefront of " + std::to_string(layers) + " layers in " + std::to_string(chunks) +
         " chunks of time";
}

}  // namespace rnnkern::cuda
