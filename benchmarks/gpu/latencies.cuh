// Kernels that time what the engines' exchanges and products are made of, each a loop of one thing.
//
// A cluster's exchange is that of the cluster engine, a grid's that of the grid engine: every block owns a part of h,
// gives it to all others, and waits for theirs. Both change h as they go, so that a test sees whether it arrived:
// after each step, word w holds what its owner's neighbour had, plus one.
#pragma once

#include "cuda/device.h"

#if defined(RNNKERN_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNNKERN_CLUSTERS 1
#else  // there are none, and no kernel that needs them is launched
#define RNNKERN_CLUSTERS 0
#endif

namespace rnnkern::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;                                          // loads in flight, and chains of products
constexpr int kFlagStride = 32;                                     // a flag has a cache line of its own
using Word = Vec<uint32_t, 4>;                                      // 16 bytes, the widest access
constexpr int kReadBytes = kUnroll * kThreads * int(sizeof(Word));  // of a block in a step of the reading kernels

struct Loop {
  int steps;
  int cluster;      // blocks of a cluster
  int words;        // of h, or of the memory that is read; a power of two
  int own_log2;     // words of h that a block owns: 2^own_log2
  unsigned* flags;  // [blocks * kFlagStride], zero before
  Word* data;       // grid_exchange: h [2, words]; read_l2: [words]
  uint32_t* out;    // [blocks, words] of the exchanges; [blocks, kThreads] of the others
};

RNNKERN_KERNEL(kThreads, 1) empty(RNNKERN_ARGUMENT Loop) {}

RNNKERN_KERNEL(kThreads, 1) cluster_barrier([[maybe_unused]] RNNKERN_ARGUMENT Loop loop) {
#if RNNKERN_CLUSTERS
  for (int step = 0; step < loop.steps; ++step) sync_cluster();
#endif
}

// Shared memory: h [2, words].
RNNKERN_KERNEL(kThreads, 1) cluster_exchange([[maybe_unused]] RNNKERN_ARGUMENT Loop loop) {
#if RNNKERN_CLUSTERS
  Word* const h = reinterpret_cast<Word*>(shared_memory());
  const int own = 1 << loop.own_log2, first = cluster_rank() * own, mask = loop.words - 1;
  for (int w = thread_index(); w < loop.words; w += kThreads) store(h + w, Word{{uint32_t(w), 0, 0, 0}});
  sync_cluster();
  for (int step = 0; step < loop.steps; ++step) {
    const Word* const from = h + (step & 1) * loop.words;
    Word* const to = h + (~step & 1) * loop.words;
    for (int at = thread_index(); at < own * loop.cluster; at += kThreads) {
      const int w = first + (at & (own - 1));
      Word value = load(from + ((w + own) & mask));
      ++value.at[0];
      store(cluster_shared(to + w, at >> loop.own_log2), value);
    }
    sync_cluster();
  }
  for (int w = thread_index(); w < loop.words; w += kThreads)
    store(loop.out + block_index() * loop.words + w, load(h + (loop.steps & 1) * loop.words + w).at[0]);
#endif
}

// Two blocks, two flags.
RNNKERN_KERNEL(kThreads, 1) flag_ping_pong(RNNKERN_ARGUMENT Loop loop) {
  if (thread_index() != 0) return;
  unsigned* const own = loop.flags + block_index() * kFlagStride;
  const unsigned* const other = loop.flags + (1 - block_index()) * kFlagStride;
  for (unsigned step = 1; step <= unsigned(loop.steps); ++step) {
    if (block_index() == 0) store_release(own, step);
    while (load_acquire(other) < step) {
    }
    if (block_index() == 1) store_release(own, step);
  }
}

// A buffer is written again two steps later, when all flags of the step between have told that its readers are done.
RNNKERN_KERNEL(kThreads, 1) grid_exchange(RNNKERN_ARGUMENT Loop loop) {
  const int own = 1 << loop.own_log2, first = block_index() * own, mask = loop.words - 1;
  uint32_t sum = 0;
  for (int step = 0; step < loop.steps; ++step) {
    const Word* const from = loop.data + (~step & 1) * loop.words;
    Word* const to = loop.data + (step & 1) * loop.words;
    for (int w = first + thread_index(); w < first + own; w += kThreads) {
      Word value = step == 0 ? Word{{uint32_t((w + own) & mask), 0, 0, 0}} : load_l2(from + ((w + own) & mask));
      ++value.at[0];
      store(to + w, value);
    }
    sync_block();
    if (thread_index() == 0) store_release(loop.flags + block_index() * kFlagStride, unsigned(step + 1));
    if (thread_index() < block_count()) {
      while (load_acquire(loop.flags + thread_index() * kFlagStride) < unsigned(step + 1)) {
      }
    }
    sync_block();
    for (int w = thread_index(); w < loop.words; w += kThreads) sum += load_l2(to + w).at[0];
  }
  store(loop.out + block_index() * kThreads + thread_index(), sum);
}

