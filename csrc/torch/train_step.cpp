// What short_call.cpp is to inference, for one step that keeps what backward needs: the operators' boxed calls take
// longer than a small cell. Both functions answer None to whatever is not the plain case, before anything is written.
#include "torch/train_step.h"

#include <vector>

#include "cpu/layer.h"
#include "torch/python_tensors.h"
#include "torch/threads.h"

namespace rnnkern {
namespace {

Sizes sizes_of(std::initializer_list<int64_t> list) {
  Sizes sizes;
  for (int64_t size : list) sizes.add(size);
  return sizes;
}

// A contiguous tensor of these sizes, or None: a null pointer.
bool read(PyObject* object, Dtype dtype, const Sizes& sizes, const void*& data) {
  data = nullptr;
  if (object == Py_None) return true;
  View view;
  if (!input_view_of(object, dtype, view) || !view.has_sizes(sizes) || !view.contiguous()) return false;
  data = view.data;
  return true;
}

// x [B, I], h and c [B, H], w_ih, w_hh, b_ih, b_hh from eight objects (c and biases may be None). False: not plain.
bool read_inputs(const char* cell_name, PyObject* const* objects, int& cell, LayerInputs& in) {
  View x, h;
  in = LayerInputs{};
  in.dtype = Dtype::f32;
  if (!input_view_of(objects[0], in.dtype, x)) {
    in.dtype = Dtype::f64;
    if (!input_view_of(objects[0], in.dtype, x)) return false;
  }
  if (!input_view_of(objects[1], in.dtype, h) || x.ndim != 2 || h.ndim != 2 || !x.contiguous()) return false;
  try {
    cell = find_cell(cell_name);
  } catch (const std::exception&) {
    return false;
  }
  const CellTraits& traits = cell_traits()[size_t(cell)];
  in.T = in.D = 1;
  in.B = x.sizes[0];
  in.I = x.sizes[1];
  in.H = h.sizes[1];
  in.x = x.data;
  in.x_batch = in.I;
  const int64_t rows = traits.gates * in.H;
  LayerWeights& w = in.weights[0];
  return in.B > 0 && read(objects[1], in.dtype, sizes_of({in.B, in.H}), in.h0) &&
         read(objects[2], in.dtype, sizes_of({in.B, in.H}), in.c0) && (in.c0 != nullptr) == (traits.states > 1) &&
         read(objects[3], in.dtype, sizes_of({rows, in.I}), w.w_ih) && w.w_ih &&
         read(objects[4], in.dtype, sizes_of({rows, in.H}), w.w_hh) && w.w_hh &&
         read(objects[5], in.dtype, sizes_of({rows}), w.b_ih) && read(objects[6], in.dtype, sizes_of({rows}), w.b_hh);
}

double work_of(int cell, const LayerInputs& in) {
  return double(in.B) * double(cell_traits()[size_t(cell)].gates) * double(in.H) * double(in.I + in.H);
}

PyObject* none_or(Reference&& tensor) { return tensor ? tensor.release() : share(Py_None).release(); }

// (cell, x, h, c, w_ih, w_hh, b_ih, b_hh) -> (h', c' or None, saved)
PyObject* train_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (wrong_count("train_step", 8, count)) return nullptr;
  const char* name = PyUnicode_AsUTF8(args[0]);
  if (!name) return nullptr;
  int cell;
  LayerInputs in;
  if (!torch.api || !unwatched() || !read_inputs(name, args + 1, cell, in)) Py_RETURN_NONE;
  const Sizes state = sizes_of({in.B, in.H});
  View h, c{}, saved;
  Reference h_n = new_tensor(args[1], state, in.dtype, h), c_n, kept;
  if (h_n && in.c0) c_n = new_tensor(args[1], state, in.dtype, c);
  if (h_n && (c_n || !in.c0)) kept = new_tensor(args[1], sizes_of({saved_size(cell, in)}), in.dtype, saved);
  if (!kept) return nullptr;
  const auto forward = [&] { layer_forward(cell, in, {h.data, h.data, c.data, nullptr, saved.data}, torch_threads()); };
  if (!run_kernels(work_of(cell, in), forward)) return nullptr;
  const Reference c_or_none(none_or(std::move(c_n)));
  return PyTuple_Pack(3, h_n.get(), c_or_none.get(), kept.get());
}

// (cell, dh', dc', x, h, c, w_ih, w_hh, b_ih, b_hh, h', saved, need_dx, need_dstate, need_dw)
// -> (dx, dh, dc, dw_ih, dw_hh, db_ih, db_hh), None where not wanted
PyObject* train_step_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (wrong_count("train_step_backward", 15, count)) return nullptr;
  const char* name = PyUnicode_AsUTF8(args[0]);
  if (!name) return nullptr;
  int cell;
  LayerInputs in;
  LayerGradients grad{};
  if (!torch.api || !unwatched() || !read_inputs(name, args + 3, cell, in)) Py_RETURN_NONE;
  const Sizes state = sizes_of({in.B, in.H});
  if (!read(args[1], in.dtype, state, grad.dh_n) || !read(args[2], in.dtype, state, grad.dc_n) ||
      !read(args[10], in.dtype, state, grad.y) || !grad.y ||
      !read(args[11], in.dtype, sizes_of({saved_size(cell, in)}), grad.saved) || !grad.saved) {
    Py_RETURN_NONE;
  }
  grad.need_dw = args[14] == Py_True;
  LayerGradients::Weights& w = grad.weights[0];
  void** const wanted[7] = {args[12] == Py_True ? &grad.dx : nullptr,
                            args[13] == Py_True ? &grad.dh0 : nullptr,
                            args[13] == Py_True && in.c0 ? &grad.dc0 : nullptr,
                            grad.need_dw ? &w.dw_ih : nullptr,
                            grad.need_dw ? &w.dw_hh : nullptr,
                            grad.need_dw && in.weights[0].b_ih ? &w.db_ih : nullptr,
                            grad.need_dw && in.weights[0].b_hh ? &w.db_hh : nullptr};
  const int64_t rows = cell_traits()[size_t(cell)].gates * in.H;
  const Sizes sizes[7] = {
      sizes_of({in.B, in.I}), state,           state, sizes_of({rows, in.I}), sizes_of({rows, in.H}),
      sizes_of({rows}),       sizes_of({rows})};
  Reference results(PyTuple_New(7));
  if (!results) return nullptr;
  for (int i = 0; i < 7; ++i) {
    Reference tensor;
    if (wanted[i]) {
      View view;
      tensor = new_tensor(args[3], sizes[i], in.dtype, view);
      if (!tensor) return nullptr;
      *wanted[i] = view.data;
    }
    PyTuple_SET_ITEM(results.get(), i, none_or(std::move(tensor)));
  }
  if (!run_kernels(2 * work_of(cell, in), [&] { layer_backward(cell, in, grad, torch_threads()); })) return nullptr;
  return results.release();
}

}  // namespace

bool add_train_step(PyObject* module) {
  static PyMethodDef functions[] = {
      {"train_step", c_function(train_step), METH_FASTCALL,
       "train_step(cell, x, h, c, w_ih, w_hh, b_ih, b_hh) -> (h', c', saved), or None if it is not the plain case"},
      {"train_step_backward", c_function(train_step_backward), METH_FASTCALL,
       "train_step_backward(cell, dh', dc', x, h, c, w_ih, w_hh, b_ih, b_hh, h', saved, need_dx, need_dstate, need_dw) "
       "-> (dx, dh, dc, dw_ih, dw_hh, db_ih, db_hh), or None likewise"},
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace rnnkern
