#include "cuda/engine.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace rnnkern::cuda {
namespace {

// What a step of the stepwise engine takes at least, in clocks: a product and a kernel, 2.5 us each, by an estimate.
constexpr double kStepwiseClocks = 9000;
constexpr int64_t kMost = 1 << 20;  // of H and B for the persistent engines, whose sizes are 32-bit

// Plans ask the device for occupancy, which takes longer than a short layer.
const PersistentPlan& plan_of(int cell, Dtype dtype, Engine engine, Pass pass, Product product, int H, int B, int D) {
  using Key = std::tuple<int, int, Dtype, Engine, Pass, Product, int, int, int>;
  static std::map<Key, PersistentPlan> plans;
  static std::mutex mutex;
  const Key key(current_device(), cell, dtype, engine, pass, product, H, B, D);
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(key);
  if (found == plans.end())
    found = plans.emplace(key, cell_launchers(cell, dtype).persistent.plan(engine, pass, product, H, B, D)).first;
  return found->second;
}

}  // namespace

EngineChoice choose_engine(int cell, Dtype dtype, const std::string& name, Pass pass, bool tf32, int64_t H, int64_t B,
                           int D) {
  const Product product = tf32 ? Product::tf32 : Product::tf32x3;
  EngineChoice best{false, Engine::cluster, product, {}};
  if (name == "stepwise") return best;
  const bool any = name.empty();
  if (!any && name != "cluster" && name != "grid") throw std::runtime_error("no engine is called '" + name + "'");
  std::string why_not = dtype == Dtype::f64      ? "float64 is for the stepwise engine"
                        : B == 0                 ? "there are no rows"
                        : H > kMost || B > kMost ? "H or B is too large"
                                                 : "";
  for (Engine engine : {Engine::cluster, Engine::grid}) {
    if (!why_not.empty() || (!any && (name == "cluster") != (engine == Engine::cluster))) continue;
    const PersistentPlan& plan = plan_of(cell, dtype, engine, pass, product, int(H), int(B), D);
    if (!plan.why_not.empty()) {
      if (!any) why_not = plan.why_not;
      continue;
    }
    if (any && plan.step_clocks >= (best.persistent ? best.plan.step_clocks : kStepwiseClocks)) continue;
    best = {true, engine, product, plan};
  }
  if (!any && !best.persistent && B > 0) throw std::runtime_error("engine '" + name + "' cannot run: " + why_not);
  return best;
}

std::string EngineChoice::describe() const {
  if (!persistent) return "stepwise";
  const PersistentLayout& l = plan.layout;
  std::string text = std::string(engine == Engine::cluster ? "cluster" : "grid") + ", " + std::to_string(l.groups) +
                     " groups of " + std::to_string(l.blocks) + " blocks, " + std::to_string(l.units) + " units and " +
                     std::to_string(l.rows) + " rows each, " + std::to_string(plan.shape.threads) + " threads, " +
                     std::to_string(plan.shape.shared_bytes) + " bytes of shared memory";
  if (plan.registers > 0) text += ", " + std::to_string(plan.registers) + " registers";
  return text;
}

}  // namespace rnnkern::cuda
