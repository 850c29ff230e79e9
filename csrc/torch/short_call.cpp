// A boxed call of an operator with sixteen arguments takes longer than a short step itself. A ShortCall knows the
// weights and their packs beforehand, reads tensors through DLPack's C exchange API (48 ns a tensor; of torch's headers
// that needs dlpack.h alone, so one build serves several torch versions) and runs the kernels on plain addresses.
//
// It answers None to whatever is not the plain case, before anything is written: the caller then takes the ordinary
// route, which runs it or says what is wrong. Nothing is checked here to give a message.
#include "torch/short_call.h"

#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "cpu/stack.h"
#include "torch/python_tensors.h"
#include "torch/threads.h"

namespace rnnkern {
namespace {

// What a weight was when it was packed.
struct Weight {
  Reference name;  // in the module's _parameters, or _buffers if they are int8
  const char *data, *end;
  Sizes sizes;
  long long version;
  bool matrix;
};

enum class Form {
  sequence,  // x [T, B, I] or [T, I], states [L, B, H] or [L, H]: a module's call
  step,      // x [B, I] or [I], states as above: a module's step
  cell,      // x [B, I] or [I], states [B, H] or [H]
};

class ShortCall {
 public:
  // None in the place of a result: see the file's comment.
  PyObject* run(Form form, PyObject* parameters, PyObject* input, PyObject* hx, PyObject* out, bool in_place,
                bool batch_first) const;

  Stack stack;
  bool two_states = false;
  std::vector<Weight> weights;
  std::vector<Reference> packs;

 private:
  // Whether the weights are those of the packs; takes hold of them, since other Python threads may run meanwhile.
  bool unchanged(PyObject* parameters, std::vector<Reference>& held) const;
};

bool ShortCall::unchanged(PyObject* parameters, std::vector<Reference>& held) const {
  if (!PyDict_CheckExact(parameters)) return false;
  held.reserve(weights.size());
  for (const Weight& weight : weights) {
    PyObject* const tensor = PyDict_GetItemWithError(parameters, weight.name.get());
    if (!tensor) PyErr_Clear();
    held.push_back(share(tensor));
    View view;
    if (!tensor || !view_of(tensor, stack.dtype, view, weight.matrix) || view.data != weight.data ||
        !view.has_sizes(weight.sizes) || !view.contiguous() || version_of(tensor) != weight.version) {
      return false;
    }
  }
  return true;
}

// Tensors of a call, by what becomes of them.
class Operands {
 public:
  explicit Operands(int element) : element_(element) {}
  void add(const View& view, bool written) { items_[count_++] = {view.begin(), view.end(element_), written}; }
  // Whether no written one shares memory with another.
  bool apart() const {
    for (int i = 0; i < count_; ++i) {
      for (int j = 0; j < i; ++j) {
        const Item &a = items_[i], &b = items_[j];
        if ((a.written || b.written) && a.begin < b.end && b.begin < a.end) return false;
      }
    }
    return true;
  }
  // Whether one that is written shares memory with what lies there.
  bool write_into(const char* begin, const char* end) const {
    for (int i = 0; i < count_; ++i) {
      if (items_[i].written && items_[i].begin < end && begin < items_[i].end) return true;
    }
    return false;
  }

