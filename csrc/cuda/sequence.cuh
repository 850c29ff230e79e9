// Which step of a row comes when, and where it lies: see Sequence.
#pragma once

#include "cuda/device.h"
#include "cuda/layer.h"

namespace rnnkern::cuda {

// One row of a batch in one direction, of which steps 0 .. length - 1 run in its own order.
struct Row {
  int64_t length;
  int b, direction;

  RNNKERN_DEVICE Row(int direction_, int b_, int64_t length_) : length(length_), b(b_), direction(direction_) {}
  RNNKERN_DEVICE Row(const Sequence& sequence, int direction_, int b_)
      : length(sequence.lengths ? load(sequence.lengths + b_) : sequence.T), b(b_), direction(direction_) {}

  RNNKERN_DEVICE int64_t time(int64_t step) const { return direction == 0 ? step : length - 1 - step; }
  // Among all rows of all steps.
  RNNKERN_DEVICE int64_t place(const Sequence& sequence, int64_t step) const {
    const int64_t t = time(step);
    return (sequence.offsets ? load(sequence.offsets + t) : t * sequence.B) + b;
  }
  // Whether an episode starts with this step, so that the state before it is zero.
  RNNKERN_DEVICE bool starts(const Sequence& sequence, int64_t step) const {
    if (!sequence.resets) return false;
    const int64_t edge = direction == 0 ? step : length - step;
    return edge < length && load(sequence.resets + edge * sequence.B + b) != 0;
  }
};

}  // namespace rnnkern::cuda
