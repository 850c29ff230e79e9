// What products multiply: rows of x or h, and packed weights, each in a type of its own; sums are in Compute<S>.
//
//   storage S               rows      packed weights
//   float, double           S         S
//   Bfloat16, Float16       float     float
//   Bfloat16 (avx512bf16)   Bfloat16  Bfloat16, in pairs along k: one instruction multiplies and adds two terms of k
#pragma once

#include "cpu/convert.h"

namespace rnnkern::RNNKERN_ISA {

template <class S>
struct Operands {
  using Row = Compute<S>;
  using Weight = Compute<S>;
};
#ifdef __AVX512BF16__
template <>
struct Operands<Bfloat16> {
  using Row = Bfloat16;
  using Weight = Bfloat16;
};
#endif

template <class A>
constexpr int kTerms = 1;  // of k, that a multiply-add of rows of A takes
template <>
inline constexpr int kTerms<Bfloat16> = 2;

// Sizes along k of rows of A and of their weights; what is added is zero in both.
template <class A>
RNNKERN_FN int64_t padded(int64_t k) {
  return (k + kTerms<A> - 1) / kTerms<A> * kTerms<A>;
}

// What a multiply-add takes: kTerms of a row in every lane, and as many weights of each lane's column.
template <class A>
struct Factor {
  Vec<A> v;
  RNNKERN_FN static Factor all(const A* p) { return {Vec<A>(*p)}; }
  template <class W>
  RNNKERN_FN static Factor load(const W* p) {
    return {load_lanes(p, Vec<A>::kLanes)};
  }
};
template <class A>
RNNKERN_FN Vec<A> fma(Factor<A> a, Factor<A> b, Vec<A> c) {
  return fma(a.v, b.v, c);
}

#ifdef __AVX512BF16__
// Subnormal numbers count as zero, in and out.
template <>
struct Factor<Bfloat16> {
  __m512i v;
  RNNKERN_FN static Factor all(const Bfloat16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return {_mm512_set1_epi32(pair)};
  }
  RNNKERN_FN static Factor load(const Bfloat16* p) { return {_mm512_loadu_si512(p)}; }
};
RNNKERN_FN Vec<float> fma(Factor<Bfloat16> a, Factor<Bfloat16> b, Vec<float> c) {
  return Vec<float>(_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v));
}
#endif

// Where weights are packed, a vector holds one row's next elements of k, transposed into one of kTerms elements of 16
// columns; n elements are loaded, the others are zero.
template <class S>
RNNKERN_FN Vec<Compute<S>> load_for_packing(const S* p, int n) {
#ifdef __AVX512BF16__
  if constexpr (kTerms<typename Operands<S>::Row> == 2) {
    return Vec<float>(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p)));
  }
#endif
  return load_lanes(p, n);
}
template <class S>
RNNKERN_FN void store_packed(typename Operands<S>::Weight* p, Vec<Compute<S>> x) {
  if constexpr (kTerms<typename Operands<S>::Row> == 2) {
    memcpy(p, &x.v, sizeof(x.v));
  } else {
    store_lanes(p, x, Vec<Compute<S>>::kLanes);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
