// What the operators call: for each cell and dtype, functions that launch its kernels. void stands for the types of the
// dtype. All throw std::runtime_error with what the device said.
#pragma once

#include "cpu/dtype.h"
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

struct CellLaunchers {
  StepwiseLaunchers stepwise;
};

// Of the cell with this index in cell_traits(); f32w8 has none.
const CellLaunchers& cell_launchers(int cell, Dtype dtype);

}  // namespace rnnkern::cuda
