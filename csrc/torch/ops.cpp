// The recurrent layer's operators: schemas, and what turns tensors into pointers. Shapes are checked in Python, once;
// here only what would read or write out of bounds.
#include <string>

#include "cpu/layer.h"
#include "torch/tensors.h"

namespace rnnkern {
namespace {

// The arguments that all operators share, made contiguous and kept alive for the call.
struct LayerArguments {
  LayerArguments(const std::string& cell_name, const Tensor& x_, const Tensor& h0_, const OptionalTensor& c0_,
                 const std::vector<OptionalTensor>& weights_, const OptionalTensor& lengths_,
                 const OptionalTensor& resets_, const std::vector<OptionalTensor>& scales_ = {})
      : cell(find_cell(cell_name)),
        x(x_.size(-1) <= 1 || x_.stride(-1) == 1 ? x_ : torch::stable::contiguous(x_)),
        h0(make_contiguous(h0_)),
        c0(make_contiguous(c0_)),
        lengths(make_contiguous(lengths_)),
        resets(make_contiguous(resets_)) {
    for (const OptionalTensor& weight : weights_) weights.push_back(make_contiguous(weight));
    for (const OptionalTensor& scale : scales_) scales.push_back(make_contiguous(scale));
    const Dtype dtype = dtype_of(x);
    STD_TORCH_CHECK(scales.empty() || dtype == Dtype::f32, "rnnkern::layer_int8: x must be float32");
    in.dtype = scales.empty() ? dtype : Dtype::f32w8;
    in.packed_rows = x.dim() == 2;
    in.B = h0.size(1);
    in.I = x.size(-1);
    in.D = weights[4].has_value() ? 2 : 1;
    in.H = h0.size(2);
    in.x = x.const_data_ptr();
    in.x_time = x.stride(0);
    in.x_batch = x.stride(-2);
    in.h0 = h0.const_data_ptr();
    in.c0 = data_or_null(c0);
    in.lengths = static_cast<const int64_t*>(data_or_null(lengths));
    in.resets = static_cast<const uint8_t*>(data_or_null(resets));
    STD_TORCH_CHECK(in.H > 0, "rnnkern::layer: the hidden size must be greater than zero");
    STD_TORCH_CHECK(!lengths.has_value() || (lengths->numel() == in.B && lengths->scalar_type() == ScalarType::Long),
                    "rnnkern::layer: lengths must be int64 [B]");
    in.T = !in.packed_rows ? x.size(0) : in.lengths && in.B > 0 ? in.lengths[0] : 0;
    rows = x.size(0) * (in.packed_rows ? 1 : x.size(1));
    STD_TORCH_CHECK(in.packed_rows || x.size(1) == in.B, "rnnkern::layer: h0 does not fit x and the weights");
    const int64_t gate_rows = cell_traits()[cell].gates * in.H;
    for (int d = 0; d < in.D; ++d) {
      for (int i = 0; i < 4; ++i) {
        const OptionalTensor& w = weights[4 * d + i];
        STD_TORCH_CHECK(w.has_value() || i >= 2, "rnnkern::layer: a weight matrix is missing");
        if (!w.has_value()) continue;
        const int64_t expected = i == 0 ? gate_rows * in.I : i == 1 ? gate_rows * in.H : gate_rows;
        const bool fits = !scales.empty() && i < 2 ? w->scalar_type() == ScalarType::Char : dtype_of(*w) == dtype;
        STD_TORCH_CHECK(w->numel() == expected && fits, "rnnkern::layer: weight ", i, " of direction ", d,
                        " does not fit the input and hidden size");
      }
      in.weights[d] = {data_or_null(weights[4 * d]), data_or_null(weights[4 * d + 1]), data_or_null(weights[4 * d + 2]),
                       data_or_null(weights[4 * d + 3])};
      if (scales.empty()) continue;
      for (int i = 0; i < 2; ++i) {
        const OptionalTensor& scale = scales[2 * d + i];
        STD_TORCH_CHECK(scale.has_value() && scale->numel() == gate_rows && dtype_of(*scale) == Dtype::f32,
                        "rnnkern::layer_int8: scale ", i, " of direction ", d, " must be float32 [", gate_rows, "]");
      }
      in.weights[d].scale_ih = data_or_null(scales[2 * d]);
      in.weights[d].scale_hh = data_or_null(scales[2 * d + 1]);
    }
    const int64_t states = in.D * in.B * in.H;
    STD_TORCH_CHECK(h0.numel() == states && dtype_of(h0) == dtype, "rnnkern::layer: h0 does not fit x and the weights");
    STD_TORCH_CHECK((cell_traits()[cell].states > 1) == c0.has_value(),
                    "rnnkern::layer: c0 is given for cells of two states");
    STD_TORCH_CHECK(!c0.has_value() || (c0->numel() == states && dtype_of(*c0) == compute_dtype(dtype)),
                    "rnnkern::layer: c0 does not fit x and the weights");
    STD_TORCH_CHECK(
        !resets.has_value() || (resets->numel() == in.T * in.B && resets->scalar_type() == ScalarType::Bool),
        "rnnkern::layer: resets must be bool [T, B]");
    int64_t steps = 0;
    for (int64_t b = 0; lengths.has_value() && b < in.B; ++b) {
      STD_TORCH_CHECK(in.lengths[b] >= 0 && in.lengths[b] <= in.T, "rnnkern::layer: lengths must lie in 0..", in.T);
      STD_TORCH_CHECK(!in.packed_rows || b == 0 || in.lengths[b] <= in.lengths[b - 1],
                      "rnnkern::layer: lengths of packed rows must come longest first");
      steps += in.lengths[b];
    }
    STD_TORCH_CHECK(!in.packed_rows || (steps == rows && !resets.has_value()),
                    "rnnkern::layer: packed rows need lengths that add up to their number, and take no resets");
  }
  // The shape of an output with `columns` elements for each step and row.
  std::vector<int64_t> sequence(int64_t columns) const {
    return in.packed_rows ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{in.T, in.B, columns};
  }
  bool two_states() const { return c0.has_value(); }

