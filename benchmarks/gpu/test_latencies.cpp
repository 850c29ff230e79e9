// The exchanges of latencies.cuh on the emulator: every word arrives, under several schedules. Its exit status tells.
#include <cstdio>

#include "cuda/launch.h"
#include "gpu/latencies.cuh"

using namespace rnnkern::cuda;
namespace emulator = rnnkern::emulator;

namespace {

int failures = 0;

void expect(uint32_t found, uint32_t expected, const char* what, int at) {
  if (found == expected) return;
  if (failures++ < 10) std::printf("%s %d: %u, not %u\n", what, at, found, expected);
}

struct Memory {
  std::vector<unsigned> flags;
  std::vector<Word> data;
  std::vector<uint32_t> out;
  emulator::GlobalMemory known;
  Memory(int blocks, int words)
      : flags(size_t(blocks * kFlagStride)), data(size_t(2 * words)), out(size_t(blocks * std::max(words, kThreads))) {
    known.add(flags.data(), flags.size() * sizeof(unsigned));
    known.add(data.data(), data.size() * sizeof(Word));
    known.add(out.data(), out.size() * sizeof(uint32_t));
  }
  Loop loop(int steps, int cluster, int words, int own_log2) {
    return {steps, cluster, words, own_log2, flags.data(), data.data(), out.data()};
  }
};

int log2_of(int value) { return value == 1 ? 0 : 1 + log2_of(value / 2); }

void test_cluster_exchange(int cluster, int words, int steps) {
  const int own = words / cluster;
  Memory memory(2 * cluster, words);
  launch("cluster_exchange", cluster_exchange, {2 * cluster, kThreads, 2 * size_t(words) * sizeof(Word), cluster},
         memory.loop(steps, cluster, words, log2_of(own)), nullptr);
  for (int i = 0; i < 2 * cluster * words; ++i)
    expect(memory.out[size_t(i)], uint32_t((i % words + steps * own) % words + steps), "word of a cluster", i);
}

void test_grid_exchange(int blocks, int words, int steps) {
  Memory memory(blocks, words);
  launch("grid_exchange", grid_exchange, {blocks, kThreads, 0, 1, true},
         memory.loop(steps, 1, words, log2_of(words / blocks)), nullptr);
  uint32_t expected = 0;
  for (int step = 1; step <= steps; ++step) expected += uint32_t(words * (words - 1) / 2 + step * words);
  for (int block = 0; block < blocks; ++block) {
    uint32_t sum = 0;
    for (int thread = 0; thread < kThreads; ++thread) sum += memory.out[size_t(block * kThreads + thread)];
    expect(sum, expected, "sum of a block", block);
  }
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 3; ++seed) {
    emulator::set_seed(seed);
    test_cluster_exchange(2, 64, 3);
    test_cluster_exchange(16, 64, 4);
    test_grid_exchange(4, 256, 5);
    Memory memory(4, 1 << 12);
    const Loop loop = memory.loop(3, 2, 1 << 12, 0);
    launch("empty", empty, {4, kThreads}, loop, nullptr);
    launch("cluster_barrier", cluster_barrier, {4, kThreads, 0, 2}, loop, nullptr);
    launch("flag_ping_pong", flag_ping_pong, {2, kThreads, 0, 1, true}, loop, nullptr);
    launch("read_cluster", read_cluster, {4, kThreads, (1 << 12) * sizeof(Word), 2}, loop, nullptr);
    launch("read_l2", read_l2, {4, kThreads}, loop, nullptr);
    launch("multiply_tiles", multiply_tiles<Bf16, 2>, {1, kThreads}, loop, nullptr);
    launch("special_functions", special_functions, {1, kThreads}, loop, nullptr);
    std::fill(memory.flags.begin(), memory.flags.end(), 0u);
    launch("grid_barrier", grid_barrier, {4, kThreads, 0, 1, true}, loop, nullptr);
    expect(memory.flags[0], 12, "arrivals at barriers", int(seed));
  }
  return failures > 0;
}
