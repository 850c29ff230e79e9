// The instruction set avx512bf16 has no attention of its own.
#include "cpu/attention.h"

namespace rnnkern {

namespace avx512 {
const AttentionKernels& attention_kernels(Score score, Dtype dtype);
}

namespace avx512bf16 {
const AttentionKernels& attention_kernels(Score score, Dtype dtype);
const AttentionKernels& attention_kernels(Score score, Dtype dtype) { return avx512::attention_kernels(score, dtype); }
}  // namespace avx512bf16

}  // namespace rnnkern
