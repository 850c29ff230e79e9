// What the operators call: for each cell and dtype, functions that launch its kernels. void stands for the types of the
// dtype. All throw std::runtime_error with what the device said.
#pragma once

#include "cpu/dtype.h"
#include "cuda/persistent.h"
#include "cuda/step.h"
#include "cuda/stepwise.h"

namespace rnnkern::cuda {

struct StepwiseLaunchers {
  void (*begin)(const StepForward<void, void>&, void* stream);
  void (*next_step)(const StepForward<void, void>&, void* stream);
  void (*previous_h)(const PreviousH<void>&, void* stream);
  void (*without_padding)(const WithoutPadding<void>&, void* stream);
  void (*step_backward)(const StepBackward<void, void>&, void* stream);
  void (*end_backward)(const StepBackward<void, void>&, void* stream);
};

struct PersistentLaunchers {  // none for float64
  // For the current device, whose occupancy it asks for: worth keeping by its arguments. `share`: launches that are to
  // run at once, with a part of the device each.
  PersistentPlan (*plan)(Engine, Pass, Product, int H, int B, int D, int share);
  // `workspace`: plan.workspace_bytes, aligned to 16; what must be zero in it is cleared here, on the stream.
  void (*forward)(const PersistentPlan&, Engine, Product, const Forward<void, void>&, void* workspace, void* stream);
  void (*backward)(const PersistentPlan&, Engine, Product, const Backward<void, void>&, void* workspace, void* stream);
};

struct FusedStepLaunchers {  // null for float64
  void (*cell)(const CellStep<void>&, void* stream);
  void (*attention)(const AttentionStep<void>&, void* stream);
};

struct CellLaunchers {
  StepwiseLaunchers stepwise;
  PersistentLaunchers persistent;
  FusedStepLaunchers fused_step;
};

// Of the cell with this index in cell_traits(); f32w8 has none.
const CellLaunchers& cell_launchers(int cell, Dtype dtype);

}  // namespace rnnkern::cuda
