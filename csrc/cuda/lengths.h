// Lengths of rows, which callers know on the CPU, brought to the GPU with the launch itself: no copy that waits, and a
// CUDA graph keeps them.
#pragma once

#include <cstdint>

namespace rnnkern::cuda {

void place_lengths(const int64_t* lengths, int64_t B, int64_t* out, void* stream);  // out: [B] on the device
// First row of each step of packed rows, [T + 1]: offsets[t] = sum over rows of min(length, t).
void place_offsets(const int64_t* lengths, int64_t B, int64_t T, int64_t* offsets, void* stream);  // on the device

}  // namespace rnnkern::cuda
