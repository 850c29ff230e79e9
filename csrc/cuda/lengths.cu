#include "cuda/lengths.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace rnnkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPerLaunch = 480;  // arguments of a kernel have 4 KB

struct Lengths {
  int64_t* out;
  int count;
  int64_t values[kPerLaunch];
};

struct Offsets {
  const int64_t* lengths;  // [B]
  int64_t B, T;
  int64_t* offsets;  // [T + 1]
};

RNNKERN_KERNEL(kThreads, 1)
write_lengths(RNNKERN_ARGUMENT Lengths a) {
  for (int i = thread_index(); i < a.count; i += block_threads()) store(a.out + i, a.values[i]);
}

RNNKERN_KERNEL(kThreads, 1)
write_offsets(RNNKERN_ARGUMENT Offsets a) {
  const int64_t t = int64_t(block_index()) * block_threads() + thread_index();
  if (t > a.T) return;
  int64_t rows = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t length = load(a.lengths + b);
    rows += length < t ? length : t;
  }
  store(a.offsets + t, rows);
}

}  // namespace

void place_lengths(const int64_t* lengths, int64_t B, int64_t* out, void* stream) {
  Lengths a;
  for (int64_t first = 0; first < B; first += kPerLaunch) {
    a.out = out + first;
    a.count = int(std::min<int64_t>(kPerLaunch, B - first));
    std::copy_n(lengths + first, a.count, a.values);
    launch("write_lengths", write_lengths, {1, kThreads}, a, Stream(stream));
  }
}

void place_offsets(const int64_t* lengths, int64_t B, int64_t T, int64_t* offsets, void* stream) {
  launch("write_offsets", write_offsets, {checked_blocks(T / kThreads + 1, "write_offsets"), kThreads},
         Offsets{lengths, B, T, offsets}, Stream(stream));
}

}  // namespace rnnkern::cuda
