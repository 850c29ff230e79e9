// What the GPU operators share: the tensor's device as the current one, its stream, new tensors, products by torch.
//
// The same sources make the emulated operators, which take tensors on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cstring>

#include "torch/tensors.h"

#ifdef RNNKERN_EMULATED
#include "emulator/emulator.h"
#define RNNKERN_GPU_KEY CPU
#else
#include <dlfcn.h>
#define RNNKERN_GPU_KEY CUDA
#endif

namespace rnnkern {

#ifndef RNNKERN_EMULATED
// torch's function is in libtorch_cuda, which this library cannot name, or it would not load with a torch without CUDA;
// and which torch opens for itself alone, so that its symbols have to be looked up there.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    const char* const name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    void* const library = found ? nullptr : dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (library) found = dlsym(library, name);
    return reinterpret_cast<Get>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "rnnkern: torch's libtorch_cuda.so is not loaded, or has no stream to give");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}
#endif

// While it exists, tensors may be handed to kernels, launched on the current stream of x's device.
class Gpu {
 public:
#ifdef RNNKERN_EMULATED
  explicit Gpu(const Tensor& x) : like_(x) {}
  void* stream() const { return nullptr; }
#else
  explicit Gpu(const Tensor& x)
      : like_(x), guard_(x.get_device_index()), stream_(current_stream(x.get_device_index())) {}
  void* stream() const { return stream_; }
#endif

  // Uninitialised, contiguous.
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
    Tensor tensor = torch::stable::new_empty(like_, sizes, type);
#ifdef RNNKERN_EMULATED
    std::memset(tensor.mutable_data_ptr(), 0xFF, size_t(tensor.numel()) * tensor.element_size());  // NaN
#endif
    return tensor;
  }
  Tensor empty(const std::vector<int64_t>& sizes, Dtype dtype) { return empty(sizes, scalar_type_of(dtype)); }

  // A tensor's address, for kernels; null for none.
  void* data(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.device() == like_.device(), "rnnkern: all tensors of a GPU operator must be on one device");
#ifdef RNNKERN_EMULATED
    int64_t span = tensor.numel() > 0;  // elements from the first to the last
    for (int64_t d = 0; span > 0 && d < tensor.dim(); ++d) span += (tensor.size(d) - 1) * tensor.stride(d);
    memory_.add(tensor.const_data_ptr(), size_t(span) * tensor.element_size());
#endif
    return const_cast<void*>(tensor.const_data_ptr());
  }
  void* data(const OptionalTensor& tensor) { return tensor.has_value() ? data(*tensor) : nullptr; }

  static ScalarType scalar_type_of(Dtype dtype) {
    return dtype == Dtype::f64    ? ScalarType::Double
           : dtype == Dtype::bf16 ? ScalarType::BFloat16
           : dtype == Dtype::f16  ? ScalarType::Half
                                  : ScalarType::Float;
  }

 private:
  const Tensor like_;
#ifdef RNNKERN_EMULATED
  emulator::GlobalMemory memory_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
  void* const stream_;
#endif
};

template <class... Arguments>
Tensor call_torch(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's functions take these by reference, and leave the tensor itself alone.
inline void zero(Tensor tensor) { torch::stable::zero_(tensor); }
inline Tensor slice(Tensor tensor, int64_t dim, int64_t start, int64_t count) {
  return torch::stable::narrow(tensor, dim, start, count);
}

// out = a b, matrices.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) { call_torch("aten::mm", "out", a, b, out); }

// out = a b, a batch of products of one dtype; out may be in its compute dtype, and sums are in any case.
inline void multiply_batch(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    call_torch("aten::bmm", "out", a, b, out);
    return;
  }
#ifdef RNNKERN_EMULATED  // on the CPU torch has no such product
  call_torch("aten::bmm", "out", torch::stable::to(a, out.scalar_type()), torch::stable::to(b, out.scalar_type()), out);
#else
  call_torch("aten::bmm", "dtype_out", a, b, out.scalar_type(), out);
#endif
}

}  // namespace rnnkern
