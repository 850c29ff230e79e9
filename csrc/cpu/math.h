// Elementary functions on Vec: exp, sigmoid, tanh, relu, reductions.
//
// Base: 2^t = 2^n (1 + q), n = round(t) by adding 1.5 * 2^mantissa (the integer lands in the low bits), q = r p(r) with
// r = t - n in [-1/2, 1/2]. Keeping q apart keeps tanh relatively accurate near zero. Divisions are IEEE divisions:
// they cost no more than a reciprocal with Newton steps on current cores, and round alike on every instruction set.
//
// float: degree 5 minimax for (2^r - 1) / r (2e-9); sigmoid within 9e-8, tanh within 1.5e-7 of the exact value.
// double: degree 12 Taylor (4e-18); a two-part log2(e) keeps exp at about 1 ulp.
#pragma once

#include "cpu/simd.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float kMagic = 12582912.f;  // 1.5 * 2^23
  static constexpr int kBias = 127, kMantissa = 23;
  static constexpr float kLog2e = 1.44269504f, kLog2eLow = 1.92596299e-8f;
  static constexpr float kLowest = -87.f, kHighest = 88.f;  // exp stays normal and finite between these
  static constexpr float kCoefficients[] = {1.53535961e-4f, 1.3398856e-3f,  9.61843643e-3f,
                                            5.55033253e-2f, 2.40226479e-1f, 6.93147203e-1f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kBias = 1023, kMantissa = 52;
  static constexpr double kLog2e = 1.4426950408889634, kLog2eLow = 2.0355273740931033e-17;
  static constexpr double kLowest = -708.0, kHighest = 709.0;
  static constexpr double kCoefficients[] = {1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708116e-10,
                                             7.054911620801123e-09,  1.01780860092397e-07,   1.321548679014431e-06,
                                             1.5252733804059841e-05, 0.0001540353039338161,  0.0013333558146428443,
                                             0.009618129107628477,   0.05550410866482158,    0.24022650695910072,
                                             0.6931471805599453};
};

// e^(factor x) = scale * (1 + q); factor x within [kLowest, kHighest]; factor a power of two, or minus one.
template <class T>
struct ExpParts {
  Vec<T> q, scale;
};
template <class T>
RNNKERN_FN ExpParts<T> exp_parts(Vec<T> x, T factor) {
  using C = Exp2Constants<T>;
  using V = Vec<T>;
  const V magic(C::kMagic), log2e(factor * C::kLog2e);
  const V shifted = fma(x, log2e, magic);
  const V n = shifted - magic;
  V r = fma(x, log2e, V(-n.v));
  if constexpr (sizeof(T) == 8) r = fma(x, V(factor * C::kLog2eLow), r);
  V p(C::kCoefficients[0]);
  RNNKERN_UNROLL
  for (int i = 1; i < int(sizeof(C::kCoefficients) / sizeof(T)); ++i) p = fma(p, r, V(C::kCoefficients[i]));
  using IntValue = typename V::IntValue;
  using Int = typename V::Int;
  const IntValue exponent = (reinterpret_cast<IntValue>(shifted.v) + Int(C::kBias)) << C::kMantissa;
  return {p * r, V(reinterpret_cast<typename V::Value>(exponent))};
}

// NaN passes through every one of these: a comparison with NaN is false and keeps x.
template <class T>
RNNKERN_FN Vec<T> clamp(Vec<T> x, T low, T high) {
  return smaller(Vec<T>(high), larger(Vec<T>(low), x));
}
template <class T>
RNNKERN_FN Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v < b.v ? b.v : a.v);
}
template <class T>
RNNKERN_FN Vec<T> relu(Vec<T> x) {
  using Value = typename Vec<T>::Value;
  return Vec<T>(x.v < Value{} ? Value{} : x.v);
}
template <class T>
RNNKERN_FN Vec<T> unless_negative(Vec<T> x, Vec<T> value) {
  using Value = typename Vec<T>::Value;
  return Vec<T>(x.v <= Value{} ? Value{} : value.v);
}

// x is clamped to [kLowest, kHighest]: the result is never zero, subnormal or infinite.
template <class T>
RNNKERN_FN Vec<T> exp(Vec<T> x) {
  using C = Exp2Constants<T>;
  const ExpParts<T> e = exp_parts(clamp(x, C::kLowest, C::kHighest), T(1));
  return fma(e.q, e.scale, e.scale);
}
template <class T>
RNNKERN_FN Vec<T> sigmoid(Vec<T> x) {
  constexpr T kLimit =
      sizeof(T) == 4 ? 43 : 300;  // beyond it the result rounds to 0 or 1 in sums, and nothing overflows
  const ExpParts<T> e = exp_parts(clamp(x, -kLimit, kLimit), T(-1));
  const Vec<T> one(T(1));
  return one / (fma(e.q, e.scale, e.scale) + one);
}
template <class T>
RNNKERN_FN Vec<T> tanh(Vec<T> x) {
  constexpr T kLimit = 20;  // tanh(20) rounds to 1 in double
  const ExpParts<T> e = exp_parts(clamp(x, -kLimit, kLimit), T(2));
  const Vec<T> expm1 = fma(e.q, e.scale, e.scale - Vec<T>(T(1)));  // e^2x - 1
  return expm1 / (expm1 + Vec<T>(T(2)));
}

// Over the lanes, in lane order.
template <class T>
RNNKERN_FN T sum_lanes(Vec<T> x) {
  T sum = x.v[0];
  for (int i = 1; i < Vec<T>::kLanes; ++i) sum += x.v[i];
  return sum;
}
template <class T>
RNNKERN_FN T max_lanes(Vec<T> x) {
  T best = x.v[0];
  for (int i = 1; i < Vec<T>::kLanes; ++i) best = best < x.v[i] ? x.v[i] : best;
  return best;
}

}  // namespace rnnkern::RNNKERN_ISA
