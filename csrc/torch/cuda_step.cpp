// A step of decoding on a GPU in one launch, without gradients: a cell, or a cell and its attention.
//
// Compiled twice, like cuda_layer.cpp. Outputs are new: h' cannot lie where h is (cuda/step.h). What is not contiguous
// is copied by torch first. Nothing else is allocated: counters and scratch are the caller's, for all steps of a
// sequence.
#include <limits>
#include <string>

#include "cpu/layer.h"
#include "cuda/launchers.h"
#include "torch/gpu.h"

namespace rnnkern {
namespace {

constexpr int64_t kMostSize =
    std::numeric_limits<int>::max() / 8;  // of a dimension, a state, all queries: kernels count in int

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != int64_t(sizes.size())) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (tensor.size(int64_t(i)) != sizes[i]) return false;
  }
  return true;
}

void check_fits(const char* name, const OptionalTensor& tensor, const std::vector<int64_t>& sizes, ScalarType type) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(has_shape(*tensor, sizes) && tensor->scalar_type() == type, "rnnkern::cuda_cell_step: ", name,
                  " does not fit x, h and the weights");
}

// The arguments of a cell's step, contiguous, and its results.
struct StepArguments {
  StepArguments(const std::string& cell_name, const Tensor& x_, const Tensor& h_, const OptionalTensor& c_,
                const Tensor& w_ih_, const Tensor& w_hh_, const OptionalTensor& b_ih_, const OptionalTensor& b_hh_)
      : cell(find_cell(cell_name)),
        dtype(dtype_of(x_)),
        type(x_.scalar_type()),
        x(make_contiguous(x_)),
        h(make_contiguous(h_)),
        w_ih(make_contiguous(w_ih_)),
        w_hh(make_contiguous(w_hh_)),
        c(make_contiguous(c_)),
        b_ih(make_contiguous(b_ih_)),
        b_hh(make_contiguous(b_hh_)),
        gpu(x) {
    STD_TORCH_CHECK(dtype != Dtype::f64, "rnnkern::cuda_cell_step: float64 has no fused step");
    STD_TORCH_CHECK(x.dim() == 2 && h.dim() == 2, "rnnkern::cuda_cell_step: x must be [B, I] and h [B, H]");
    const int64_t B = x.size(0), I = x.size(1), H = h.size(1);
    const CellTraits& traits = cell_traits()[size_t(cell)];
    const int64_t gates = traits.gates * H;
    STD_TORCH_CHECK(H > 0 && std::max({B, I, gates, B * H}) <= kMostSize,
                    "rnnkern::cuda_cell_step: no hidden unit, or one of B, I, G*H and B*H is above ", kMostSize);
    check_fits("h", h, {B, H}, type);
    check_fits("c", c, {B, H}, ScalarType::Float);
    check_fits("w_ih", w_ih, {gates, I}, type);
    check_fits("w_hh", w_hh, {gates, H}, type);
    check_fits("b_ih", b_ih, {gates}, type);
    check_fits("b_hh", b_hh, {gates}, type);
    STD_TORCH_CHECK((traits.states > 1) == c.has_value(),
                    "rnnkern::cuda_cell_step: c is given for cells of two states");
    h_next = gpu.empty({B, H}, dtype);
    c_next = gpu.empty(c.has_value() ? std::vector<int64_t>{B, H} : std::vector<int64_t>{0}, Dtype::f32);
    step = {int(B),         int(I),           int(H),
            gpu.data(x),    gpu.data(h),      static_cast<const float*>(gpu.data(c)),
            gpu.data(w_ih), gpu.data(w_hh),   gpu.data(b_ih),
            gpu.data(b_hh), gpu.data(h_next), c.has_value() ? static_cast<float*>(gpu.data(c_next)) : nullptr};
  }

  const cuda::FusedStepLaunchers& launchers() const { return cuda::cell_launchers(cell, dtype).fused_step; }

  const int cell;
  const Dtype dtype;
  const ScalarType type;
  const Tensor x, h, w_ih, w_hh;
  const OptionalTensor c, b_ih, b_hh;
  Gpu gpu;
  Tensor h_next, c_next;
  cuda::CellStep<void> step;
};

std::tuple<Tensor, Tensor> cuda_cell_step(std::string cell, Tensor x, Tensor h, OptionalTensor c, Tensor w_ih,
                                          Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh) {
  StepArguments args(cell, x, h, c, w_ih, w_hh, b_ih, b_hh);
  args.launchers().cell(args.step, args.gpu.stream());
  return {args.h_next, args.c_next};
}

Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}
cuda::StepRows<void> rows_of(Gpu& gpu, const Tensor& tensor) {
  return {gpu.data(tensor), tensor.stride(0), tensor.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor> cuda_attention_step(std::string cell, Tensor x, Tensor h, OptionalTensor c,
                                                       Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                                                       OptionalTensor b_hh, OptionalTensor w_query, Tensor key,
                                                       Tensor value, OptionalTensor vector, OptionalTensor lengths,
                                                       double scale, Tensor counters, Tensor scratch) {
  StepArguments args(cell, x, h, c, w_ih, w_hh, b_ih, b_hh);
  Gpu& gpu = args.gpu;
  STD_TORCH_CHECK(key.dim() == 3 && value.dim() == 3, "rnnkern::cuda_attention_step: key and value must be [B, Tk, D]");
  const int64_t B = args.step.B, H = args.step.H, Tk = key.size(1), D = key.size(2), Dv = value.size(2);
  STD_TORCH_CHECK(std::max({D, Dv, B * D}) <= kMostSize, "rnnkern::cuda_attention_step: one of D, Dv and B*D is above ",
                  kMostSize);
  check_fits("key", key, {B, Tk, D}, args.type);
  check_fits("value", value, {B, Tk, Dv}, args.type);
  check_fits("vector", vector, {D}, args.type);
  check_fits("w_query", w_query, {D, H}, args.type);
  check_fits("lengths", lengths, {B}, ScalarType::Long);
  STD_TORCH_CHECK(w_query.has_value() || D == H,
                  "rnnkern::cuda_attention_step: without w_query keys must be as large as h");
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Int && counters.is_contiguous() &&
                      counters.numel() == cuda::step_counters(B),
                  "rnnkern::cuda_attention_step: counters must be int32 [", cuda::step_counters(B), "]");
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Float && scratch.is_contiguous() &&
                      scratch.numel() >= cuda::step_scratch(B, Tk, D, Dv),
                  "rnnkern::cuda_attention_step: scratch must be float32 [", cuda::step_scratch(B, Tk, D, Dv),
                  "] or more");
  const Tensor keys = contiguous_rows(key), values = contiguous_rows(value);
  const OptionalTensor project = make_contiguous(w_query), weights = make_contiguous(vector);
  const OptionalTensor valid = make_contiguous(lengths);
  Tensor context = gpu.empty({B, Dv}, args.dtype);
  float* const query = static_cast<float*>(gpu.data(scratch));
  args.launchers().attention(
      {args.step, Tk, int(D), int(Dv), gpu.data(project), rows_of(gpu, keys), rows_of(gpu, values), gpu.data(weights),
       float(scale), static_cast<const int64_t*>(gpu.data(valid)), gpu.data(context), query, query + B * D,
       static_cast<unsigned*>(gpu.data(counters))},
      gpu.stream());
  return {args.h_next, args.c_next, context};
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, RNNKERN_GPU_KEY, m) {
  m.impl("cuda_cell_step", TORCH_BOX(&cuda_cell_step));
  m.impl("cuda_attention_step", TORCH_BOX(&cuda_attention_step));
}

}  // namespace
}  // namespace rnnkern
