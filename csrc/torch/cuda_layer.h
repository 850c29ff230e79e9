// One layer of the GPU operators: its tensors as the engines take them, and what runs it. cuda_layer.cpp has the
// operators of single layers, cuda_stack.cpp those of several.
#pragma once

#include "cuda/engine.h"
#include "torch/gpu.h"
#include "torch/layer_arguments.h"

namespace rnnkern {

// How the caller wants it run.
struct EngineOptions {
  std::string engine;  // or ""
  bool tf32;
};

struct GpuLayer {
  GpuLayer(const std::string& cell, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
           const std::vector<OptionalTensor>& weights, const OptionalTensor& lengths, const OptionalTensor& resets,
           const EngineOptions& options, const GpuLayer* same_rows = nullptr);  // a layer of the same lengths
  GpuLayer(const GpuLayer&) = delete;

  cuda::EngineRequest request(cuda::Pass pass) const {
    return {args.cell, in.dtype, options.engine, pass, options.tf32, in.H, in.B, in.D, longest};
  }
  Tensor workspace(const cuda::EngineChoice& choice) {
    return gpu.empty({int64_t(choice.plan->workspace_bytes)}, ScalarType::Byte);
  }

  const OptionalTensor& weight(int direction, int which) const { return args.weights[size_t(4 * direction + which)]; }
  Tensor stacked(int which) const;  // weights of both directions, one above the other
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
  const int64_t gates;  // G*H
  const Tensor input;   // x, contiguous
  const EngineOptions options;
  OptionalTensor device_lengths, device_offsets;
  cuda::Sequence sequence{};
  int64_t longest = 0;
  bool padded = false;  // a row ends before the last step

 private:
  void bring_lengths();
  void share_lengths(const GpuLayer& other);
};

// What a layer of these would ask for, without one. `lengths`: [B] on the CPU; a layer of packed rows has them.
cuda::EngineRequest request_of(const std::string& cell, const Tensor& x, const Tensor& h0,
                               const OptionalTensor& lengths, const EngineOptions& options, bool backward);

// What forward gives; a tensor without elements is not wanted, or not there.
struct LayerResults {
  Tensor y, h_n, c_n, c_all, saved;
};

// All that the recurrence takes but gx. Results are zero where no engine writes, past a row's end.
cuda::Forward<void, void> forward_arguments(GpuLayer& layer, const LayerResults& out);
void run_forward(GpuLayer& layer, const LayerResults& out);

struct OutputGradients {
  OptionalTensor dy, dh_n, dc_n, dc_all;
};

// What the recurrence leaves in backward, beside the gradients of the initial state.
struct GateGradients {
  Tensor h_before, dgx, dgh;  // [N, D*H], [N, D*G*H], the same
};

// All that the recurrence takes; `dh0` and `dc0`, in the compute type, it gives.
cuda::Backward<void, void> backward_arguments(GpuLayer& layer, const OutputGradients& gradients, const Tensor& y,
                                              const Tensor& saved, double clip, const GateGradients& out,
                                              const Tensor& dh0, const Tensor& dc0);
GateGradients make_gate_gradients(GpuLayer& layer);
GateGradients run_backward(GpuLayer& layer, const OutputGradients& gradients, const Tensor& y, const Tensor& saved,
                           double clip, const Tensor& dh0, const Tensor& dc0);
// Of x, [0] if it is not wanted.
Tensor input_gradient(GpuLayer& layer, const GateGradients& gates, bool wanted);
// Of the 8 weights, [0] where there is none or it is not wanted; `x` is what they were multiplied with, contiguous.
std::vector<Tensor> weight_gradients(GpuLayer& layer, const Tensor& x, const GateGradients& gates, bool wanted);

}  // namespace rnnkern
