// The recurrent layer on a GPU: x W_ih^T by torch, the recurrence by an engine, gradients of weights by torch.
//
// Compiled twice: for CUDA tensors, and, with emulated kernels, for tensors on the CPU.
#include "torch/cuda_layer.h"

#include <algorithm>
#include <limits>

#include "cuda/lengths.h"

namespace rnnkern {

using cuda::Backward;
using cuda::Forward;

GpuLayer::GpuLayer(const std::string& cell, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                   const std::vector<OptionalTensor>& weights, const OptionalTensor& lengths,
                   const OptionalTensor& resets, const EngineOptions& options_, const GpuLayer* same_rows)
    : args(cell, x, h0, c0, weights, lengths, resets),
      gpu(args.x),
      in(args.in),
      traits(cell_traits()[size_t(args.cell)]),
      launchers(cuda::cell_launchers(args.cell, in.dtype)),
      gates(traits.gates * in.H),
      input(make_contiguous(args.x)),
      options(options_) {
  STD_TORCH_CHECK(std::max({in.T, in.B, in.H, args.rows}) <= std::numeric_limits<int>::max(),
                  "rnnkern::cuda_layer: more steps, rows or hidden units than 2^31 - 1, which kernels count to");
  sequence.T = in.T;
  sequence.N = args.rows;
  sequence.B = int(in.B);
  sequence.D = in.D;
  longest = in.T;
  if (in.lengths && same_rows)
    share_lengths(*same_rows);
  else if (in.lengths)
    bring_lengths();
  if (args.resets.has_value()) sequence.resets = static_cast<const uint8_t*>(gpu.data(*args.resets));
}

void GpuLayer::bring_lengths() {
  longest = 0;
  for (int64_t b = 0; b < in.B; ++b) {
    longest = std::max(longest, in.lengths[b]);
    padded = padded || (!in.packed_rows && in.lengths[b] < in.T);
  }
  device_lengths = gpu.empty({in.B}, ScalarType::Long);
  int64_t* const on_device = static_cast<int64_t*>(gpu.data(*device_lengths));
  cuda::place_lengths(in.lengths, in.B, on_device, gpu.stream());
  sequence.lengths = on_device;
  if (!in.packed_rows) return;
  device_offsets = gpu.empty({in.T + 1}, ScalarType::Long);
  int64_t* const offsets = static_cast<int64_t*>(gpu.data(*device_offsets));
  cuda::place_offsets(on_device, in.B, in.T, offsets, gpu.stream());
  sequence.offsets = offsets;
}

void GpuLayer::share_lengths(const GpuLayer& other) {
  longest = other.longest;
  padded = other.padded;
  device_lengths = other.device_lengths;
  device_offsets = other.device_offsets;
  sequence.lengths = static_cast<const int64_t*>(gpu.data(device_lengths));
  sequence.offsets = static_cast<const int64_t*>(gpu.data(device_offsets));
}

Tensor GpuLayer::stacked(int which) const {
  if (in.D == 1) return *weight(0, which);
  return call_torch("aten::cat", "", std::vector<Tensor>{*weight(0, which), *weight(1, which)}, int64_t(0));
}

cuda::EngineRequest request_of(const std::string& cell, const Tensor& x, const Tensor& h0,
                               const OptionalTensor& lengths, const EngineOptions& options, bool backward) {
  STD_TORCH_CHECK(h0.dim() == 3 && x.dim() >= 2, "rnnkern: to plan a layer takes h0 [D, B, H], and x of steps");
  const int64_t B = h0.size(1);
  int64_t T = x.dim() == 3 ? x.size(0) : 0;
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->numel() == B && lengths->scalar_type() == ScalarType::Long && lengths->is_cpu(),
                    "rnnkern: to plan a layer takes lengths int64 [B] on the CPU");
    const Tensor steps = make_contiguous(*lengths);
    const int64_t* const length = static_cast<const int64_t*>(steps.const_data_ptr());
    T = B > 0 ? *std::max_element(length, length + B) : 0;
  }
  return {find_cell(cell),
          dtype_of(x),
          options.engine,
          backward ? cuda::Pass::backward : cuda::Pass::forward,
          options.tf32,
          h0.size(2),
          B,
          int(h0.size(0)),
          T};
}

