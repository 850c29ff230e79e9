// The attention operators on a GPU.
//
// Compiled twice: for CUDA tensors, and, with emulated kernels, for tensors on the CPU.
#include "cuda/attention.h"
#include "cuda/lengths.h"
#include "torch/attention_arguments.h"
#include "torch/gpu.h"

namespace rnnkern {
namespace {

struct GpuAttention {
  GpuAttention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& vector,
               const OptionalTensor& lengths, const OptionalTensor& mask, const std::string& score, double scale)
      : args(query, key, value, vector, lengths, mask, score, scale), gpu(args.query), in(args.in) {
    STD_TORCH_CHECK(in.dtype != Dtype::f64, "rnnkern::cuda_attention: float64 is not supported");
    for (const OptionalTensor& tensor : {OptionalTensor(args.query), OptionalTensor(args.key),
                                         OptionalTensor(args.value), args.vector, args.lengths, args.mask}) {
      gpu.data(tensor);
    }
  }

  // Memory for `bytes`, which lives as long as this.
  void* scratch(int64_t bytes) {
    scratch_ = gpu.empty({bytes}, ScalarType::Byte);
    return gpu.data(scratch_);
  }

  const AttentionArguments args;
  Gpu gpu;
  const AttentionInputs& in;

 private:
  OptionalTensor scratch_;
};

Rows rows_on(Gpu& gpu, const OptionalTensor& tensor) {
  gpu.data(tensor);
  return rows_of(tensor);
}

std::tuple<Tensor, Tensor> cuda_attention(Tensor query, Tensor key, Tensor value, OptionalTensor vector,
                                          OptionalTensor lengths, OptionalTensor mask, std::string score, double scale,
                                          bool need_weights) {
  GpuAttention call(query, key, value, vector, lengths, mask, score, scale);
  const AttentionInputs& in = call.in;
  Tensor context = call.gpu.empty({in.B, in.Tq, in.Dv}, in.dtype);
  Tensor weights =
      call.gpu.empty(need_weights ? std::vector<int64_t>{in.B, in.Tq, in.Tk} : std::vector<int64_t>{0}, in.dtype);
  cuda::attention_forward(in, {call.gpu.data(context), need_weights ? call.gpu.data(weights) : nullptr},
                          call.scratch(cuda::attention_forward_scratch(in)), call.gpu.stream());
  return {context, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_attention_backward(OptionalTensor dcontext, OptionalTensor dweights,
                                                                   Tensor query, Tensor key, Tensor value,
                                                                   OptionalTensor vector, OptionalTensor lengths,
                                                                   OptionalTensor mask, std::string score,
                                                                   double scale) {
  GpuAttention call(query, key, value, vector, lengths, mask, score, scale);
  const AttentionInputs& in = call.in;
  Gpu& gpu = call.gpu;
  const OptionalTensor dc = contiguous_rows(dcontext), dw = contiguous_rows(dweights);
  check_gradients(in, dc, dw);
  Tensor dquery = gpu.empty({in.B, in.Tq, in.D}, in.dtype), dkey = gpu.empty({in.B, in.Tk, in.D}, in.dtype);
  Tensor dvalue = gpu.empty({in.B, in.Tk, in.Dv}, in.dtype);
  Tensor dvector = gpu.empty({in.vector ? in.D : 0}, in.dtype);
  cuda::attention_backward(
      in, {rows_on(gpu, dc), rows_on(gpu, dw), gpu.data(dquery), gpu.data(dkey), gpu.data(dvalue), gpu.data(dvector)},
      call.scratch(cuda::attention_backward_scratch(in)), gpu.stream());
  return {dquery, dkey, dvalue, dvector};
}

Tensor cuda_lengths(Tensor lengths, Tensor key) {
  STD_TORCH_CHECK(lengths.is_cpu() && lengths.dim() == 1 && lengths.scalar_type() == ScalarType::Long,
                  "rnnkern::cuda_lengths: lengths must be int64 [B] on the CPU");
  STD_TORCH_CHECK(key.dim() == 3, "rnnkern::cuda_lengths: key must be [B, Tk, D]");
  Gpu gpu(key);
  const Tensor given = make_contiguous(lengths);
  const int64_t B = given.size(0), *const values = static_cast<const int64_t*>(given.const_data_ptr());
  check_lengths(values, B, key.size(1));
  Tensor placed = gpu.empty({B}, ScalarType::Long);
  cuda::place_lengths(values, B, static_cast<int64_t*>(gpu.data(placed)), gpu.stream());
  return placed;
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, RNNKERN_GPU_KEY, m) {
  m.impl("cuda_lengths", TORCH_BOX(&cuda_lengths));
  m.impl("cuda_attention", TORCH_BOX(&cuda_attention));
  m.impl("cuda_attention_inference", TORCH_BOX(&cuda_attention));
  m.impl("cuda_attention_backward", TORCH_BOX(&cuda_attention_backward));
}

}  // namespace
}  // namespace rnnkern