 private:
  struct Item {
    const char *begin, *end;
    bool written;
  } items_[4];
  const int element_;
  int count_ = 0;
};

PyObject* ShortCall::run(Form form, PyObject* parameters, PyObject* input, PyObject* hx, PyObject* out, bool in_place,
                         bool batch_first) const {
  const int64_t L = int64_t(stack.layers.size()), H = stack.H;
  const int element = dtype_size(stack.dtype), features = form == Form::sequence ? 2 : 1;
  View x;
  std::vector<Reference> held;
  if (!unwatched() || !unchanged(parameters, held) || !input_view_of(input, stack.dtype, x)) Py_RETURN_NONE;
  if (x.ndim != features && x.ndim != features + 1) Py_RETURN_NONE;
  if (x.size(-1) != stack.layers[0].I || (x.size(-1) > 1 && x.stride(-1) != 1)) Py_RETURN_NONE;
  const bool batched = x.ndim > features;
  StackCall call{};
  call.T = call.B = 1;
  call.x = x.data;
  if (form == Form::sequence) {
    const int time = batched && !batch_first ? -3 : -2;
    call.T = x.size(time);
    call.x_time = x.stride(time);
  }
  if (batched) {
    const int batch = form == Form::sequence && batch_first ? -3 : -2;
    call.B = x.size(batch);
    call.x_batch = x.stride(batch);
  }
  if (call.T < 1 || call.T >= torch.short_steps || call.B < 1) Py_RETURN_NONE;

  Sizes state_sizes, y_sizes;
  if (form != Form::cell) state_sizes.add(L);
  if (form == Form::sequence) y_sizes.add(call.T);
  for (Sizes* sizes : {&state_sizes, &y_sizes}) {
    if (batched) sizes->add(call.B);
    sizes->add(H);
  }
  Operands operands(element);
  operands.add(x, false);
  PyObject* states[2] = {};
  const int count = two_states ? 2 : 1;
  if (hx != Py_None) {
    if (two_states && (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != 2)) Py_RETURN_NONE;
    for (int i = 0; i < count; ++i) {
      states[i] = two_states ? PyTuple_GET_ITEM(hx, i) : hx;
      View view;
      if (!input_view_of(states[i], stack.dtype, view) || !view.has_sizes(state_sizes) || !view.contiguous() ||
          (in_place && requires_grad(states[i]))) {
        Py_RETURN_NONE;
      }
      operands.add(view, in_place);
      (i == 0 ? call.h0 : call.c0) = view.data;
    }
  } else if (in_place) {
    Py_RETURN_NONE;
  }
  View y{};
  if (out != Py_None) {
    if (!input_view_of(out, stack.dtype, y) || !y.has_sizes(y_sizes) || !y.contiguous() || requires_grad(out)) {
      Py_RETURN_NONE;
    }
    operands.add(y, true);
  }
  if (!operands.apart()) Py_RETURN_NONE;
  for (const Weight& weight : weights) {
    if (operands.write_into(weight.data, weight.end)) Py_RETURN_NONE;
  }

  Reference output = share(out), results[2];
  if (out == Py_None && form != Form::cell) {
    output = new_tensor(input, y_sizes, stack.dtype, y);
    if (!output) return nullptr;
  }
  call.y = y.data;
  for (int i = 0; i < count; ++i) {
    View view;
    if (in_place) {
      view.data = static_cast<char*>(const_cast<void*>(i == 0 ? call.h0 : call.c0));
      results[i] = share(states[i]);
    } else {
      results[i] = new_tensor(input, state_sizes, stack.dtype, view);
      if (!results[i]) return nullptr;
    }
    (i == 0 ? call.h_n : call.c_n) = view.data;
  }

  bool ran = false;
  const double work = stack_work(stack, call.T, call.B);
  const auto kernels = [&] {
    if (work < kWorthAwakeThreads || work >= kSerialWork) {
      ran = run_stack(stack, call, torch_threads());
    } else {
      const ShortCallThreads threads(work);
      ran = run_stack(stack, call, threads.get());
    }
  };
  if (!run_kernels(work, kernels)) return nullptr;
  if (!ran) Py_RETURN_NONE;

  if (in_place || out != Py_None) {  // what autograd has saved of them is no longer what it was
    Reference written(PyTuple_New((in_place ? count : 0) + (out != Py_None ? 1 : 0)));
    if (!written) return nullptr;
    Py_ssize_t next = 0;
    for (int i = 0; in_place && i < count; ++i) PyTuple_SET_ITEM(written.get(), next++, share(states[i]).release());
    if (out != Py_None) PyTuple_SET_ITEM(written.get(), next, share(out).release());
    const Reference done(PyObject_CallOneArg(torch.increment_version, written.get()));
    if (!done) return nullptr;
  }
  Reference state;
  if (in_place) {
    state = share(hx);
  } else {
    state = two_states ? Reference(PyTuple_Pack(2, results[0].get(), results[1].get())) : std::move(results[0]);
  }
  if (!state || form == Form::cell) return state.release();
  return PyTuple_Pack(2, output.get(), state.get());
}

struct ShortCallObject {
  PyObject_HEAD;
  ShortCall* call;
};

const ShortCall& call_of(PyObject* self) { return *reinterpret_cast<ShortCallObject*>(self)->call; }

// Runs a call; what C++ throws becomes Python's exception.
template <class... Arguments>
PyObject* guarded(PyObject* self, Arguments... arguments) {
  try {
    return call_of(self).run(arguments...);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* sequence(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (wrong_count("ShortCall.sequence", 4, count)) return nullptr;
  return guarded(self, Form::sequence, args[0], args[1], args[2], Py_None, false, args[3] == Py_True);
}
PyObject* step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (wrong_count("ShortCall.step", 5, count)) return nullptr;
  return guarded(self, Form::step, args[0], args[1], args[2], args[3], args[4] == Py_True, false);
}
PyObject* cell(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (wrong_count("ShortCall.cell", 4, count)) return nullptr;
  return guarded(self, Form::cell, args[0], args[1], args[2], Py_None, args[3] == Py_True, false);
}

// ShortCall(cell, parameters, names of every layer's weights, packs): the weights as they are now, which are those of
// the packs. A layer has two matrices, two biases or none, and two scales if the matrices are int8.
PyObject* make_short_call(PyTypeObject* type, PyObject* args) {
  const char* cell_name;
  PyObject *parameters, *names, *packs;
  if (!PyArg_ParseTuple(args, "sO!O!O!", &cell_name, &PyDict_Type, &parameters, &PyTuple_Type, &names, &PyTuple_Type,
                        &packs)) {
    return nullptr;
  }
  const auto refuse = [](const char* why) {
    PyErr_Format(PyExc_ValueError, "ShortCall: %s", why);
    return nullptr;
  };
  if (!torch.api) return refuse("connect_torch was not called");
  if (PyTuple_GET_SIZE(names) != PyTuple_GET_SIZE(packs) || PyTuple_GET_SIZE(names) == 0) {
    return refuse("expected as many packs as layers");
  }
  auto call = std::make_unique<ShortCall>();
  Stack& stack = call->stack;
  stack.cell = find_cell(cell_name);
  const CellTraits& traits = cell_traits()[size_t(stack.cell)];
  call->two_states = traits.states > 1;
  for (Py_ssize_t l = 0; l < PyTuple_GET_SIZE(names); ++l) {
    PyObject* const layer_names = PyTuple_GET_ITEM(names, l);
    PyObject* const pack = PyTuple_GET_ITEM(packs, l);
    const Py_ssize_t count = PyTuple_Check(layer_names) ? PyTuple_GET_SIZE(layer_names) : 0;
    if (count != 2 && count != 4 && count != 6) return refuse("expected the names of pairs of weights");
    const void* data[6] = {};
    int64_t I = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const name = PyTuple_GET_ITEM(layer_names, i);
      PyObject* const tensor = PyDict_GetItemWithError(parameters, name);
      if (!tensor) return refuse("a weight is missing");
      bool seen = false;
      View view;
      for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16, Dtype::f32w8}) {
        if (l > 0 || i > 0 ? dtype != stack.dtype : false) continue;
        if (!input_view_of(tensor, dtype, view, i < 2)) continue;
        stack.dtype = dtype;
        seen = true;
        break;
      }
      if (!seen || !view.contiguous() || view.ndim != (i < 2 ? 2 : 1)) return refuse("a weight is not plain");
      const int64_t rows = view.sizes[0];
      if (l == 0 && i == 0) stack.H = rows / traits.gates;
      if (i == 0) I = view.sizes[1];
      if (rows != traits.gates * stack.H || (i == 1 && view.sizes[1] != stack.H) || (i == 0 && l > 0 && I != stack.H)) {
        return refuse("a weight does not fit the others");
      }
      const long long version = version_of(tensor);
      if (version < 0) return refuse("a weight has no version");
      data[i] = view.data;
      Sizes sizes;
      for (int dim = 0; dim < view.ndim; ++dim) sizes.add(view.sizes[dim]);
      const bool byte = i < 2 && stack.dtype == Dtype::f32w8;
      const char* end = view.end(byte ? 1 : dtype_size(stack.dtype));
      call->weights.push_back({share(name), view.data, end, sizes, version, i < 2});
    }
    const bool int8 = stack.dtype == Dtype::f32w8, biased = count == (int8 ? 6 : 4);
    if (!biased && count != (int8 ? 4 : 2)) return refuse("expected two biases or none");
    StackLayer layer{I, {data[0], data[1], biased ? data[2] : nullptr, biased ? data[3] : nullptr}, nullptr};
    if (int8) {
      layer.weights.scale_ih = data[count - 2];
      layer.weights.scale_hh = data[count - 1];
    }
    LayerInputs in{};
    in.dtype = stack.dtype;
    in.I = I;
    in.H = stack.H;
    in.D = 1;
    View view;
    const Dtype compute = stack.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    if (!view_of(pack, compute, view) || view.ndim != 1 || view.sizes[0] != packed_size(stack.cell, in) ||
        !view.contiguous()) {
      return refuse("a pack does not fit its weights");
    }
    layer.packed = view.data;
    stack.layers.push_back(layer);
    call->packs.push_back(share(pack));
  }
  if (call->two_states && dtype_size(stack.dtype) != compute_size(stack.dtype)) {
    return refuse("cells of two states need a dtype in which they compute");
  }
  PyObject* const self = type->tp_alloc(type, 0);
  if (self) reinterpret_cast<ShortCallObject*>(self)->call = call.release();
  return self;
}

