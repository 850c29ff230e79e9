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

// What tensors hold, and what weight matrices do.
template <class S>
struct StoredOf {
  using type = S;
  using Weight = S;
};
template <>
struct StoredOf<Int8Weights> {
  using type = float;
  using Weight = int8_t;
};
template <class S>
using Stored = typename StoredOf<S>::type;
template <class S>
using StoredWeight = typename StoredOf<S>::Weight;

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

// A vector of 16-bit storage, a lane to a lane of Vec<float>.
typedef uint16_t HalfLanes __attribute__((vector_size(kVectorBytes / 2)));

template <class S>
Vec<float> widen(HalfLanes bits);
template <>
RNNKERN_FN Vec<float> widen<Bfloat16>(HalfLanes bits) {
  using V = Vec<float>;
#if RNNKERN_ISA_avx512  // GCC 12 converts in halves
  const V::IntValue wide = reinterpret_cast<V::IntValue>(_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)bits));
#else
  const V::IntValue wide = __builtin_convertvector(bits, V::IntValue);
#endif
  return V(reinterpret_cast<V::Value>(wide << 16));
}
template <>
RNNKERN_FN Vec<float> widen<Float16>(HalfLanes bits) {
#if RNNKERN_ISA_avx512
  return Vec<float>(_mm512_maskz_cvtph_ps(kAllLanes, reinterpret_cast<__m256i>(bits)));
#elif RNNKERN_ISA_avx2
  return Vec<float>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  Vec<float> wide;
  for (int i = 0; i < Vec<float>::kLanes; ++i) wide.v[i] = to_compute(Float16{bits[i]});
  return wide;
#endif
}

// The lower halves of lanes.
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
RNNKERN_FN HalfLanes lower_halves(Bits bits) {
#if RNNKERN_ISA_avx512
  return reinterpret_cast<HalfLanes>(_mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)bits));
#else
  return __builtin_convertvector(bits, HalfLanes);
#endif
}

// As to_storage rounds; subnormal numbers become zero where the instruction set converts to bfloat16 itself.
template <class S>
HalfLanes narrow(Vec<float> x);
template <>
RNNKERN_FN HalfLanes narrow<Bfloat16>(Vec<float> x) {
#ifdef __AVX512BF16__
  return (HalfLanes)_mm512_cvtneps_pbh(x.v);
#else
  const Bits bits = reinterpret_cast<Bits>(x.v);
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return lower_halves(x.v != x.v ? bits >> 16 | 0x40 : rounded);
#endif
}
template <>
RNNKERN_FN HalfLanes narrow<Float16>(Vec<float> x) {
#if RNNKERN_ISA_avx512
  return reinterpret_cast<HalfLanes>(_mm512_maskz_cvtps_ph(kAllLanes, x.v, _MM_FROUND_TO_NEAREST_INT));
#elif RNNKERN_ISA_avx2
  return reinterpret_cast<HalfLanes>(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
#else
  HalfLanes bits;
  for (int i = 0; i < Vec<float>::kLanes; ++i) bits[i] = to_storage<Float16>(x.v[i]).bits;
  return bits;
#endif
}

// The first n of 16-bit lanes; those that are not loaded are zero.
RNNKERN_FN HalfLanes load_half(const void* p, int n) {
#if RNNKERN_ISA_avx512
  return reinterpret_cast<HalfLanes>(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
#else
  HalfLanes bits{};
  if (n == Vec<float>::kLanes) {
    memcpy(&bits, p, sizeof(bits));
  } else {
    memcpy(&bits, p, size_t(n) * 2);
  }
  return bits;
#endif
}
RNNKERN_FN void store_half(void* p, HalfLanes bits, int n) {
#if RNNKERN_ISA_avx512
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), reinterpret_cast<__m256i>(bits));
#else
  if (n == Vec<float>::kLanes) {
    memcpy(p, &bits, sizeof(bits));
  } else {
    memcpy(p, &bits, size_t(n) * 2);
  }
#endif
}

// The first n lanes of a vector from memory of any storage type; the others are zero.
template <class S>
RNNKERN_FN Vec<Compute<S>> load_lanes(const S* p, int n) {
  using V = Vec<Compute<S>>;
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return n == V::kLanes ? V::load(p) : V::load_n(p, n);
  } else {
    return widen<S>(load_half(p, n));
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
    const HalfLanes bits = narrow<S>(x);
    store_half(p, bits, n);
    return widen<S>(bits);
  }
}

template <class From, class To>
void convert_row(const From* from, To* to, int64_t count) {
  if constexpr (sizeof(From) == sizeof(To)) {
    if (count > 0) memcpy(to, from, size_t(count) * sizeof(From));  // an empty row may have no address
  } else {
    constexpr int kLanes = Vec<float>::kLanes;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int lanes = int(min_of(int64_t(kLanes), count - i));
      store_lanes(to + i, load_lanes(from + i, lanes), lanes);
    }
  }
}

}  // namespace rnnkern::RNNKERN_ISA
