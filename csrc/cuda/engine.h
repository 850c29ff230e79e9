// Which engine runs a pass of a layer: the one that the caller names, or else the least by the planner's estimate.
#pragma once

#include <string>

#include "cuda/launchers.h"

namespace rnnkern::cuda {

struct EngineChoice {
  bool persistent;  // else stepwise
  Engine engine;
  Product product;
  PersistentPlan plan;

  std::string describe() const;
};

// For the current device. `name`: "stepwise", "cluster", "grid", or "" for any. Throws std::runtime_error where the
// named engine cannot run this.
EngineChoice choose_engine(int cell, Dtype dtype, const std::string& name, Pass pass, bool tf32, int64_t H, int64_t B,
                           int D);

}  // namespace rnnkern::cuda
