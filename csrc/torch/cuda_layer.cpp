// The recurrent layer on a GPU: x W_ih^T by torch, the recurrence by an engine, gradients of weights by torch.
//
// Compiled twice: for CUDA tensors, and, with emulated kernels, for tensors on the CPU.
#include <algorithm>
#include <limits>

#include "cuda/engine.h"
#include "cuda/lengths.h"
#include "torch/gpu.h"
#include "torch/layer_arguments.h"

namespace rnnkern {
namespace {

using cuda::Backward;
using cuda::Forward;

struct GpuLayer {
  GpuLayer(const std::string& cell, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
           const std::vector<OptionalTensor>& weights, const OptionalTensor& lengths, const OptionalTensor& resets,
           std::string engine_, bool tf32_)
      : args(cell, x, h0, c0, weights, lengths, resets),
        gpu(args.x),
        in(args.in),
        traits(cell_traits()[size_t(args.cell)]),
        launchers(cuda::cell_launchers(args.cell, in.dtype)),
        gates(traits.gates * in.H),
        input(make_contiguous(args.x)),
        engine(std::move(engine_)),
        tf32(tf32_) {
    STD_TORCH_CHECK(std::max({in.T, in.B, in.H, args.rows}) <= std::numeric_limits<int>::max(),
                    "rnnkern::cuda_layer: more steps, rows or hidden units than 2^31 - 1, which kernels count to");
    sequence.T = in.T;
    sequence.N = args.rows;
    sequence.B = int(in.B);
    sequence.D = in.D;
    if (in.lengths) {
      longest = 0;
      for (int64_t b = 0; b < in.B; ++b) {
        longest = std::max(longest, in.lengths[b]);
        padded = padded || (!in.packed_rows && in.lengths[b] < in.T);
      }
      device_lengths = gpu.empty({in.B}, ScalarType::Long);
      int64_t* const lengths = static_cast<int64_t*>(gpu.data(*device_lengths));
      cuda::place_lengths(in.lengths, in.B, lengths, gpu.stream());
      sequence.lengths = lengths;
      if (in.packed_rows) {
        device_offsets = gpu.empty({in.T + 1}, ScalarType::Long);
        int64_t* const offsets = static_cast<int64_t*>(gpu.data(*device_offsets));
        cuda::place_offsets(lengths, in.B, in.T, offsets, gpu.stream());
        sequence.offsets = offsets;
      }
    } else {
      longest = in.T;
    }
    if (args.resets.has_value()) sequence.resets = static_cast<const uint8_t*>(gpu.data(*args.resets));
  }

  cuda::EngineChoice choose(cuda::Pass pass) const {
    return cuda::choose_engine(args.cell, in.dtype, engine, pass, tf32, in.H, in.B, in.D);
  }
  Tensor workspace(const cuda::EngineChoice& choice) {
    return gpu.empty({int64_t(choice.plan.workspace_bytes)}, ScalarType::Byte);
  }

  const OptionalTensor& weight(int direction, int which) const { return args.weights[size_t(4 * direction + which)]; }

  // Weights of both directions, one above the other.
  Tensor stacked(int which) const {
    if (in.D == 1) return *weight(0, which);
    return call_torch("aten::cat", "", std::vector<Tensor>{*weight(0, which), *weight(1, which)}, int64_t(0));
  }
  Tensor recurrent_batch() const {  // [D, G*H, H]
    return torch::stable::view(stacked(1), {in.D, gates, in.H});
  }

  Tensor flat(const Tensor& tensor, int64_t columns) const { return torch::stable::view(tensor, {args.rows, columns}); }

  // Bytes of what forward keeps: c before each step in the compute type, then the cell's values in the storage type.
  int64_t kept_c() const { return args.rows * in.D * in.H * (traits.states - 1); }
  int64_t kept_values() const { return args.rows * in.D * in.H * traits.saved; }
  int64_t saved_elements() const {
    const int64_t size = dtype_size(in.dtype), compute = compute_size(in.dtype);
    return kept_c() + (kept_values() * size + compute - 1) / compute;
  }
  char* values_of(void* saved) const { return static_cast<char*>(saved) + kept_c() * compute_size(in.dtype); }

