// Makes a cell's launchers from the engines' kernels.
#pragma once

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/persistent_launch.cuh"
#include "cuda/step_launch.cuh"
#include "cuda/stepwise.cuh"

namespace rnnkern::cuda {

template <class Arguments>
void launch_one_each(const char* name, void (*kernel)(Arguments), int64_t elements, const Arguments& arguments,
                     void* stream) {
  const int64_t blocks = (elements + kStepThreads - 1) / kStepThreads;
  launch(name, kernel, {checked_blocks(blocks, name), kStepThreads}, arguments, Stream(stream));
}

inline int64_t units(const Sequence& sequence, int H) { return int64_t(sequence.D) * sequence.B * H; }

template <class Cell, class S, class C>
CellLaunchers make_launchers() {
  CellLaunchers launchers{};
  launchers.stepwise.begin = [](const StepForward<void, void>& a, void* stream) {
    launch_one_each("begin", begin<S, C>, units(a.forward.sequence, a.forward.H), typed<StepForward<S, C>>(a), stream);
  };
  launchers.stepwise.next_step = [](const StepForward<void, void>& a, void* stream) {
    launch_one_each("next_step", next_step<Cell, S, C>, units(a.forward.sequence, a.forward.H),
                    typed<StepForward<S, C>>(a), stream);
  };
  launchers.stepwise.previous_h = [](const PreviousH<void>& a, void* stream) {
    launch_one_each("previous_h", previous_h<S>, units(a.sequence, a.H) * a.sequence.T, typed<PreviousH<S>>(a), stream);
  };
  launchers.stepwise.without_padding = [](const WithoutPadding<void>& a, void* stream) {
    launch_one_each("without_padding", without_padding<S>, a.sequence.N * a.I, typed<WithoutPadding<S>>(a), stream);
  };
  launchers.stepwise.step_backward = [](const StepBackward<void, void>& a, void* stream) {
    launch_one_each("step_backward", step_backward<Cell, S, C>, units(a.backward.sequence, a.backward.H),
                    typed<StepBackward<S, C>>(a), stream);
  };
  launchers.stepwise.end_backward = [](const StepBackward<void, void>& a, void* stream) {
    launch_one_each("end_backward", end_backward<S, C>, units(a.backward.sequence, a.backward.H),
                    typed<StepBackward<S, C>>(a), stream);
  };
  if constexpr (std::is_same_v<C, float>) launchers.persistent = persistent_launchers<Cell, S>();
  if constexpr (sizeof(S) <= sizeof(float))
    launchers.fused_step = {launch_step<Cell, S, CellStep>, launch_step<Cell, S, AttentionStep>};
  return launchers;
}

template <class Cell>
const CellLaunchers& launchers_of(Dtype dtype) {
  static const CellLaunchers f32 = make_launchers<Cell, float, float>(), f64 = make_launchers<Cell, double, double>(),
                             bf16 = make_launchers<Cell, Bf16, float>(), f16 = make_launchers<Cell, F16, float>();
  return dtype == Dtype::f64 ? f64 : dtype == Dtype::bf16 ? bf16 : dtype == Dtype::f16 ? f16 : f32;
}

}  // namespace rnnkern::cuda