RNNKERN_KERNEL(kThreads, 1) grid_barrier(RNNKERN_ARGUMENT Loop loop) {
  for (int step = 0; step < loop.steps; ++step) {
    sync_block();
    if (thread_index() == 0) {
      add_release(loop.flags, 1);
      while (load_acquire(loop.flags) < unsigned(block_count() * (step + 1))) {
      }
    }
    sync_block();
  }
}

// Reads kReadBytes a step; the place moves on, so that no load is the one before.
template <class Load>
RNNKERN_DEVICE void read_steps(const Loop& loop, const Word* data, int first, const Load& load_word) {
  uint32_t sum = 0;
  for (int step = 0; step < loop.steps; ++step) {
    Word words[kUnroll];
    for (int u = 0; u < kUnroll; ++u)
      words[u] = load_word(data + ((first + (step * kUnroll + u) * kThreads + thread_index()) & (loop.words - 1)));
    for (int u = 0; u < kUnroll; ++u) sum += words[u].at[0] ^ words[u].at[1] ^ words[u].at[2] ^ words[u].at[3];
  }
  store(loop.out + block_index() * kThreads + thread_index(), sum);
}

// The shared memory of the next block of the cluster.
RNNKERN_KERNEL(kThreads, 1) read_cluster([[maybe_unused]] RNNKERN_ARGUMENT Loop loop) {
#if RNNKERN_CLUSTERS
  Word* const own = reinterpret_cast<Word*>(shared_memory());
  for (int w = thread_index(); w < loop.words; w += kThreads) store(own + w, Word{{uint32_t(w), 1, 2, 3}});
  sync_cluster();
  read_steps(loop, cluster_shared(own, (cluster_rank() + 1) & (loop.cluster - 1)), 0,
             [](const Word* word) { return load(word); });
  sync_cluster();
#endif
}

// Each block begins elsewhere.
RNNKERN_KERNEL(kThreads, 1) read_l2(RNNKERN_ARGUMENT Loop loop) {
  read_steps(loop, loop.data, block_index() * kUnroll * kThreads, [](const Word* word) { return load_l2(word); });
}

// Some values between 0.5 and 1, of either sign: a GPU takes less power, and more clocks, for zeros.
RNNKERN_DEVICE uint32_t some_bits(uint32_t seed, uint32_t random, uint32_t fixed) {
  seed = (seed + 1) * 2654435761u;
  return ((seed ^ (seed >> 15)) & random) | fixed;
}

// kChains independent products per warp and step.
template <class T, int kChains>
RNNKERN_KERNEL(kThreads, 1)
multiply_tiles(RNNKERN_ARGUMENT Loop loop) {
  constexpr bool kTf32 = sizeof(T) == 4;
  constexpr uint32_t kFixed = kTf32                                      ? 0x3F000000u
                              : sizeof(T) == 2 && std::is_same_v<T, F16> ? 0x38003800u
                                                                         : 0x3F003F00u;
  constexpr uint32_t kRandom = kTf32 ? 0x807FFFFFu : std::is_same_v<T, F16> ? 0x83FF83FFu : 0x807F807Fu;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = some_bits(uint32_t(thread_index() * 6 + i), kRandom, kFixed);
  for (int i = 0; i < 2; ++i) b[i] = some_bits(uint32_t(thread_index() * 6 + 4 + i), kRandom, kFixed);
  float d[kChains][4] = {};
  for (int step = 0; step < loop.steps; ++step) {
    for (int chain = 0; chain < kChains; ++chain) {
      if constexpr (kTf32)
        mma_16x8x8_tf32(d[chain], a, b);
      else
        mma_16x8x16<T>(d[chain], a, b);
    }
  }
  float sum = 0;
  for (int chain = 0; chain < kChains; ++chain)
    for (int i = 0; i < 4; ++i) sum += d[chain][i];
  store(loop.out + block_index() * kThreads + thread_index(), bits_of(sum));
}

// kUnroll chains per thread and step of the special functions that a sigmoid or tanh needs: 2^x, then 1 / x.
RNNKERN_KERNEL(kThreads, 1) special_functions(RNNKERN_ARGUMENT Loop loop) {
  float x[kUnroll];
  for (int u = 0; u < kUnroll; ++u)
    x[u] = float_of(some_bits(uint32_t(thread_index() * kUnroll + u), 0x7FFFFFu, 0x3F000000u));
  for (int step = 0; step < loop.steps; ++step) {
    for (int u = 0; u < kUnroll; ++u) x[u] = reciprocal_approx(exp2_approx(x[u]));
  }
  float sum = 0;
  for (int u = 0; u < kUnroll; ++u) sum += x[u];
  store(loop.out + block_index() * kThreads + thread_index(), bits_of(sum));
}

}  // namespace rnnkern::cuda
