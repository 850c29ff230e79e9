// The attention operators: schemas, and the CPU's; cuda_attention.cpp has the GPU's.
#include "torch/attention_arguments.h"

namespace rnnkern {
namespace {

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
  check_gradients(in, dc, dw);
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

#define RNNKERN_ATTENTION_SCHEMA \
  "Tensor query, Tensor key, Tensor value, Tensor? vector, Tensor? lengths, Tensor? mask, str score, float scale"

STABLE_TORCH_LIBRARY_FRAGMENT(rnnkern, m) {
  for (const std::string device : {"", "cuda_"}) {
    for (const std::string name : {"attention", "attention_inference"})
      m.def((device + name + "(" RNNKERN_ATTENTION_SCHEMA ", bool need_weights) -> (Tensor context, Tensor weights)")
                .c_str());
    m.def((device + "attention_backward(Tensor? dcontext, Tensor? dweights, " RNNKERN_ATTENTION_SCHEMA
                    ") -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dvector)")
              .c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_op));
  m.impl("attention_inference", TORCH_BOX(&attention_op));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_op));
}

}  // namespace rnnkern
