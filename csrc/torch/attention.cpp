// The attention operators: schemas, and what turns tensors into pointers. Shapes are checked in Python, once; here only
// what would read out of bounds, and the values of `lengths`, which Python cannot see while torch.compile traces.
#include <string>

#include "cpu/attention.h"
#include "torch/tensors.h"

namespace rnnkern {
namespace {

Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}
OptionalTensor contiguous_rows(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(contiguous_rows(*tensor)) : std::nullopt;
}

Rows rows_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }
Rows rows_of(const OptionalTensor& tensor) { return tensor.has_value() ? rows_of(*tensor) : Rows{nullptr, 0, 0}; }

bool has_shape(const Tensor& tensor, int64_t B, int64_t T, int64_t C) {
  return tensor.dim() == 3 && tensor.size(0) == B && tensor.size(1) == T && tensor.size(2) == C;
}

// The arguments that both operators share, with contiguous rows, kept alive for the call.
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
    for (int64_t b = 0; lengths.has_value() && b < in.B; ++b) {
      STD_TORCH_CHECK(in.lengths[b] >= 0 && in.lengths[b] <= in.Tk, "lengths: expected values in 0..", in.Tk,
                      ", the number of keys, got ", in.lengths[b]);
    }
  }

  const Tensor query, key, value;
  const OptionalTensor vector, lengths, mask;
  AttentionInputs in{};
};

std::tuple<Tensor, Tensor> attention_op(Tensor query, Tensor key, Tensor value, OptionalTensor vector,
                                        OptionalTensor lengths, OptionalTensor mask, std::string score, double scale,
                                        bool need_weights) {
  const AttentionArguments args(query, key, value, vector, lengths, mask, score, scale);
  const AttentionInputs& in = args.in;
  Tensor context = make_empty({in.B, in.Tq, in.Dv}, in.dtype);
  Tensor weights =
      make_empty(need_weights ? std::vector<int64_t>{in.B, in.Tq, in.Tk} : std::vector<int64_t>{0}, in.dtype);
  attention_forward(in, {context.mutable_data_ptr(), need_weights ? weights.mutable_data_ptr() : nullptr},
                    torch_threads());
  return {context, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_op(OptionalTensor dcontext, OptionalTensor dweights,
                                                                 Tensor query, Tensor key, Tensor value,
                                                                 OptionalTensor vector, OptionalTensor lengths,
                                                                 OptionalTensor mask, std::string score, double scale) {
  const AttentionArguments args(query, key, value, vector, lengths, mask, score, scale);
  const AttentionInputs& in = args.in;
  const OptionalTensor dc = contiguous_rows(dcontext), dw = contiguous_rows(dweights);
  STD_TORCH_CHECK(!dc.has_value() || (has_shape(*dc, in.B, in.Tq, in.Dv) && dtype_of(*dc) == in.dtype),
                  "rnnkern::attention_backward: dcontext does not fit query and value");
  STD_TORCH_CHECK(!dw.has_value() || (has_shape(*dw, in.B, in.Tq, in.Tk) && dtype_of(*dw) == in.dtype),
                  "rnnkern::attention_backward: dweights does not fit query and key");
  Tensor dquery = make_pooled({in.B, in.Tq, in.D}, in.dtype), dkey = make_pooled({in.B, in.Tk, in.D}, in.dtype);
  Tensor dvalue = make_pooled({in.B, in.Tk, in.Dv}, in.dtype);
  Tensor dvector = make_empty({vector.has_value() ? in.D : 0}, in.dtype);
  attention_backward(in,
                     {rows_of(dc), rows_of(dw), dquery.mutable_data_ptr(), dkey.mutable_data_ptr(),
                      dvalue.mutable_data_ptr(), dvector.mutable_data_ptr()},
                     torch_threads());
  return {dquery, dkey, dvalue, dvector};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rnnkern, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? vector, Tensor? lengths, Tensor? mask, str score, "
      "float scale, bool need_weights) -> (Tensor context, Tensor weights)");
  m.def(
      "attention_inference(Tensor query, Tensor key, Tensor value, Tensor? vector, Tensor? lengths, Tensor? mask, "
      "str score, float scale, bool need_weights) -> (Tensor context, Tensor weights)");
  m.def(
      "attention_backward(Tensor? dcontext, Tensor? dweights, Tensor query, Tensor key, Tensor value, Tensor? vector, "
      "Tensor? lengths, Tensor? mask, str score, float scale) -> (Tensor dquery, Tensor dkey, Tensor dvalue, "
      "Tensor dvector)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_op));
  m.impl("attention_inference", TORCH_BOX(&attention_op));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_op));
}

}  // namespace rnnkern