PyObject* new_short_call(PyTypeObject* type, PyObject* args, PyObject*) {
  try {
    return make_short_call(type, args);
  } catch (const std::exception& error) {
    PyErr_Format(PyExc_ValueError, "ShortCall: %s", error.what());
    return nullptr;
  }
}

void delete_short_call(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<ShortCallObject*>(self)->call;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* connect_torch(PyObject*, PyObject* args) {
  PyObject *capsule, *tensor, *parameter, *increment_version, *watchers;
  long long steps;
  if (!PyArg_ParseTuple(args, "OO!O!OO!L", &capsule, &PyType_Type, &tensor, &PyType_Type, &parameter,
                        &increment_version, &PyTuple_Type, &watchers, &steps)) {
    return nullptr;
  }
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION) Py_RETURN_FALSE;
  torch.tensor = reinterpret_cast<PyTypeObject*>(share(tensor).release());
  torch.parameter = reinterpret_cast<PyTypeObject*>(share(parameter).release());
  torch.increment_version = share(increment_version).release();
  torch.watchers = share(watchers).release();
  torch.short_steps = steps;
  torch.version = PyUnicode_InternFromString("_version");
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.is_neg = PyUnicode_InternFromString("is_neg");
  torch.new_empty = PyUnicode_InternFromString("new_empty");
  torch.api = api;
  Py_RETURN_TRUE;
}

}  // namespace

