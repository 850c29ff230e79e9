// What the operators share: dtypes, optional pointers, outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/workspace.h"
#include "torch/threads.h"

namespace rnnkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "rnnkern: expected a tensor of float32, float64, bfloat16 or float16");
  }
}

inline Dtype compute_dtype(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline OptionalTensor make_contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(make_contiguous(*tensor)) : std::nullopt;
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max(sizes[i], int64_t(1));
  return strides;
}

// Uninitialised, contiguous, on the CPU, straight from the allocator: torch::stable::new_empty looks its operator up by
// name, which takes longer than a short step. Large ones go on huge pages: fresh small pages take longer than most
// kernels.
inline Tensor make_empty(const std::vector<int64_t>& sizes, Dtype dtype) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  const int32_t type = dtype == Dtype::f64    ? aoti_torch_dtype_float64()
                       : dtype == Dtype::bf16 ? aoti_torch_dtype_bfloat16()
                       : dtype == Dtype::f16  ? aoti_torch_dtype_float16()
                                              : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  const size_t bytes = size_t(tensor.numel()) * size_t(dtype_size(dtype));
  if (bytes >= kWorthHugePages) prefer_huge_pages(tensor.mutable_data_ptr(), bytes);
  poison(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

// The same for what backward keeps and gives, from the pool where it is large. Such storage cannot be resized, which
// an output might be.
inline Tensor make_pooled(const std::vector<int64_t>& sizes, Dtype dtype) {
  size_t bytes = size_t(dtype_size(dtype));
  for (int64_t size : sizes) bytes *= size_t(size);
  if (bytes < kWorthPooling) return make_empty(sizes, dtype);
  const ScalarType type = dtype == Dtype::f64    ? ScalarType::Double
                          : dtype == Dtype::bf16 ? ScalarType::BFloat16
                          : dtype == Dtype::f16  ? ScalarType::Half
                                                 : ScalarType::Float;
  void* const data = take_pooled(bytes);
  poison(data, bytes);
  return torch::stable::from_blob(data, sizes, contiguous_strides(sizes),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type, give_back_pooled);
}

}  // namespace rnnkern
