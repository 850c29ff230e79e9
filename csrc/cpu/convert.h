// Between storage and compute types: vectors, rows, and rounding to storage (to nearest even).
#pragma once

#include "cpu/dtype.h"
#include "cpu/simd.h"

namespace rnnkern::RNNKERN_ISA {

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

RNNKERN_FN float to_compute(float x) { return x; }
RNNKERN_FN double to_compute(double x) { return x; }
RNNKERN_FN float to_compute(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
RNNKERN_FN float to_compute(Float16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    const uint32_t bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  // The exponent's bias differs by 112; a multiplication by 2^112 also normalises subnormals.
  const uint32_t bits = magnitude << 13;
  float value;
  memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  return sign ? -value : value;
#endif
}

template <class S>
S to_storage(Compute<S> x);
template <>
RNNKERN_FN float to_storage<float>(float x) {
  return x;
}
template <>
RNNKERN_FN double to_storage<double>(double x) {
  return x;
}
template <>
RNNKERN_FN Bfloat16 to_storage<Bfloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};  // NaN stays NaN
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
RNNKERN_FN Float16 to_storage<Float16>(float x) {
#ifdef __F16C__
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and more
  if (magnitude < 0x38800000) {                                   // below 2^-14: subnormal, by adding 2^-1
    float value;
    memcpy(&value, &magnitude, 4);
    value += 0.5f;
    memcpy(&magnitude, &value, 4);
    return {uint16_t(sign | (magnitude - 0x3f000000))};
  }
  return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
#endif
}

// The first n lanes of a vector from memory of any storage type; the others are zero.
template <class S>
RNNKERN_FN Vec<Compute<S>> load_lanes(const S* p, int n) {
  using V = Vec<Compute<S>>;
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return n == V::kLanes ? V::load(p) : V::load_n(p, n);
  } else {
    float lanes[V::kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = to_compute(p[i]);
    return V::load(lanes);
  }
}

// Stores the first n lanes and gives back what was stored, rounded to the storage type.
template <class S>
RNNKERN_FN Vec<Compute<S>> store_lanes(S* p, Vec<Compute<S>> x, int n) {
  using V = Vec<Compute<S>>;
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    if (n == V::kLanes) {
      x.store(p);
    } else {
      x.store_n(p, n);
    }
    return x;
  } else {
    float lanes[V::kLanes];
    x.store(lanes);
    for (int i = 0; i < n; ++i) {
      p[i] = to_storage<S>(lanes[i]);
      lanes[i] = to_compute(p[i]);
    }
    return V::load(lanes);
  }
}

template <class S>
void load_row(const S* from, Compute<S>* to, int64_t count) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    if (count > 0) memcpy(to, from, size_t(count) * sizeof(S));  // an empty row may have no address
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_compute(from[i]);
  }
}
template <class S>
void store_row(const Compute<S>* from, S* to, int64_t count) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    if (count > 0) memcpy(to, from, size_t(count) * sizeof(S));  // an empty row may have no address
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_storage<S>(from[i]);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
