// The arguments that all attention operators share, on any device. Python has checked shapes, once.
#pragma once

#include <string>

#include "cpu/attention.h"
#include "torch/tensors.h"

namespace rnnkern {

inline Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}
inline OptionalTensor contiguous_rows(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(contiguous_rows(*tensor)) : std::nullopt;
}

inline Rows rows_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }
inline Rows rows_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? rows_of(*tensor) : Rows{nullptr, 0, 0};
}

inline bool has_shape(const Tensor& tensor, int64_t B, int64_t T, int64_t C) {
  return tensor.dim() == 3 && tensor.size(0) == B && tensor.size(1) == T && tensor.size(2) == C;
}

// Raises unless the lengths [B], on the CPU, are within 0..Tk: Python cannot see them while torch.compile traces.
inline void check_lengths(const int64_t* lengths, int64_t B, int64_t Tk) {
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] <= Tk, "lengths: expected values in 0..", Tk,
                    ", the number of keys, got ", lengths[b]);
  }
}

// With contiguous rows, kept alive for the call; checked for what would read out of bounds. Of lengths on a GPU the
// kernels themselves take care.
struct AttentionArguments {
  AttentionArguments(const Tensor& query_, const Tensor& key_, const Tensor& value_, const OptionalTensor& vector_,
                     const OptionalTensor& lengths_, const OptionalTensor& mask_, const std::string& score,
                     double scale)
      : query(contiguous_rows(query_)),
        key(contiguous_rows(key_)),
        value(contiguous_rows(value_)),
        vector(make_contiguous(vector_)),
        lengths(make_contiguous(lengths_)),
        mask(make_contiguous(mask_)) {
    STD_TORCH_CHECK(score == "dot" || score == "additive", "rnnkern::attention: score must be dot or additive, got ",
                    score);
    in.dtype = dtype_of(query);
    in.score = score == "dot" ? Score::dot : Score::additive;
    in.B = query.size(0);
    in.Tq = query.size(1);
    in.D = query.size(2);
    in.Tk = key.size(1);
    in.Dv = value.size(2);
    in.scale = scale;
    in.query = rows_of(query);
    in.key = rows_of(key);
    in.value = rows_of(value);
    in.vector = data_or_null(vector);
    in.lengths = static_cast<const int64_t*>(data_or_null(lengths));
    if (mask.has_value()) in.mask = {mask->const_data_ptr(), in.Tk, 1};
    STD_TORCH_CHECK(has_shape(key, in.B, in.Tk, in.D) && dtype_of(key) == in.dtype,
                    "rnnkern::attention: key does not fit query");
    STD_TORCH_CHECK(has_shape(value, in.B, in.Tk, in.Dv) && dtype_of(value) == in.dtype,
                    "rnnkern::attention: value does not fit key");
    STD_TORCH_CHECK(vector.has_value() == (in.score == Score::additive),
                    "rnnkern::attention: vector is given for the additive score");
    STD_TORCH_CHECK(!vector.has_value() || (vector->numel() == in.D && dtype_of(*vector) == in.dtype),
                    "rnnkern::attention: vector does not fit query");
    STD_TORCH_CHECK(!mask.has_value() || (mask->numel() == in.B * in.Tk && mask->scalar_type() == ScalarType::Bool),
                    "rnnkern::attention: mask must be bool [B, Tk]");
    STD_TORCH_CHECK(!lengths.has_value() || (lengths->numel() == in.B && lengths->scalar_type() == ScalarType::Long),
                    "rnnkern::attention: lengths must be int64 [B]");
    if (lengths.has_value() && lengths->is_cpu()) check_lengths(in.lengths, in.B, in.Tk);
  }

  const Tensor query, key, value;
  const OptionalTensor vector, lengths, mask;
  AttentionInputs in{};
};

inline void check_gradients(const AttentionInputs& in, const OptionalTensor& dcontext, const OptionalTensor& dweights) {
  STD_TORCH_CHECK(
      !dcontext.has_value() || (has_shape(*dcontext, in.B, in.Tq, in.Dv) && dtype_of(*dcontext) == in.dtype),
      "rnnkern::attention_backward: dcontext does not fit query and value");
  STD_TORCH_CHECK(
      !dweights.has_value() || (has_shape(*dweights, in.B, in.Tq, in.Tk) && dtype_of(*dweights) == in.dtype),
      "rnnkern::attention_backward: dweights does not fit query and key");
}

}  // namespace rnnkern
