#include "cpu/attention.h"
#include "cpu/isa.h"
#include "rnnkern_lists.h"

namespace rnnkern {

#define RNNKERN_DECLARE(isa)                                           \
  namespace isa {                                                      \
  const AttentionKernels& attention_kernels(Score score, Dtype dtype); \
  }
RNNKERN_FOR_EACH_ISA(RNNKERN_DECLARE)
#undef RNNKERN_DECLARE

namespace {

const AttentionKernels& kernels(const AttentionInputs& in) {
  const Isa current = current_isa();
#define RNNKERN_CHOOSE(isa) \
  if (current == Isa::isa) return isa::attention_kernels(in.score, in.dtype);
  RNNKERN_FOR_EACH_ISA(RNNKERN_CHOOSE)
#undef RNNKERN_CHOOSE
  return portable::attention_kernels(in.score, in.dtype);
}

// Waking another thread costs more than a few microseconds of work.
ParallelFor enough_threads(const AttentionInputs& in, const ParallelFor& parallel) {
  const double tanh_cost = in.score == Score::additive ? 8 : 1;
  const double work = double(in.B) * double(in.Tq) * double(in.Tk) * (tanh_cost * double(in.D) + double(in.Dv));
  return {parallel.run, work < double(1 << 19) ? 1 : parallel.threads};
}

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& out, const ParallelFor& parallel) {
  kernels(in).forward(in, out, enough_threads(in, parallel));
}

void attention_backward(const AttentionInputs& in, const AttentionGradients& grad, const ParallelFor& parallel) {
  kernels(in).backward(in, grad, enough_threads(in, parallel));
}

}  // namespace rnnkern
