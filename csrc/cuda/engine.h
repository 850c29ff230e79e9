// Which engine runs a pass of a layer: the one that the caller names, or else the least by the planner's estimate; and
// whether the layers of a stack run one after another or as a wavefront.
#pragma once

#include <memory>
#include <string>

#include "cuda/launchers.h"

namespace rnnkern::cuda {

struct EngineChoice {
  bool persistent;  // else stepwise
  Engine engine;
  Product product;
  std::shared_ptr<const PersistentPlan> plan;  // null for stepwise

  std::string describe() const;
};

// What asks for a choice. `name`: "stepwise", "cluster", "grid", or "" for any.
struct EngineRequest {
  int cell;
  Dtype dtype;
  std::string name;
  Pass pass;
  bool tf32;
  int64_t H, B;
  int D;
  int64_t T;  // of the longest row
};

// For the current device. Throws std::runtime_error where the named engine cannot run this.
EngineChoice choose_engine(const EngineRequest& request);

// How the layers of a stack of one direction run. In a wavefront time is cut into chunks, and layer l runs chunk c
// while layer l + 1 runs chunk c - 1, each on its part of the device.
struct StackChoice {
  int64_t layers;
  int64_t chunks;       // 0: layer after layer, each by the engine that choose_engine gives it, which is this
  EngineChoice engine;  // of a wavefront: persistent, planned for one of `layers` parts of the device

  std::string describe() const;
};

// `chunks`: what the caller wants; 0: a wavefront where its estimate is less. Throws as choose_engine does, and where
// no persistent engine can run the wavefront that the caller wants.
StackChoice choose_stack(const EngineRequest& request, int64_t layers, int64_t chunks);

}  // namespace rnnkern::cuda