  LayerArguments args;
  Gpu gpu;
  const LayerInputs& in;
  const CellTraits& traits;
  const cuda::CellLaunchers& launchers;
  const int64_t gates;       // G*H
  const Tensor input;        // x, contiguous
  const std::string engine;  // that the caller wants, or ""
  const bool tf32;
  OptionalTensor device_lengths, device_offsets;
  cuda::Sequence sequence{};
  int64_t longest = 0;
  bool padded = false;  // a row ends before the last step
};

struct Results {
  Tensor y, h_n, c_n, c_all, saved;
};

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

Results run_forward(GpuLayer& layer, bool return_states, bool save) {
  const LayerInputs& in = layer.in;
  const Dtype dtype = in.dtype, compute = compute_dtype(dtype);
  Gpu& gpu = layer.gpu;
  const bool two_states = layer.args.two_states(), all = return_states && two_states;
  const std::vector<int64_t> none = {0}, states = {in.D, in.B, in.H}, outputs = layer.args.sequence(in.D * in.H);
  Results out{gpu.empty(outputs, dtype), gpu.empty(states, dtype), gpu.empty(two_states ? states : none, compute),
              gpu.empty(all ? outputs : none, compute),
              gpu.empty(save ? std::vector<int64_t>{layer.saved_elements()} : none, compute)};
  if (layer.padded) {
    torch::stable::zero_(out.y);
    torch::stable::zero_(out.c_all);
  }
  Tensor gx = gpu.empty({layer.args.rows, in.D * layer.gates}, dtype);
  if (layer.args.rows > 0)
    multiply(gx, layer.flat(layer.input, in.I), torch::stable::transpose(layer.stacked(0), 0, 1));

  Forward<void, void> forward{};
  forward.sequence = layer.sequence;
  forward.H = int(in.H);
  forward.gx = gpu.data(gx);
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
  forward.c_all = all ? gpu.data(out.c_all) : nullptr;
  if (save) {
    void* const saved = gpu.data(out.saved);
    forward.saved = layer.values_of(saved);
    forward.c_before = two_states ? saved : nullptr;
  }
  const cuda::EngineChoice choice = layer.choose(cuda::Pass::forward);
  if (choice.persistent) {
    Tensor workspace = layer.workspace(choice);
    layer.launchers.persistent.forward(choice.plan, choice.engine, choice.product, forward, gpu.data(workspace),
                                       gpu.stream());
  } else {
    run_stepwise(layer, forward);
  }
  return out;
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

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients run_backward(GpuLayer& layer, OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                       OptionalTensor dc_all, Tensor y, const Tensor& saved, bool need_dx, bool need_dh0, bool need_dw,
                       double clip) {
  const LayerInputs& in = layer.in;
  const Dtype dtype = in.dtype, compute = compute_dtype(dtype);
  Gpu& gpu = layer.gpu;
  const int64_t rows = layer.args.rows, D = in.D, H = in.H, G = layer.gates;
  const bool two_states = layer.args.two_states();
  const std::vector<int64_t> none = {0}, states = {D, in.B, H};

  Tensor h_before = gpu.empty({rows, D * H}, dtype);
  void* const before = gpu.data(h_before);
  layer.launchers.stepwise.previous_h({layer.sequence, int(H), gpu.data(layer.args.h0), gpu.data(y), before},
                                      gpu.stream());
  Tensor dgh = gpu.empty({rows, D * G}, dtype);
  Tensor dgx = layer.traits.split_gates > 0 ? gpu.empty({rows, D * G}, dtype) : dgh;
  if (layer.padded) {
    torch::stable::zero_(dgh);
    torch::stable::zero_(dgx);
  }
  Tensor dh0 = gpu.empty(states, compute), dc0 = gpu.empty(two_states ? states : none, compute);

  Backward<void, void> backward{};
  backward.sequence = layer.sequence;
  backward.H = int(H);
  for (int d = 0; d < D; ++d) backward.w_hh[d] = gpu.data(layer.weight(d, 1));
  backward.dy = gpu.data(dy);
  backward.dh_n = gpu.data(dh_n);
  backward.dc_n = two_states ? gpu.data(dc_n) : nullptr;
  backward.dc_all = two_states ? gpu.data(dc_all) : nullptr;
  void* const kept = gpu.data(saved);
  backward.saved = layer.values_of(kept);
  backward.c_before = two_states ? kept : nullptr;
  backward.h_before = before;
  backward.clip = clip;
  backward.dgx = gpu.data(dgx);
  backward.dgh = gpu.data(dgh);
  backward.dh0 = gpu.data(dh0);
  backward.dc0 = two_states ? gpu.data(dc0) : nullptr;
  const cuda::EngineChoice choice = layer.choose(cuda::Pass::backward);
  if (choice.persistent) {
    Tensor workspace = layer.workspace(choice);
    layer.launchers.persistent.backward(choice.plan, choice.engine, choice.product, backward, gpu.data(workspace),
                                        gpu.stream());
  } else {
    run_stepwise(layer, backward);
  }

  // Padding of x may hold anything, and zero times NaN is NaN.
  Tensor x = layer.input;
  if (need_dw && layer.padded) {
    x = gpu.empty({rows, in.I}, dtype);
    layer.launchers.stepwise.without_padding({layer.sequence, in.I, gpu.data(layer.input), gpu.data(x)}, gpu.stream());
  }
  Tensor dx = gpu.empty(need_dx ? layer.args.sequence(in.I) : none, dtype);
  if (need_dx && rows > 0) multiply(layer.flat(dx, in.I), dgx, layer.stacked(0));
  Tensor dw[8];
  for (int i = 0; i < 8; ++i) {
    const bool wanted = need_dw && layer.args.weights[size_t(i)].has_value();
    const int d = i / 4, which = i % 4;
    dw[i] = gpu.empty(!wanted      ? none
                      : which == 0 ? std::vector<int64_t>{G, in.I}
                      : which == 1 ? std::vector<int64_t>{G, H}
                                   : std::vector<int64_t>{G},
                      dtype);
    if (!wanted) continue;
    const Tensor gradient = torch::stable::narrow(which % 2 == 0 ? dgx : dgh, 1, d * G, G);  // [N, G*H]
    if (rows == 0)
      torch::stable::zero_(dw[i]);
    else if (which == 0)
      multiply(dw[i], torch::stable::transpose(gradient, 0, 1), layer.flat(x, in.I));
    else if (which == 1)
      multiply(dw[i], torch::stable::transpose(gradient, 0, 1), torch::stable::narrow(h_before, 1, d * H, H));
    else
      dw[i] = torch::stable::sum(gradient, std::vector<int64_t>{0});
  }
  if (!need_dh0) dh0 = dc0 = gpu.empty(none, compute);
  if (compute != dtype) dh0 = torch::stable::to(dh0, Gpu::scalar_type_of(dtype));
  return {dx, dh0, dc0, dw[0], dw[1], dw[2], dw[3], dw[4], dw[5], dw[6], dw[7]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_layer(std::string cell, Tensor x, Tensor h0, OptionalTensor c0,
                                                              RNNKERN_WEIGHT_ARGUMENTS, OptionalTensor lengths,
                                                              OptionalTensor resets, bool return_states,
                                                              [[maybe_unused]] double grad_clip, std::string engine,
                                                              bool tf32) {
  GpuLayer layer(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets, engine, tf32);
  Results out = run_forward(layer, return_states, true);
  return {out.y, out.h_n, out.c_n, out.c_all, out.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_layer_inference(std::string cell, Tensor x, Tensor h0,
                                                                OptionalTensor c0, RNNKERN_WEIGHT_ARGUMENTS,
                                                                OptionalTensor lengths, OptionalTensor resets,
                                                                bool return_states, std::string engine, bool tf32) {
  GpuLayer layer(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets, engine, tf32);
  Results out = run_forward(layer, return_states, false);
  return {out.y, out.h_n, out.c_n, out.c_all};
}

Gradients cuda_layer_backward(std::string cell, OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                              OptionalTensor dc_all, Tensor x, Tensor h0, OptionalTensor c0, RNNKERN_WEIGHT_ARGUMENTS,
                              OptionalTensor lengths, OptionalTensor resets, Tensor y, Tensor saved, bool need_dx,
                              bool need_dh0, bool need_dw, double grad_clip, std::string engine, bool tf32) {
  GpuLayer layer(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets, engine, tf32);
  const LayerInputs& in = layer.in;
  check_gradients(layer.args, dy, dh_n, dc_n, dc_all, y);
  STD_TORCH_CHECK(saved.numel() == layer.saved_elements() && dtype_of(saved) == compute_dtype(in.dtype),
                  "rnnkern::cuda_layer_backward: saved must be that of the forward call");
  return run_backward(layer, make_contiguous(dy), make_contiguous(dh_n), make_contiguous(dc_n), make_contiguous(dc_all),
                      make_contiguous(y), saved, need_dx, need_dh0, need_dw, grad_clip);
}

std::string cuda_plan(std::string cell, Tensor x, Tensor h0, std::string engine, bool tf32, bool backward) {
  const Gpu gpu(x);
  return cuda::choose_engine(find_cell(cell), dtype_of(x), engine,
                             backward ? cuda::Pass::backward : cuda::Pass::forward, tf32, h0.size(2), h0.size(1),
                             int(h0.size(0)))
      .describe();
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, RNNKERN_GPU_KEY, m) {
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
  m.impl("cuda_layer", TORCH_BOX(&cuda_layer));
  m.impl("cuda_layer_inference", TORCH_BOX(&cuda_layer_inference));
  m.impl("cuda_layer_backward", TORCH_BOX(&cuda_layer_backward));
}

}  // namespace
}  // namespace rnnkern
