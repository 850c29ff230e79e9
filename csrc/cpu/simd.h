// One vector type per instruction set: Vec<float> and Vec<double> of the widest register that RNNKERN_ISA has.
//
// This file and all that includes it is compiled once per instruction set, each time in a namespace of its own
// (RNNKERN_ISA: portable, avx2, avx512, avx512bf16), so that the linker can never pick another set's copy of an inline
// function. For the same reason code in this namespace calls no inline function of the standard library.
//
// Arithmetic is that of the compiler's vector extension; fused multiply-adds are written out, the compiler fuses none
// (except for `portable`, where fma is a * b + c and the compiler may fuse it). AVX2 and AVX-512 thus round alike.
// avx512bf16 is avx512 (and defines RNNKERN_ISA_avx512 too) with products of bfloat16 and of int16 pairs.
#pragma once

#include <cstdint>
#include <cstring>

#if RNNKERN_ISA_avx2 || RNNKERN_ISA_avx512
#include <immintrin.h>
#endif

#include "cells/cell.h"  // RNNKERN_FN

#define RNNKERN_UNROLL _Pragma("GCC unroll 32")

namespace rnnkern::RNNKERN_ISA {

#if RNNKERN_ISA_avx512
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif RNNKERN_ISA_avx2
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T>
RNNKERN_FN T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
RNNKERN_FN T max_of(T a, T b) {
  return a < b ? b : a;
}

template <class T>
struct Native;
template <>
struct Native<float> {
  using Int = int32_t;
  typedef float Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(float)), may_alias));
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntValue __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Native<double> {
  using Int = int64_t;
  typedef double Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(double)), may_alias));
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntValue __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Vec {
  using Scalar = T;
  using Value = typename Native<T>::Value;
  using IntValue = typename Native<T>::IntValue;
  using Int = typename Native<T>::Int;
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));

  Value v;

  Vec() = default;
  RNNKERN_FN Vec(Value value) : v(value) {}
  RNNKERN_FN explicit Vec(T x) : v(x - Value{}) {}  // x in every lane

  // Unaligned. The _n forms touch the first n lanes only; lanes that are not loaded are zero.
  RNNKERN_FN static Vec load(const T* p) { return Value(*reinterpret_cast<const typename Native<T>::Vector*>(p)); }
  RNNKERN_FN void store(T* p) const { *reinterpret_cast<typename Native<T>::Vector*>(p) = v; }
  RNNKERN_FN static Vec load_n(const T* p, int n);
  RNNKERN_FN void store_n(T* p, int n) const;
  // Lanes from n on become zero, whatever they hold.
  RNNKERN_FN Vec first(int n) const { return Vec(lane_index() < (Int(n) - IntValue{}) ? v : Value{}); }

  // Written out, since the compiler would read a table at run time, and derive masks from it.
  RNNKERN_FN static IntValue lane_index() {
    if constexpr (kLanes == 16) return IntValue{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if constexpr (kLanes == 8) return IntValue{0, 1, 2, 3, 4, 5, 6, 7};
    if constexpr (kLanes == 4) return IntValue{0, 1, 2, 3};
    if constexpr (kLanes == 2) return IntValue{0, 1};
  }
};

template <class T>
RNNKERN_FN Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v + b.v);
}
template <class T>
RNNKERN_FN Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v - b.v);
}
template <class T>
RNNKERN_FN Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v * b.v);
}
template <class T>
RNNKERN_FN Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v / b.v);
}

// The larger and the smaller of a and b; b where one of them is NaN. GCC 12 makes a comparison and a blend of `a > b ?
// a : b`.
#if RNNKERN_ISA_avx512
constexpr __mmask16 kAllLanes = 0xffff;  // GCC 12 warns of its own unmasked functions
RNNKERN_FN Vec<float> larger(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_maskz_max_ps(kAllLanes, a.v, b.v));
}
RNNKERN_FN Vec<float> smaller(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_maskz_min_ps(kAllLanes, a.v, b.v));
}
#elif RNNKERN_ISA_avx2
RNNKERN_FN Vec<float> larger(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_max_ps(a.v, b.v)); }
RNNKERN_FN Vec<float> smaller(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_min_ps(a.v, b.v)); }
#endif
template <class T>
RNNKERN_FN Vec<T> larger(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v > b.v ? a.v : b.v);
}
template <class T>
RNNKERN_FN Vec<T> smaller(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v < b.v ? a.v : b.v);
}

#if RNNKERN_ISA_avx512
RNNKERN_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(_mm512_fmadd_ps(a.v, b.v, c.v));
}
RNNKERN_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(_mm512_fmadd_pd(a.v, b.v, c.v));
}
template <>
RNNKERN_FN Vec<float> Vec<float>::load_n(const float* p, int n) {
  return Vec(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
}
template <>
RNNKERN_FN void Vec<float>::store_n(float* p, int n) const {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
}
template <>
RNNKERN_FN Vec<double> Vec<double>::load_n(const double* p, int n) {
  return Vec(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
}
template <>
RNNKERN_FN void Vec<double>::store_n(double* p, int n) const {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
}
#else
#if RNNKERN_ISA_avx2
RNNKERN_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(_mm256_fmadd_ps(a.v, b.v, c.v));
}
RNNKERN_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(_mm256_fmadd_pd(a.v, b.v, c.v));
}
template <>
RNNKERN_FN Vec<float> Vec<float>::load_n(const float* p, int n) {
  return Vec(_mm256_maskload_ps(p, (__m256i)(lane_index() < n)));
}
template <>
RNNKERN_FN void Vec<float>::store_n(float* p, int n) const {
  _mm256_maskstore_ps(p, (__m256i)(lane_index() < n), v);
}
template <>
RNNKERN_FN Vec<double> Vec<double>::load_n(const double* p, int n) {
  return Vec(_mm256_maskload_pd(p, (__m256i)(lane_index() < int64_t(n))));
}
template <>
RNNKERN_FN void Vec<double>::store_n(double* p, int n) const {
  _mm256_maskstore_pd(p, (__m256i)(lane_index() < int64_t(n)), v);
}
#else
template <class T>
RNNKERN_FN Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return Vec<T>(a.v * b.v + c.v);
}
template <class T>
RNNKERN_FN Vec<T> Vec<T>::load_n(const T* p, int n) {
  Value value{};
  memcpy(&value, p, size_t(n) * sizeof(T));
  return Vec(value);
}
template <class T>
RNNKERN_FN void Vec<T>::store_n(T* p, int n) const {
  memcpy(p, &v, size_t(n) * sizeof(T));
}
#endif
#endif

}  // namespace rnnkern::RNNKERN_ISA
