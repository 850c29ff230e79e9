// What the attention kernels share: which keys are valid, rows of tensors, the factors of tanh, sums over a block.
#pragma once

#include "cuda/device.h"

namespace rnnkern::cuda {

RNNKERN_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RNNKERN_DEVICE int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Which keys of which batch rows exist: cpu/attention.h.
struct Padding {
  const int64_t* lengths;  // [B] or null
  const uint8_t* mask;     // [B, Tk] or null, with this stride between batch rows
  int64_t mask_row;
  int64_t Tk;
};
// The keys of one batch row.
struct Keys {
  int64_t length;
  const uint8_t* mask;

  RNNKERN_DEVICE Keys(const Padding& padding, int64_t b)
      : length(padding.Tk), mask(padding.mask ? padding.mask + b * padding.mask_row : nullptr) {
    if (!padding.lengths) return;
    const int64_t given = load(padding.lengths + b);
    length = given < 0 ? 0 : smaller(given, padding.Tk);
  }
  RNNKERN_DEVICE bool valid(int64_t j) const { return j < length && !(mask && load(mask + j)); }
};
// In the place of keys, where all rows are to be read.
struct AllRows {
  RNNKERN_DEVICE bool valid(int64_t) const { return true; }
};

// [B, rows, columns]: strides in elements, columns contiguous. `aligned`: every row begins at a multiple of 16 bytes.
template <class S>
struct Tensor3 {
  const S* data;
  int64_t batch, row;
  bool aligned;
};

// `count` consecutive elements as floats, of which those from `there` on are zero and not read.
template <int count, class S>
RNNKERN_DEVICE void load_floats(float (&to)[count], const S* from, int64_t there, bool aligned) {
  if (aligned && there >= count) {
    const Vec<S, count> values = load(reinterpret_cast<const Vec<S, count>*>(from));
    RNNKERN_UNROLLED
    for (int i = 0; i < count; ++i) to[i] = to_float(values.at[i]);
  } else {
    RNNKERN_UNROLLED
    for (int i = 0; i < count; ++i) to[i] = i < there ? to_float(load(from + i)) : 0.0f;
  }
}

constexpr float kLog2e = 1.44269504f, kMinusInfinity = -__builtin_huge_valf();

// tanh(q + k) = 1 - 2 r with r = 1 / d, d = 1 + e^2q e^2k. Two d share one reciprocal, so that the product of two
// must stay finite: beyond kFactorLimit elements are not factored.
constexpr float kFactorLimit = 10.0f;
RNNKERN_DEVICE bool is_large(float x) { return x > kFactorLimit || x < -kFactorLimit; }
// e^2x. The argument's rounding, up to 2^-20 of the result, is made good.
RNNKERN_DEVICE float exp_twice(float x) {
  constexpr float kHigh = 2.88539004f, kLow = 3.8519e-8f, kLn2 = 0.693147181f;  // kHigh + kLow = 2 log2(e)
  const float argument = kHigh * x, rest = multiply_add(x, kLow, multiply_add(x, kHigh, -argument));
  const float power = exp2_approx(argument);
  return multiply_add(power * kLn2, rest, power);
}
RNNKERN_DEVICE float factored_denominator(float eq, float ek) { return multiply_add(eq, ek, 1.0f); }
// The same from the elements: beyond 20, tanh rounds to 1. NaN stays NaN.
RNNKERN_DEVICE float guarded_denominator(float q, float k) {
  constexpr float kMost = 2 * kFactorLimit;
  const float x = q + k;
  return 1.0f + exp_twice(x > kMost ? kMost : x < -kMost ? -kMost : x);
}

RNNKERN_DEVICE float larger(float a, float b) { return a > b ? a : b; }  // b if a is NaN
struct Largest {
  RNNKERN_DEVICE float operator()(float a, float b) const { return larger(a, b); }
};
struct Sum {
  RNNKERN_DEVICE float operator()(float a, float b) const { return a + b; }
};
template <class Combine>
RNNKERN_DEVICE float over_warp(float value, Combine combine) {
  RNNKERN_UNROLLED
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  return value;
}
// Over all threads of a block of kWarps warps; `slots` are kWarps floats of shared memory.
template <int kWarps, class Combine>
RNNKERN_DEVICE float over_block(float value, float* slots, Combine combine) {
  value = over_warp(value, combine);
  sync_block();  // the slots may be in use
  if (lane_index() == 0) store(slots + warp_index(), value);
  sync_block();
  float result = load(slots);
  RNNKERN_UNROLLED
  for (int warp = 1; warp < kWarps; ++warp) result = combine(result, load(slots + warp));
  return result;
}

}  // namespace rnnkern::cuda
