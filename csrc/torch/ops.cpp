// The recurrent layer's operators: schemas, and what turns tensors into pointers. Shapes are checked in Python, once;
// here only what would read or write out of bounds.
#include "torch/layer_arguments.h"

namespace rnnkern {
namespace {

struct LayerResults {
  Tensor y, h_n, c_n, c_all, saved;
};

LayerResults run_forward(LayerArguments& args, bool return_states, bool save) {
  const LayerInputs& in = args.in;
  const Dtype dtype = in.dtype, compute = compute_dtype(dtype);
  const std::vector<int64_t> none = {0}, states = {in.D, in.B, in.H};
  const std::vector<int64_t> sequence = args.sequence(in.D * in.H);
  const bool all = return_states && args.two_states();
  LayerResults out{make_empty(sequence, dtype), make_empty(states, dtype),
                   make_empty(args.two_states() ? states : none, compute), make_empty(all ? sequence : none, compute),
                   make_pooled(save ? std::vector<int64_t>{saved_size(args.cell, in)} : none, compute)};
  layer_forward(
      args.cell, in,
      {out.y.mutable_data_ptr(), out.h_n.mutable_data_ptr(), args.two_states() ? out.c_n.mutable_data_ptr() : nullptr,
       all ? out.c_all.mutable_data_ptr() : nullptr, save ? out.saved.mutable_data_ptr() : nullptr},
      torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer(std::string cell, Tensor x, Tensor h0, OptionalTensor c0,
                                                         RNNKERN_WEIGHT_ARGUMENTS, OptionalTensor lengths,
                                                         OptionalTensor resets, bool return_states,
                                                         [[maybe_unused]] double grad_clip) {  // is for its backward
  LayerArguments args(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets);
  LayerResults out = run_forward(args, return_states, true);
  return {out.y, out.h_n, out.c_n, out.c_all, out.saved};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs infer(LayerArguments& args, bool return_states, const OptionalTensor& packed) {
  if (packed.has_value() && dtype_of(*packed) == compute_dtype(args.in.dtype) &&
      packed->numel() == packed_size(args.cell, args.in)) {
    args.in.packed = packed->const_data_ptr();
  }
  LayerResults out = run_forward(args, return_states, false);
  return {out.y, out.h_n, out.c_n, out.c_all};
}

Outputs layer_inference(std::string cell, Tensor x, Tensor h0, OptionalTensor c0, RNNKERN_WEIGHT_ARGUMENTS,
                        OptionalTensor lengths, OptionalTensor resets, bool return_states, OptionalTensor packed) {
  LayerArguments args(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets);
  return infer(args, return_states, packed);
}

#define RNNKERN_SCALE_ARGUMENTS \
  Tensor scale_ih, Tensor scale_hh, OptionalTensor scale_ih_reverse, OptionalTensor scale_hh_reverse
#define RNNKERN_SCALES {scale_ih, scale_hh, scale_ih_reverse, scale_hh_reverse}

Outputs layer_int8(std::string cell, Tensor x, Tensor h0, OptionalTensor c0, RNNKERN_WEIGHT_ARGUMENTS,
                   RNNKERN_SCALE_ARGUMENTS, OptionalTensor lengths, OptionalTensor resets, bool return_states,
                   OptionalTensor packed) {
  LayerArguments args(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets, RNNKERN_SCALES);
  return infer(args, return_states, packed);
}

Tensor pack_weights(const std::string& cell, Dtype dtype, const std::vector<OptionalTensor>& weights,
                    const std::vector<OptionalTensor>& scales) {
  const int64_t H = weights[1]->size(1);
  const Tensor x = make_empty({0, 0, weights[0]->size(1)}, dtype);
  const Tensor h0 = make_empty({weights[4].has_value() ? 2 : 1, 0, H}, dtype);
  OptionalTensor c0;
  if (cell_traits()[find_cell(cell)].states > 1) c0 = make_empty({h0.size(0), 0, H}, compute_dtype(dtype));
  const LayerArguments args(cell, x, h0, c0, weights, std::nullopt, std::nullopt, scales);
  Tensor packed = make_empty({packed_size(args.cell, args.in)}, compute_dtype(dtype));
  pack_layer(args.cell, args.in, packed.mutable_data_ptr(), torch_threads());
  return packed;
}

Tensor pack(std::string cell, RNNKERN_WEIGHT_ARGUMENTS) {
  return pack_weights(cell, dtype_of(w_ih), RNNKERN_WEIGHTS, {});
}

Tensor pack_int8(std::string cell, RNNKERN_WEIGHT_ARGUMENTS, RNNKERN_SCALE_ARGUMENTS) {
  return pack_weights(cell, Dtype::f32, RNNKERN_WEIGHTS, RNNKERN_SCALES);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients layer_backward_op(std::string cell, OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                            OptionalTensor dc_all, Tensor x, Tensor h0, OptionalTensor c0, RNNKERN_WEIGHT_ARGUMENTS,
                            OptionalTensor lengths, OptionalTensor resets, Tensor y, Tensor saved, bool need_dx,
                            bool need_dh0, bool need_dw, double grad_clip) {
  LayerArguments args(cell, x, h0, c0, RNNKERN_WEIGHTS, lengths, resets);
  const LayerInputs& in = args.in;
  const Dtype dtype = in.dtype, compute = compute_dtype(dtype);
  const std::vector<int64_t> none = {0}, states = {in.D, in.B, in.H};
  const int64_t rows = cell_traits()[args.cell].gates * in.H;
  dy = make_contiguous(dy);
  dh_n = make_contiguous(dh_n);
  dc_n = make_contiguous(dc_n);
  dc_all = make_contiguous(dc_all);
  y = make_contiguous(y);
  check_gradients(args, dy, dh_n, dc_n, dc_all, y);
  STD_TORCH_CHECK(saved.numel() == saved_size(args.cell, in) && dtype_of(saved) == compute,
                  "rnnkern::layer_backward: saved must be that of the forward call");
  Tensor dx = make_pooled(need_dx ? args.sequence(in.I) : none, dtype);
  Tensor dh0 = make_empty(need_dh0 ? states : none, dtype);
  Tensor dc0 = make_empty(need_dh0 && args.two_states() ? states : none, compute);
  Tensor dw[8];
  for (int i = 0; i < 8; ++i) {
    const bool wanted = need_dw && args.weights[i].has_value();
    const std::vector<int64_t> matrix = {rows, i % 4 == 0 ? in.I : in.H}, vector = {rows};
    dw[i] = make_pooled(!wanted ? none : i % 4 < 2 ? matrix : vector, dtype);
    if (wanted && in.B == 0) torch::stable::zero_(dw[i]);
  }
  LayerGradients grad{};
  grad.dy = data_or_null(dy);
  grad.dh_n = data_or_null(dh_n);
  grad.dc_n = data_or_null(dc_n);
  grad.dc_all = data_or_null(dc_all);
  grad.y = y.const_data_ptr();
  grad.saved = saved.const_data_ptr();
  grad.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  grad.dh0 = need_dh0 ? dh0.mutable_data_ptr() : nullptr;
  grad.dc0 = need_dh0 && args.two_states() ? dc0.mutable_data_ptr() : nullptr;
  grad.need_dw = need_dw;
  grad.clip = grad_clip;
  for (int d = 0; d < in.D && need_dw; ++d) {
    void* data[4];
    for (int i = 0; i < 4; ++i)
      data[i] = args.weights[4 * d + i].has_value() ? dw[4 * d + i].mutable_data_ptr() : nullptr;
    grad.weights[d] = {data[0], data[1], data[2], data[3]};
  }
  layer_backward(args.cell, in, grad, torch_threads());
  return {dx, dh0, dc0, dw[0], dw[1], dw[2], dw[3], dw[4], dw[5], dw[6], dw[7]};
}

#define RNNKERN_WEIGHT_SCHEMA                                                    \
  "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_ih_reverse, " \
  "Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse"
#define RNNKERN_STATE_SCHEMA "Tensor x, Tensor h0, Tensor? c0, "
#define RNNKERN_LAYER_SCHEMA RNNKERN_STATE_SCHEMA RNNKERN_WEIGHT_SCHEMA ", Tensor? lengths, Tensor? resets"
#define RNNKERN_SCALE_SCHEMA "Tensor scale_ih, Tensor scale_hh, Tensor? scale_ih_reverse, Tensor? scale_hh_reverse"
#define RNNKERN_BACKWARD_ARGUMENTS                                                \
  "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, " RNNKERN_LAYER_SCHEMA \
  ", Tensor y, Tensor saved, bool need_dx, bool need_dh0, bool need_dw"
#define RNNKERN_GRADIENT_SCHEMA                                                                  \
  "(Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, " \
  "Tensor dw_ih_reverse, Tensor dw_hh_reverse, Tensor db_ih_reverse, Tensor db_hh_reverse)"
#define RNNKERN_ENGINE_SCHEMA "str engine, bool tf32"
#define RNNKERN_STACK_SCHEMA \
  RNNKERN_STATE_SCHEMA "Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? masks, float scale"
#define RNNKERN_STEP_SCHEMA "Tensor x, Tensor h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
#define RNNKERN_OUTPUT_SCHEMA "(Tensor y, Tensor h_n, Tensor c_n, Tensor c_all)"

STABLE_TORCH_LIBRARY(rnnkern, m) {
  m.def("layer(str cell, " RNNKERN_LAYER_SCHEMA
        ", bool return_states, float grad_clip=0.) -> "
        "(Tensor y, Tensor h_n, Tensor c_n, Tensor c_all, Tensor saved)");
  m.def("layer_inference(str cell, " RNNKERN_LAYER_SCHEMA
        ", bool return_states, Tensor? packed) -> " RNNKERN_OUTPUT_SCHEMA);
  m.def("layer_int8(str cell, " RNNKERN_STATE_SCHEMA RNNKERN_WEIGHT_SCHEMA ", " RNNKERN_SCALE_SCHEMA
        ", Tensor? lengths, Tensor? resets, bool return_states, Tensor? packed) -> " RNNKERN_OUTPUT_SCHEMA);
  m.def("layer_backward(str cell, " RNNKERN_BACKWARD_ARGUMENTS ", float grad_clip=0.) -> " RNNKERN_GRADIENT_SCHEMA);
  // The same on a GPU, or emulated: see cuda_layer.cpp.
  m.def("cuda_layer(str cell, " RNNKERN_LAYER_SCHEMA ", bool return_states, float grad_clip, " RNNKERN_ENGINE_SCHEMA
        ") -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c_all, Tensor saved)");
  m.def("cuda_layer_inference(str cell, " RNNKERN_LAYER_SCHEMA ", bool return_states, " RNNKERN_ENGINE_SCHEMA
        ") -> " RNNKERN_OUTPUT_SCHEMA);
  m.def("cuda_layer_backward(str cell, " RNNKERN_BACKWARD_ARGUMENTS ", float grad_clip, " RNNKERN_ENGINE_SCHEMA
        ") -> " RNNKERN_GRADIENT_SCHEMA);
  // A stack of layers of one direction: see cuda_stack.cpp. h0, c0 [L, B, H]; weights in the order of layers, 2 or 4
  // each; masks bool [L - 1, (steps), H]; chunks of time, 0 for what should take least.
  m.def("cuda_stack(str cell, " RNNKERN_STACK_SCHEMA ", float grad_clip, " RNNKERN_ENGINE_SCHEMA
        ", int chunks) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor hidden, Tensor saved)");
  m.def("cuda_stack_inference(str cell, " RNNKERN_STACK_SCHEMA ", " RNNKERN_ENGINE_SCHEMA
        ", int chunks) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def("cuda_stack_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, " RNNKERN_STACK_SCHEMA
        ", Tensor y, Tensor hidden, Tensor saved, bool need_dx, bool need_dh0, bool need_dw, "
        "float grad_clip, " RNNKERN_ENGINE_SCHEMA
        ", int chunks) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)");
  m.def("cuda_stack_plan(str cell, Tensor x, Tensor h0, Tensor? lengths, " RNNKERN_ENGINE_SCHEMA
        ", int chunks, bool backward) -> str");
  // What the engine does that would run a layer forward or backward.
  m.def("cuda_plan(str cell, Tensor x, Tensor h0, Tensor? lengths, " RNNKERN_ENGINE_SCHEMA ", bool backward) -> str");
  // Lengths on the CPU to the device of key [B, Tk, D], with a launch: see cuda_attention.cpp.
  m.def("cuda_lengths(Tensor lengths, Tensor key) -> Tensor");
  // See cuda_step.cpp.
  m.def("cuda_cell_step(str cell, " RNNKERN_STEP_SCHEMA ") -> (Tensor h_next, Tensor c_next)");
  m.def("cuda_attention_step(str cell, " RNNKERN_STEP_SCHEMA
        ", Tensor? w_query, Tensor key, Tensor value, Tensor? vector, Tensor? lengths, float scale, "
        "Tensor(a!) counters, Tensor(b!) scratch) -> (Tensor h_next, Tensor c_next, Tensor context)");
  m.def("pack(str cell, " RNNKERN_WEIGHT_SCHEMA ") -> Tensor");
  m.def("pack_int8(str cell, " RNNKERN_WEIGHT_SCHEMA ", " RNNKERN_SCALE_SCHEMA ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("layer", TORCH_BOX(&layer));
  m.impl("layer_inference", TORCH_BOX(&layer_inference));
  m.impl("layer_backward", TORCH_BOX(&layer_backward_op));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("layer_int8", TORCH_BOX(&layer_int8));
  m.impl("pack_int8", TORCH_BOX(&pack_int8));
}

}  // namespace
}  // namespace rnnkern
