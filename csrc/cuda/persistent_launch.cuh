// Makes a cell's launchers of the persistent engines: finds the kernel, plans for it, launches it.
#pragma once

#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/persistent_backward.cuh"
#include "cuda/persistent_forward.cuh"

namespace rnnkern::cuda {

// Calls use(how the kernel multiplies, the kernel).
template <template <class, class> class CellPass, class Cell, class S, class Use>
auto with_persistent_kernel(Engine engine, Product product, const Use& use) {
  const auto with_engine = [&](auto math) {
    using Pass = CellPass<Cell, decltype(math)>;
    const auto of_cluster = persistent<Pass, ClusterExchange>, of_grid = persistent<Pass, GridExchange>;
    return use(math, engine == Engine::cluster ? of_cluster : of_grid);
  };
  if constexpr (sizeof(S) == 2)
    return with_engine(Half<S>{});
  else
    return product == Product::tf32 ? with_engine(Tf32{}) : with_engine(Tf32x3{});
}

template <template <class, class> class CellPass, class Cell, class S>
PersistentPlan plan_kernel(Engine engine, Pass pass, Product product, int H, int B, int D, int share) {
  return with_persistent_kernel<CellPass, Cell, S>(engine, product, [&](auto math, auto kernel) {
    DeviceFacts facts = device_facts();
    facts.multiprocessors /= share;
    PersistentPlan plan =
        plan_persistent({engine, pass, Cell::kGates, int(sizeof(S)), math.kProducts, H, B, D}, facts,
                        [&](const LaunchShape& shape) { return resident_blocks(kernel, shape) / share; });
    plan.registers = registers_of(kernel);
    return plan;
  });
}

template <template <class, class> class CellPass, class Cell, class S, class Layer>
void launch_kernel(const char* name, const PersistentPlan& plan, Engine engine, Product product, const Layer& layer,
                   void* workspace, void* stream) {
  if (!plan.why_not.empty()) throw std::runtime_error(plan.why_not);
  const size_t buffers = size_t(plan.layout.groups) * 2 * size_t(plan.layout.buffer_bytes);
  unsigned char* const memory = static_cast<unsigned char*>(workspace);
  if (engine == Engine::grid) clear(memory + buffers, plan.workspace_bytes - buffers, Stream(stream));
  with_persistent_kernel<CellPass, Cell, S>(engine, product, [&](auto math, auto kernel) {
    PersistentArguments<CellPass<Cell, decltype(math)>> a;
    a.layer = layer;
    a.layout = plan.layout;
    a.buffers = memory;
    a.flags = engine == Engine::grid ? reinterpret_cast<unsigned*>(memory + buffers) : nullptr;
    launch(name, kernel, plan.shape, a, Stream(stream));
  });
}

template <class Cell, class S>
PersistentLaunchers persistent_launchers() {
  PersistentLaunchers launchers{};
  launchers.plan = [](Engine engine, Pass pass, Product product, int H, int B, int D, int share) {
    return pass == Pass::forward ? plan_kernel<ForwardPass, Cell, S>(engine, pass, product, H, B, D, share)
                                 : plan_kernel<BackwardPass, Cell, S>(engine, pass, product, H, B, D, share);
  };
  launchers.forward = [](const PersistentPlan& plan, Engine engine, Product product, const Forward<void, void>& a,
                         void* workspace, void* stream) {
    launch_kernel<ForwardPass, Cell, S>("persistent forward", plan, engine, product, typed<Forward<S, float>>(a),
                                        workspace, stream);
  };
  launchers.backward = [](const PersistentPlan& plan, Engine engine, Product product, const Backward<void, void>& a,
                          void* workspace, void* stream) {
    launch_kernel<BackwardPass, Cell, S>("persistent backward", plan, engine, product, typed<Backward<S, float>>(a),
                                         workspace, stream);
  };
  return launchers;
}

}  // namespace rnnkern::cuda