namespace {

void run_stepwise(GpuLayer& layer, const Forward<void, void>& forward) {
  const LayerInputs& in = layer.in;
  const Dtype compute = compute_dtype(in.dtype);
  Tensor h = layer.gpu.empty({in.D, in.B, in.H}, in.dtype), gh = layer.gpu.empty({in.D, in.B, layer.gates}, compute);
  OptionalTensor c;
  if (layer.args.two_states()) c = layer.gpu.empty({in.D, in.B, in.H}, compute);
  const Tensor w = torch::stable::transpose(layer.recurrent_batch(), 1, 2);
  cuda::StepForward<void, void> step{forward, 0, layer.gpu.data(h), layer.gpu.data(c), layer.gpu.data(gh)};
  layer.launchers.stepwise.begin(step, layer.gpu.stream());
  for (; step.step < layer.longest; ++step.step) {
    multiply_batch(gh, h, w);
    layer.launchers.stepwise.next_step(step, layer.gpu.stream());
  }
}

void run_stepwise(GpuLayer& layer, const Backward<void, void>& backward) {
  const LayerInputs& in = layer.in;
  const Dtype compute = compute_dtype(in.dtype);
  const std::vector<int64_t> states = {in.D, in.B, in.H};
  Gpu& gpu = layer.gpu;
  Tensor dgh = gpu.empty({in.D, in.B, layer.gates}, in.dtype);
  Tensor product = gpu.empty(states, compute), direct = gpu.empty(states, compute);
  OptionalTensor dc;
  if (layer.args.two_states()) dc = gpu.empty(states, compute);
  const Tensor w = layer.recurrent_batch();
  cuda::StepBackward<void, void> step{backward,          layer.longest,    gpu.data(dgh),
                                      gpu.data(product), gpu.data(direct), gpu.data(dc)};
  while (step.step-- > 0) {
    layer.launchers.stepwise.step_backward(step, gpu.stream());
    multiply_batch(product, dgh, w);
  }
  layer.launchers.stepwise.end_backward(step, gpu.stream());
}

}  // namespace

Forward<void, void> forward_arguments(GpuLayer& layer, const LayerResults& out) {
  const LayerInputs& in = layer.in;
  Gpu& gpu = layer.gpu;
  const bool two_states = layer.args.two_states();
  if (layer.padded) {
    zero(out.y);
    zero(out.c_all);
  }
  Forward<void, void> forward{};
  forward.sequence = layer.sequence;
  forward.H = int(in.H);
  for (int d = 0; d < in.D; ++d) {
    forward.w_hh[d] = gpu.data(layer.weight(d, 1));
    forward.b_ih[d] = gpu.data(layer.weight(d, 2));
    forward.b_hh[d] = gpu.data(layer.weight(d, 3));
  }
  forward.h0 = gpu.data(layer.args.h0);
  forward.c0 = gpu.data(layer.args.c0);
  forward.y = gpu.data(out.y);
  forward.h_n = gpu.data(out.h_n);
  forward.c_n = two_states ? gpu.data(out.c_n) : nullptr;
  forward.c_all = out.c_all.numel() > 0 ? gpu.data(out.c_all) : nullptr;
  if (out.saved.numel() > 0) {
    void* const saved = gpu.data(out.saved);
    forward.saved = layer.values_of(saved);
    forward.c_before = two_states ? saved : nullptr;
  }
  return forward;
}

void run_forward(GpuLayer& layer, const LayerResults& out) {
  Gpu& gpu = layer.gpu;
  Tensor gx = gpu.empty({layer.args.rows, layer.in.D * layer.gates}, layer.in.dtype);
  if (layer.args.rows > 0)
    multiply(gx, layer.flat(layer.input, layer.in.I), torch::stable::transpose(layer.stacked(0), 0, 1));
  Forward<void, void> forward = forward_arguments(layer, out);
  forward.gx = gpu.data(gx);
  const cuda::EngineChoice choice = cuda::choose_engine(layer.request(cuda::Pass::forward));
  if (choice.persistent) {
    Tensor workspace = layer.workspace(choice);
    layer.launchers.persistent.forward(*choice.plan, choice.engine, choice.product, forward, gpu.data(workspace),
                                       gpu.stream());
  } else {
    run_stepwise(layer, forward);
  }
}

GateGradients make_gate_gradients(GpuLayer& layer) {
  const std::vector<int64_t> gates = {layer.args.rows, layer.in.D * layer.gates};
  Gpu& gpu = layer.gpu;
  const Dtype dtype = layer.in.dtype;
  GateGradients out{gpu.empty({layer.args.rows, layer.in.D * layer.in.H}, dtype), gpu.empty(gates, dtype),
                    gpu.empty({0}, dtype)};
  out.dgh = layer.traits.split_gates > 0 ? gpu.empty(gates, dtype) : out.dgx;
  if (layer.padded) {
    zero(out.dgx);
    zero(out.dgh);
  }
  return out;
}

