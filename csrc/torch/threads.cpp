#include "torch/threads.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

namespace rnnkern {
namespace {

bool forked = false;  // written while a child has one thread only
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

ParallelFor torch_threads() {
  return {[](int64_t count, ParallelFor::Body body, void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          forked ? 1 : int(torch::stable::get_num_threads())};
}

}  // namespace rnnkern
