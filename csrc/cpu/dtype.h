// Storage dtypes of tensors. Kernels compute in float (float32, bfloat16, float16) or double (float64).
// f32w8 is float32 with weight matrices in int8 and a float32 scale for each of their rows; forward only.
#pragma once

#include <cstdint>

namespace rnnkern {

enum class Dtype { f32, f64, bf16, f16, f32w8 };

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Int8Weights {};  // stands for f32w8 where a storage type is asked for

inline int dtype_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 || dtype == Dtype::f32w8 ? 4 : 2;
}
inline int compute_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

}  // namespace rnnkern