Backward<void, void> backward_arguments(GpuLayer& layer, const OutputGradients& gradients, const Tensor& y,
                                        const Tensor& saved, double clip, const GateGradients& out, const Tensor& dh0,
                                        const Tensor& dc0) {
  const LayerInputs& in = layer.in;
  Gpu& gpu = layer.gpu;
  const bool two_states = layer.args.two_states();
  void* const before = gpu.data(out.h_before);
  layer.launchers.stepwise.previous_h({layer.sequence, int(in.H), gpu.data(layer.args.h0), gpu.data(y), before},
                                      gpu.stream());
  Backward<void, void> backward{};
  backward.sequence = layer.sequence;
  backward.H = int(in.H);
  for (int d = 0; d < in.D; ++d) backward.w_hh[d] = gpu.data(layer.weight(d, 1));
  backward.dy = gpu.data(gradients.dy);
  backward.dh_n = gpu.data(gradients.dh_n);
  backward.dc_n = two_states ? gpu.data(gradients.dc_n) : nullptr;
  backward.dc_all = two_states ? gpu.data(gradients.dc_all) : nullptr;
  void* const kept = gpu.data(saved);
  backward.saved = layer.values_of(kept);
  backward.c_before = two_states ? kept : nullptr;
  backward.h_before = before;
  backward.clip = clip;
  backward.dgx = gpu.data(out.dgx);
  backward.dgh = gpu.data(out.dgh);
  backward.dh0 = gpu.data(dh0);
  backward.dc0 = two_states ? gpu.data(dc0) : nullptr;
  return backward;
}

GateGradients run_backward(GpuLayer& layer, const OutputGradients& gradients, const Tensor& y, const Tensor& saved,
                           double clip, const Tensor& dh0, const Tensor& dc0) {
  Gpu& gpu = layer.gpu;
  const GateGradients out = make_gate_gradients(layer);
  const Backward<void, void> backward = backward_arguments(layer, gradients, y, saved, clip, out, dh0, dc0);
  const cuda::EngineChoice choice = cuda::choose_engine(layer.request(cuda::Pass::backward));
  if (choice.persistent) {
    Tensor workspace = layer.workspace(choice);
    layer.launchers.persistent.backward(*choice.plan, choice.engine, choice.product, backward, gpu.data(workspace),
                                        gpu.stream());
  } else {
    run_stepwise(layer, backward);
  }
  return out;
}

Tensor input_gradient(GpuLayer& layer, const GateGradients& gates, bool wanted) {
  const LayerInputs& in = layer.in;
  Tensor dx = layer.gpu.empty(wanted ? layer.args.sequence(in.I) : std::vector<int64_t>{0}, in.dtype);
  if (wanted && layer.args.rows > 0) multiply(layer.flat(dx, in.I), gates.dgx, layer.stacked(0));
  return dx;
}

std::vector<Tensor> weight_gradients(GpuLayer& layer, const Tensor& input, const GateGradients& gates, bool need_dw) {
  const LayerInputs& in = layer.in;
  Gpu& gpu = layer.gpu;
  const int64_t rows = layer.args.rows, H = in.H, G = layer.gates;
  // Padding of x may hold anything, and zero times NaN is NaN.
  Tensor x = input;
  if (need_dw && layer.padded) {
    x = gpu.empty({rows, in.I}, in.dtype);
    layer.launchers.stepwise.without_padding({layer.sequence, in.I, gpu.data(input), gpu.data(x)}, gpu.stream());
  }
  std::vector<Tensor> dw;
  for (int i = 0; i < 8; ++i) {
    const bool wanted = need_dw && layer.args.weights[size_t(i)].has_value();
    const int d = i / 4, which = i % 4;
    dw.push_back(gpu.empty(!wanted      ? std::vector<int64_t>{0}
                           : which == 0 ? std::vector<int64_t>{G, in.I}
                           : which == 1 ? std::vector<int64_t>{G, H}
                                        : std::vector<int64_t>{G},
                           in.dtype));
    if (!wanted) continue;
    const Tensor gradient = slice(which % 2 == 0 ? gates.dgx : gates.dgh, 1, d * G, G);  // [N, G*H]
    if (rows == 0)
      zero(dw.back());
    else if (which == 0)
      multiply(dw.back(), torch::stable::transpose(gradient, 0, 1), layer.flat(x, in.I));
    else if (which == 1)
      multiply(dw.back(), torch::stable::transpose(gradient, 0, 1), slice(gates.h_before, 1, d * H, H));
    else
      dw.back() = torch::stable::sum(gradient, std::vector<int64_t>{0});
  }
  return dw;
}

