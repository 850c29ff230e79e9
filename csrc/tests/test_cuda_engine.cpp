// What runs a layer and a stack of layers on an H100, as the emulator tells its facts: the choices alone.
#include "cuda/engine.h"

#include "check.h"

using namespace rnnkern;
using namespace rnnkern::cuda;
using rnnkern_test::failures;

namespace {

EngineRequest request(const std::string& name, int64_t H, int64_t B, int64_t T, Dtype dtype = Dtype::bf16) {
  return {0, dtype, name, Pass::forward, false, H, B, 1, T};
}

template <class Function>
std::string error_of(const Function& function) {
  try {
    function();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void check_engines() {
  for (int64_t T : {2, 100}) CHECK(choose_engine(request("", 256, 8, T)).persistent, "T %d", int(T));
  CHECK(!choose_engine(request("", 256, 8, 1)).persistent, "one step is not worth loading the weights");
  CHECK(choose_engine(request("cluster", 256, 8, 1)).persistent, "but by force");
  CHECK(!choose_engine(request("", 256, 8, 100, Dtype::f64)).persistent, "float64");
  CHECK(!choose_engine(request("", 256, 0, 100)).persistent, "no rows");
  CHECK(!choose_engine(request("stepwise", 256, 8, 100)).persistent, "by force");
  const std::string why = error_of([] { choose_engine(request("cluster", 5000, 8, 100)); });
  CHECK(why.find("engine 'cluster' cannot run: ") == 0 && why.find("H = 5000") != std::string::npos, "%s", why.c_str());
  CHECK(error_of([] { choose_engine(request("mine", 5, 8, 1)); }) == "no engine is called 'mine'", "an unknown name");
}

// Blocks that layers side by side take together.
int blocks(const StackChoice& choice) { return int(choice.layers) * choice.engine.plan->shape.blocks; }

void check_stacks() {
  for (int64_t L : {2, 3, 5}) {
    for (int64_t B : {1, 8}) {
      const StackChoice stack = choose_stack(request("", 256, B, 1000), L, 0);
      CHECK(stack.chunks > 1 && stack.chunks < 100, "L %d B %d: %d chunks", int(L), int(B), int(stack.chunks));
      CHECK(blocks(stack) <= 132, "L %d B %d: %d blocks", int(L), int(B), blocks(stack));
      const StackChoice longer = choose_stack(request("", 256, B, 4000), L, 0);
      const double steps = 4000 * longer.engine.plan->step_clocks / double(longer.chunks);
      CHECK(steps > 14e3 * double(L), "a chunk of %f clocks is over before the host has launched the next", steps);
      CHECK(longer.chunks > stack.chunks, "%d chunks of 4000 steps, %d of 1000", int(longer.chunks), int(stack.chunks));
    }
  }
  const StackChoice grid = choose_stack(request("grid", 512, 1, 1000), 2, 4);
  CHECK(grid.chunks == 4 && blocks(grid) <= 132, "%d chunks, %d blocks", int(grid.chunks), blocks(grid));
  CHECK(choose_stack(request("", 2048, 1, 1000), 2, 0).chunks == 0, "cooperative launches, unless asked for");
  CHECK(choose_stack(request("", 256, 8, 2), 3, 0).chunks == 0, "too short");
  CHECK(choose_stack(request("", 256, 8, 1000), 1, 0).chunks == 0, "one layer");
  CHECK(choose_stack(request("", 512, 512, 1000), 2, 0).chunks == 0, "a batch that fills the device by itself");
  CHECK(choose_stack(request("stepwise", 256, 8, 1000), 2, 0).chunks == 0, "stepwise");
  CHECK(choose_stack(request("", 256, 8, 1000, Dtype::f64), 2, 0).chunks == 0, "float64");
  CHECK(choose_stack(request("", 256, 8, 0), 2, 3).chunks == 0, "no steps");
  CHECK(choose_stack(request("", 256, 8, 5), 2, 9).chunks == 5, "no more chunks than steps");
  CHECK(error_of([] { choose_stack(request("stepwise", 256, 8, 5), 2, 3); }) ==
            "a wavefront cannot run: it is the stepwise engine",
        "by force");
  const std::string told = choose_stack(request("", 256, 8, 1000), 2, 7).describe();
  CHECK(told.find("; wavefront of 2 layers in 7 chunks of time") != std::string::npos, "%s", told.c_str());
  CHECK(choose_stack(request("", 256, 8, 2), 3, 0).describe().find("wavefront") == std::string::npos, "layer by layer");
}

}  // namespace

int main() {
  check_engines();
  check_stacks();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