  const int cell;
  const Tensor x, h0;
  const OptionalTensor c0, lengths, resets;
  std::vector<OptionalTensor> weights, scales;  // scales are empty unless weights are int8
  LayerInputs in{};
  int64_t rows = 0;  // of x: T * B, or those of packed rows
};

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

#define RNNKERN_WEIGHT_ARGUMENTS                                                                   \
  Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_ih_reverse, \
      OptionalTensor w_hh_reverse, OptionalTensor b_ih_reverse, OptionalTensor b_hh_reverse
#define RNNKERN_WEIGHTS {w_ih, w_hh, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse}

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
  const int64_t sequence = args.rows * in.D * in.H, state = in.D * in.B * in.H;
  const auto fits = [](const OptionalTensor& tensor, int64_t count, Dtype expected) {
    return !tensor.has_value() || (tensor->numel() == count && dtype_of(*tensor) == expected);
  };
  STD_TORCH_CHECK(fits(y, sequence, dtype) && fits(saved, saved_size(args.cell, in), compute),
                  "rnnkern::layer_backward: y and saved must be those of the forward call");
  STD_TORCH_CHECK(fits(dy, sequence, dtype) && fits(dh_n, state, dtype) && fits(dc_n, state, compute) &&
                      fits(dc_all, sequence, compute),
                  "rnnkern::layer_backward: a gradient does not have the shape and dtype of its output");
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
#define RNNKERN_OUTPUT_SCHEMA "(Tensor y, Tensor h_n, Tensor c_n, Tensor c_all)"

STABLE_TORCH_LIBRARY(rnnkern, m) {
  m.def("layer(str cell, " RNNKERN_LAYER_SCHEMA
        ", bool return_states, float grad_clip=0.) -> "
        "(Tensor y, Tensor h_n, Tensor c_n, Tensor c_all, Tensor saved)");
  m.def("layer_inference(str cell, " RNNKERN_LAYER_SCHEMA
        ", bool return_states, Tensor? packed) -> " RNNKERN_OUTPUT_SCHEMA);
  m.def("layer_int8(str cell, " RNNKERN_STATE_SCHEMA RNNKERN_WEIGHT_SCHEMA ", " RNNKERN_SCALE_SCHEMA
        ", Tensor? lengths, Tensor? resets, bool return_states, Tensor? packed) -> " RNNKERN_OUTPUT_SCHEMA);
  m.def("layer_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, " RNNKERN_LAYER_SCHEMA
        ", Tensor y, Tensor saved, bool need_dx, bool need_dh0, bool need_dw, float grad_clip=0.) -> "
        "(Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, "
        "Tensor dw_ih_reverse, Tensor dw_hh_reverse, Tensor db_ih_reverse, Tensor db_hh_reverse)");
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
