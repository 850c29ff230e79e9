// Rows of floats as integers with one scale, for products with int8 weights.
#pragma once

#include "cpu/operands.h"

namespace rnnkern::RNNKERN_ISA {

// to[i] = from[i] / scale to the nearest integer, ties to even, where scale = max |from| / kLargestRow, which is
// returned; past `count` zeros up to `padded_count`. A row below 1e-30 counts as zero. A row that holds an infinity or
// NaN has the scale NaN, so that its products are NaN, all of them.
RNNKERN_FN float quantize_row(const float* from, int64_t count, int16_t* to, int64_t padded_count) {
  using V = Vec<float>;
  using Ints = V::IntValue;
  Ints largest{};
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const V x = load_lanes(from + i, int(min_of(int64_t(V::kLanes), count - i)));
    const Ints magnitude = reinterpret_cast<Ints>(x.v) & 0x7fffffff;  // ordered as the numbers are, NaN largest
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = 0;
  for (int i = 0; i < V::kLanes; ++i) bits = max_of(bits, int32_t(largest[i]));
  float maximum;
  memcpy(&maximum, &bits, sizeof(bits));
  const bool finite = bits < 0x7f800000;
  const float inverse = finite && maximum > 1e-30f ? float(kLargestRow) / maximum : 0.0f;
  // Added to this, a number below 2^22 is rounded to an integer, which the sum's lower bits then hold.
  const V magic(0x1.8p23f);
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const int lanes = int(min_of(int64_t(V::kLanes), count - i));
    const V sum = load_lanes(from + i, lanes) * V(inverse) + magic;
    store_half(to + i, lower_halves(reinterpret_cast<Bits>(sum.v)), lanes);
  }
  memset(to + count, 0, size_t(padded_count - count) * sizeof(int16_t));
  if (!finite) return __builtin_nanf("");
  return maximum * (1.0f / float(kLargestRow));
}

}  // namespace rnnkern::RNNKERN_ISA
