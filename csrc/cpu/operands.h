// What products multiply: elements of rows of x or h, and of packed weights; sums are in Compute<S>.
//
//   storage S               element
//   float, double           S
//   Bfloat16, Float16       float
//   Bfloat16 (avx512bf16)   Bfloat16, weights in pairs along k: one instruction multiplies and adds two terms of k
#pragma once

#include "cpu/convert.h"

namespace rnnkern::RNNKERN_ISA {

template <class S>
struct ElementOf {
  using type = Compute<S>;
};
#ifdef __AVX512BF16__
template <>
struct ElementOf<Bfloat16> {
  using type = Bfloat16;
};
#endif
template <class S>
using Element = typename ElementOf<S>::type;

template <class A>
constexpr int kTerms = 1;  // of k, in a multiply-add
template <>
inline constexpr int kTerms<Bfloat16> = 2;

// The size along k of rows of A and of packed weights; what it exceeds k by is zero in both.
template <class A>
RNNKERN_FN int64_t padded(int64_t k) {
  return (k + kTerms<A> - 1) / kTerms<A> * kTerms<A>;
}

// What a multiply-add takes: kTerms of a row in every lane, and as many weights of each lane's column.
template <class A>
struct Factor {
  Vec<A> v;
  RNNKERN_FN static Factor all(const A* p) { return {Vec<A>(*p)}; }
  RNNKERN_FN static Factor load(const A* p) { return {Vec<A>::load(p)}; }
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
  if constexpr (kTerms<Element<S>> == 2) {
    return Vec<float>(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p)));
  }
#endif
  return load_lanes(p, n);
}
template <class S>
RNNKERN_FN void store_packed(Element<S>* p, Vec<Compute<S>> x) {
  if constexpr (kTerms<Element<S>> == 2) {
    memcpy(p, &x.v, sizeof(x.v));
  } else {
    x.store(p);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