namespace {

LayerResults run(GpuLayer& layer, bool return_states, bool save) {
  const LayerInputs& in = layer.in;
  const Dtype dtype = in.dtype, compute = compute_dtype(dtype);
  Gpu& gpu = layer.gpu;
  const bool two_states = layer.args.two_states(), all = return_states && two_states;
  const std::vector<int64_t> none = {0}, states = {in.D, in.B, in.H}, outputs = layer.args.sequence(in.D * in.H);
  const LayerResults out{gpu.empty(outputs, dtype), gpu.empty(states, dtype),
                         gpu.empty(two_states ? states : none, compute), gpu.empty(all ? outputs : none, compute),
                         gpu.empty(save ? std::vector<int64_t>{layer.saved_elements()} : none, compute)};
  run_forward(layer, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_layer(std::string cell, Tensor x, Tensor h0, OptionalTensor c0,
                                                              RNNKERN_WEIGHT_ARGUMENTS, OptionalTensor lengths,
                                                              OptionalTensor resets, bool return_states,
                                                              [[maybe_unused]] double grad_clip, std::string engine,
                                                              bool tf32) {
  GpuLayer layer(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets, {engine, tf32});
  const LayerResults out = run(layer, return_states, true);
  return {out.y, out.h_n, out.c_n, out.c_all, out.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_layer_inference(std::string cell, Tensor x, Tensor h0,
                                                                OptionalTensor c0, RNNKERN_WEIGHT_ARGUMENTS,
                                                                OptionalTensor lengths, OptionalTensor resets,
                                                                bool return_states, std::string engine, bool tf32) {
  GpuLayer layer(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets, {engine, tf32});
  const LayerResults out = run(layer, return_states, false);
  return {out.y, out.h_n, out.c_n, out.c_all};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients cuda_layer_backward(std::string cell, OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                              OptionalTensor dc_all, Tensor x, Tensor h0, OptionalTensor c0, RNNKERN_WEIGHT_ARGUMENTS,
                              OptionalTensor lengths, OptionalTensor resets, Tensor y, Tensor saved, bool need_dx,
                              bool need_dh0, bool need_dw, double grad_clip, std::string engine, bool tf32) {
  GpuLayer layer(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets, {engine, tf32});
  const LayerInputs& in = layer.in;
  check_gradients(layer.args, dy, dh_n, dc_n, dc_all, y);
  const Dtype compute = compute_dtype(in.dtype);
  STD_TORCH_CHECK(saved.numel() == layer.saved_elements() && dtype_of(saved) == compute,
                  "rnnkern::cuda_layer_backward: saved must be that of the forward call");
  const std::vector<int64_t> none = {0}, states = {in.D, in.B, in.H};
  Gpu& gpu = layer.gpu;
  Tensor dh0 = gpu.empty(states, compute), dc0 = gpu.empty(layer.args.two_states() ? states : none, compute);
  const GateGradients gates =
      run_backward(layer, {make_contiguous(dy), make_contiguous(dh_n), make_contiguous(dc_n), make_contiguous(dc_all)},
                   make_contiguous(y), saved, grad_clip, dh0, dc0);
  const Tensor dx = input_gradient(layer, gates, need_dx);
  const std::vector<Tensor> dw = weight_gradients(layer, layer.input, gates, need_dw);
  if (!need_dh0) dh0 = dc0 = gpu.empty(none, compute);
  if (compute != in.dtype) dh0 = torch::stable::to(dh0, Gpu::scalar_type_of(in.dtype));
  return {dx, dh0, dc0, dw[0], dw[1], dw[2], dw[3], dw[4], dw[5], dw[6], dw[7]};
}

std::string cuda_plan(std::string cell, Tensor x, Tensor h0, OptionalTensor lengths, std::string engine, bool tf32,
                      bool backward) {
  const Gpu gpu(x);
  return cuda::choose_engine(request_of(cell, x, h0, lengths, {engine, tf32}, backward)).describe();
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, RNNKERN_GPU_KEY, m) {
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
  m.impl("cuda_layer", TORCH_BOX(&cuda_layer));
  m.impl("cuda_layer_inference", TORCH_BOX(&cuda_layer_inference));
  m.impl("cuda_layer_backward", TORCH_BOX(&cuda_layer_backward));
}

}  // namespace
}  // namespace rnnkern
