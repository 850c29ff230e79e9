// Tensors as Python objects, read through DLPack's C exchange API: for kernels that are called past the dispatcher.
#pragma once

#include <ATen/dlpack.h>
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "cpu/dtype.h"
#include "cpu/workspace.h"

namespace rnnkern {

// What `connect_torch` was given, kept for ever, and names.
struct Torch {
  const DLPackExchangeAPI* api = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *increment_version = nullptr, *watchers = nullptr;
  int64_t short_steps = 0;
  PyObject *version = nullptr, *requires_grad = nullptr, *is_neg = nullptr, *new_empty = nullptr;
};
inline Torch torch;

class Reference {
 public:
  explicit Reference(PyObject* object = nullptr) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference(Reference&& other) noexcept : object_(other.release()) {}
  ~Reference() { Py_XDECREF(object_); }
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};
inline Reference share(PyObject* object) {
  Py_XINCREF(object);
  return Reference(object);
}

// Sizes of a tensor of up to three dimensions, without a visit to the allocator.
struct Sizes {
  int64_t of[3];
  int count = 0;
  void add(int64_t size) { of[count++] = size; }
};

// A tensor as it lies in memory; valid while the tensor is.
struct View {
  char* data;
  int ndim;
  const int64_t *sizes, *strides;

  int64_t size(int dim) const { return sizes[ndim + dim]; }  // dim counts from the end, from -1 on
  int64_t stride(int dim) const { return strides[ndim + dim]; }
  bool has_sizes(const Sizes& expected) const {
    return ndim == expected.count && std::equal(sizes, sizes + ndim, expected.of);
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim; i-- > 0; expected *= sizes[i]) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
    }
    return true;
  }
  // The first byte and the one past the last.
  const char* begin() const { return data; }
  const char* end(int element) const {
    int64_t last = 0;
    for (int i = 0; i < ndim; ++i) last += (sizes[i] - 1) * strides[i];
    return data + (last + 1) * element;
  }
};

// `matrix`: of weights, which are int8 in a layer of f32w8.
inline bool same_dtype(const DLDataType& type, Dtype dtype, bool matrix) {
  const bool int8 = matrix && dtype == Dtype::f32w8;
  const int code = int8 ? kDLInt : dtype == Dtype::bf16 ? kDLBfloat : kDLFloat;
  return type.code == code && type.bits == (int8 ? 8 : 8 * dtype_size(dtype)) && type.lanes == 1;
}

// False, without an exception, unless it is a plain tensor of this dtype on the CPU.
inline bool view_of(PyObject* object, Dtype dtype, View& view, bool matrix = false) {
  DLTensor tensor;
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
  if (torch.api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.device.device_type != kDLCPU || !tensor.data || !same_dtype(tensor.dtype, dtype, matrix)) return false;
  view = {static_cast<char*>(tensor.data) + tensor.byte_offset, tensor.ndim, tensor.shape, tensor.strides};
  return true;
}

// The same for an input, whose elements must be what they look like: no negation is pending.
inline bool input_view_of(PyObject* object, Dtype dtype, View& view, bool matrix = false) {
  if (!view_of(object, dtype, view, matrix)) return false;
  const Reference negated(PyObject_CallMethodNoArgs(object, torch.is_neg));
  if (!negated) PyErr_Clear();
  return negated.get() == Py_False;
}

inline bool requires_grad(PyObject* tensor) {
  const Reference wanted(PyObject_GetAttr(tensor, torch.requires_grad));
  if (!wanted) PyErr_Clear();
  return wanted.get() != Py_False;
}

// -1 if it has none, as tensors made in inference mode.
inline long long version_of(PyObject* tensor) {
  const Reference version(PyObject_GetAttr(tensor, torch.version));
  if (!version) {
    PyErr_Clear();
    return -1;
  }
  return PyLong_AsLongLong(version.get());
}

// Whether nothing in Python wants to see or change what tensors do: gradients, modes, transforms, tracers, overrides.
inline bool unwatched() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers); ++i) {
    const Reference watching(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.watchers, i)));
    if (!watching) PyErr_Clear();
    if (!watching || PyObject_IsTrue(watching.get()) != 0) return false;
  }
  return true;
}

// A new tensor of the dtype of `like`, and where it lies.
inline Reference new_tensor(PyObject* like, const Sizes& sizes, Dtype dtype, View& view) {
  PyObject* arguments[4] = {like};
  Reference numbers[3];
  for (int i = 0; i < sizes.count; ++i) {
    numbers[i] = Reference(PyLong_FromLongLong(sizes.of[i]));
    if (!numbers[i]) return Reference();
    arguments[i + 1] = numbers[i].get();
  }
  Reference tensor(PyObject_VectorcallMethod(torch.new_empty, arguments, size_t(sizes.count) + 1, nullptr));
  if (!tensor) return tensor;
  if (!view_of(tensor.get(), dtype, view)) {
    PyErr_SetString(PyExc_RuntimeError, "rnnkern: new_empty gave a tensor that is not on the CPU");
    return Reference();
  }
  const size_t bytes = size_t(view.end(dtype_size(dtype)) - view.begin());
  if (bytes >= kWorthHugePages) prefer_huge_pages(view.data, bytes);
  poison(view.data, bytes);
  return tensor;
}

// For functions of the METH_FASTCALL form.
inline bool wrong_count(const char* name, Py_ssize_t expected, Py_ssize_t got) {
  if (expected == got) return false;
  PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", name, expected, got);
  return true;
}

template <class Function>
PyCFunction c_function(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// Runs kernels, and lets other Python threads run meanwhile if they take long; false with an exception set if they
// fail.
template <class Kernels>
bool run_kernels(double multiply_adds, const Kernels& kernels) {
  constexpr double kLong = 1e6;
  std::string error;
  const auto caught = [&] {
    try {
      kernels();
    } catch (const std::exception& exception) {
      error = exception.what();
    }
  };
  if (multiply_adds < kLong) {
    caught();
  } else {
    Py_BEGIN_ALLOW_THREADS;
    caught();
    Py_END_ALLOW_THREADS;
  }
  if (!error.empty()) PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return error.empty();
}

}  // namespace rnnkern
