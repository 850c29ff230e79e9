// What products multiply, by kind A: elements of rows of x or h, and of packed weights; sums are in Compute<S>.
//
//   storage S               kind A        rows       weights
//   float, double           S             A          A
//   Bfloat16, Float16       float         A          A
//   Bfloat16 (avx512bf16)   Bfloat16      A          A, in pairs along k: one instruction multiplies and adds two terms
//   Int8Weights             Int8Weights   int16_t    int8_t, in pairs along k; sums are int32 until they are scaled
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
template <>
struct ElementOf<Int8Weights> {
  using type = Int8Weights;
};
template <class S>
using Element = typename ElementOf<S>::type;

template <class A>
struct OperandsOf {
  using Row = A;
  using Weight = A;
};
template <>
struct OperandsOf<Int8Weights> {
  using Row = int16_t;
  using Weight = int8_t;
};
template <class A>
using RowElement = typename OperandsOf<A>::Row;
template <class A>
using WeightElement = typename OperandsOf<A>::Weight;

template <class A>
constexpr bool kQuantized = false;  // whether rows and weights are integers with scales
template <>
inline constexpr bool kQuantized<Int8Weights> = true;

template <class A>
constexpr int kTerms = 1;  // of k, in a multiply-add
template <>
inline constexpr int kTerms<Bfloat16> = 2;
template <>
inline constexpr int kTerms<Int8Weights> = 2;

template <class A>
constexpr int kPerLane = int(sizeof(Compute<A>) / sizeof(WeightElement<A>));  // weights that fill a lane

// The size along k of rows of A and of packed weights; what it exceeds k by is zero in both.
template <class A>
RNNKERN_FN int64_t padded(int64_t k) {
  return (k + kPerLane<A> - 1) / kPerLane<A> * kPerLane<A>;
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

// Integers: every instruction set gives the same, as long as a sum has at most kExactTerms terms.
constexpr int kLargestRow = 32767, kLargestWeight = 127;
constexpr int64_t kExactTerms = 0x7fffffff / (kLargestRow * kLargestWeight);

struct IntegerSum {
  using Value = Vec<float>::IntValue;
  Value v;
  IntegerSum() = default;
  RNNKERN_FN explicit IntegerSum(int x) : v(x - Value{}) {}
  RNNKERN_FN Vec<float> rounded() const { return Vec<float>(__builtin_convertvector(v, Vec<float>::Value)); }
};

template <class A>
struct SumOf {
  using type = Vec<Compute<A>>;
};
template <>
struct SumOf<Int8Weights> {
  using type = IntegerSum;
};
template <class A>
using Sum = typename SumOf<A>::type;

// Pairs of int16 in every lane.
template <>
struct Factor<Int8Weights> {
  using Value = Vec<float>::IntValue;
  Value v;
  RNNKERN_FN static Factor all(const int16_t* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return {pair - Value{}};
  }
  RNNKERN_FN static Factor load(const int8_t* p) {
#if RNNKERN_ISA_avx512
    const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {(Value)_mm512_maskz_cvtepi8_epi16(~__mmask32(0), weights)};  // GCC 12 warns of the unmasked one
#elif RNNKERN_ISA_avx2
    return {(Value)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#else
    typedef int8_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
    typedef int16_t Wide __attribute__((vector_size(kVectorBytes)));
    Narrow weights;
    memcpy(&weights, p, sizeof(weights));
    return {reinterpret_cast<Value>(__builtin_convertvector(weights, Wide))};
#endif
  }
};
RNNKERN_FN IntegerSum fma(Factor<Int8Weights> a, Factor<Int8Weights> b, IntegerSum c) {
#if defined(__AVX512VNNI__)
  c.v = (IntegerSum::Value)_mm512_dpwssd_epi32((__m512i)c.v, (__m512i)a.v, (__m512i)b.v);
#elif RNNKERN_ISA_avx512
  c.v += (IntegerSum::Value)_mm512_madd_epi16((__m512i)a.v, (__m512i)b.v);
#elif RNNKERN_ISA_avx2
  c.v += (IntegerSum::Value)_mm256_madd_epi16((__m256i)a.v, (__m256i)b.v);
#else
  const Bits low_a = reinterpret_cast<Bits>(a.v) << 16, low_b = reinterpret_cast<Bits>(b.v) << 16;
  c.v += (reinterpret_cast<IntegerSum::Value>(low_a) >> 16) * (reinterpret_cast<IntegerSum::Value>(low_b) >> 16);
  c.v += (a.v >> 16) * (b.v >> 16);
#endif
  return c;
}

// Where weights are packed, a vector holds one row's next elements of k, transposed into kPerLane elements of 16
// columns; n elements are loaded, the others are zero.
template <class S>
RNNKERN_FN Vec<Compute<S>> load_for_packing(const StoredWeight<S>* p, int n) {
  if constexpr (kQuantized<Element<S>>) {
    Vec<float> weights(0.0f);
    if (n == kVectorBytes) {
      memcpy(&weights, p, kVectorBytes);
    } else {
      memcpy(&weights, p, size_t(n));
    }
    return weights;
  } else {
#ifdef __AVX512BF16__
    if constexpr (kTerms<Element<S>> == 2) {
      return Vec<float>(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p)));
    }
#endif
    return load_lanes(p, n);
  }
}
// p: packed weights of these columns from an element of k on that begins a lane; `width` columns in all.
template <class S>
RNNKERN_FN void store_packed(WeightElement<Element<S>>* p, Vec<Compute<S>> x, int64_t width) {
  if constexpr (kQuantized<Element<S>>) {
    const Bits pairs = reinterpret_cast<Bits>(x.v);
    store_half(p, lower_halves(pairs), Vec<float>::kLanes);
    store_half(p + 2 * width, lower_halves(pairs >> 16), Vec<float>::kLanes);
  } else if constexpr (kTerms<Element<S>> == 2) {
    memcpy(p, &x.v, sizeof(x.v));
  } else {
    x.store(p);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
