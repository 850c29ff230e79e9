// Storage dtypes of tensors. Kernels compute in float (float32, bfloat16, float16) or double (float64).
#pragma once

#include <cstdint>

namespace rnnkern {

enum class Dtype { f32, f64, bf16, f16 };

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int dtype_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
inline int compute_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

}  // namespace rnnkern