bool add_short_call(PyObject* module) {
  static PyMethodDef methods[] = {
      {"sequence", c_function(sequence), METH_FASTCALL,
       "sequence(parameters, input, hx, batch_first): a module's call without gradients, or None if it is not the "
       "plain case"},
      {"step", c_function(step), METH_FASTCALL,
       "step(parameters, input, hx, out, inplace): a module's step without gradients, or None likewise"},
      {"cell", c_function(cell), METH_FASTCALL,
       "cell(parameters, input, hx, inplace): a cell's step without gradients, or None likewise"},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(new_short_call)},
      {Py_tp_dealloc, reinterpret_cast<void*>(delete_short_call)},
      {Py_tp_methods, methods},
      {Py_tp_doc, const_cast<char*>("Layers with packed weights, for short calls without gradients")},
      {0, nullptr},
  };
  static PyType_Spec spec = {"rnnkern._C.ShortCall", sizeof(ShortCallObject), 0, Py_TPFLAGS_DEFAULT, slots};
  static PyMethodDef functions[] = {
      {"connect_torch", connect_torch, METH_VARARGS,
       "connect_torch(exchange_api, Tensor, Parameter, increment_version, watchers, short_steps): what ShortCall needs "
       "of torch; False if its DLPack is of another version"},
      {nullptr, nullptr, 0, nullptr},
  };
  Reference type(PyType_FromSpec(&spec));
  return type && PyModule_AddObjectRef(module, "ShortCall", type.get()) == 0 &&
         PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace rnnkern
