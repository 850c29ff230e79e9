// The number that cells compute with in kernels: a float or double with the functions that csrc/cells expects.
//
// sigmoid and tanh of floats take the GPU's 2^x and 1/x (2 and 1 ulp): absolute errors of at most 1.9e-7 and 3.8e-7.
// Where exp(-x) overflows, 1 / (1 + inf) is the limit.
#pragma once

#include "cells/cell.h"
#include "cuda/device.h"

namespace rnnkern::cuda {

template <class T>
struct Real {
  T value;
  Real() = default;
  RNNKERN_DEVICE Real(T value_) : value(value_) {}
};
using Float = Real<float>;
using Double = Real<double>;

#ifdef RNNKERN_EMULATED
#define RNNKERN_REAL \
  template <class T> \
  inline
#else
#define RNNKERN_REAL \
  template <class T> \
  __device__ __forceinline__
#endif

RNNKERN_REAL Real<T> operator+(Real<T> a, Real<T> b) { return a.value + b.value; }
RNNKERN_REAL Real<T> operator-(Real<T> a, Real<T> b) { return a.value - b.value; }
RNNKERN_REAL Real<T> operator*(Real<T> a, Real<T> b) { return a.value * b.value; }
RNNKERN_REAL Real<T> relu(Real<T> x) { return x.value < T(0) ? T(0) : x.value; }  // NaN stays NaN
RNNKERN_REAL Real<T> unless_negative(Real<T> x, Real<T> value) { return x.value <= T(0) ? T(0) : value.value; }
#undef RNNKERN_REAL

RNNKERN_DEVICE Float fma(Float a, Float b, Float c) { return multiply_add(a.value, b.value, c.value); }
RNNKERN_DEVICE Double fma(Double a, Double b, Double c) { return ::fma(a.value, b.value, c.value); }
RNNKERN_DEVICE Float sigmoid(Float x) { return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x.value)); }
RNNKERN_DEVICE Double sigmoid(Double x) { return 1.0 / (1.0 + ::exp(-x.value)); }
RNNKERN_DEVICE Float tanh(Float x) {
  return multiply_add(-2.0f, reciprocal_approx(1.0f + exp2_approx(2.88539008f * x.value)), 1.0f);
}
RNNKERN_DEVICE Double tanh(Double x) { return ::tanh(x.value); }

}  // namespace rnnkern::cuda
