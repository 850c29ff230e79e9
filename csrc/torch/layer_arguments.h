// The arguments that all operators of a recurrent layer share, on any device.
#pragma once

#include <string>

#include "cpu/layer.h"
#include "torch/tensors.h"

namespace rnnkern {

// Made contiguous and kept alive for the call; checked for what would read or write out of bounds.
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
    STD_TORCH_CHECK(!lengths.has_value() ||
                        (lengths->numel() == in.B && lengths->scalar_type() == ScalarType::Long && lengths->is_cpu()),
                    "rnnkern::layer: lengths must be int64 [B] on the CPU");
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

// Of the outputs y, h_n, c_n and c_all, beside y itself.
inline void check_gradients(const LayerArguments& args, const OptionalTensor& dy, const OptionalTensor& dh_n,
                            const OptionalTensor& dc_n, const OptionalTensor& dc_all, const Tensor& y) {
  const LayerInputs& in = args.in;
  const Dtype dtype = in.dtype, compute = compute_dtype(dtype);
  const int64_t sequence = args.rows * in.D * in.H, state = in.D * in.B * in.H;
  const auto fits = [](const OptionalTensor& tensor, int64_t count, Dtype expected) {
    return !tensor.has_value() || (tensor->numel() == count && dtype_of(*tensor) == expected);
  };
  STD_TORCH_CHECK(fits(y, sequence, dtype), "rnnkern::layer_backward: y must be that of the forward call");
  STD_TORCH_CHECK(fits(dy, sequence, dtype) && fits(dh_n, state, dtype) && fits(dc_n, state, compute) &&
                      fits(dc_all, sequence, compute),
                  "rnnkern::layer_backward: a gradient does not have the shape and dtype of its output");
}

#define RNNKERN_WEIGHT_ARGUMENTS                                                                   \
  Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_ih_reverse, \
      OptionalTensor w_hh_reverse, OptionalTensor b_ih_reverse, OptionalTensor b_hh_reverse
#define RNNKERN_WEIGHTS {w_ih, w_hh, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse}

}  // namespace rnnkern
