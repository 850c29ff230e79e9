// The wrappers of cuda/device.h on the CPU; what each does is said there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/emulator.h"

#define RNNKERN_DEVICE inline
#define RNNKERN_KERNEL(threads, blocks) void
#define RNNKERN_ARGUMENT const

namespace rnnkern::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline int thread_index() { return emulator::current->index; }
inline int block_threads() { return emulator::grid().threads; }
inline int block_index() { return emulator::current->block->index; }
inline int block_count() { return emulator::grid().blocks; }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline int cluster_rank() { return emulator::current->block->rank; }

inline unsigned char* shared_memory() { return emulator::current->block->shared; }
template <class T>
T* cluster_shared(T* own, int rank) {
  emulator::Block& block = *emulator::current->block;
  if (rank < 0 || rank >= emulator::grid().cluster) emulator::fail("no block has rank " + std::to_string(rank));
  unsigned char* address = reinterpret_cast<unsigned char*>(own);
  if (address < block.shared || address >= block.shared + emulator::grid().shared_bytes)
    emulator::fail("cluster_shared takes an address of the thread's own shared memory");
  return reinterpret_cast<T*>(block.cluster->blocks[size_t(rank)].shared + (address - block.shared));
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};
template <class T>
T load(const T* address) {
  emulator::access(address, sizeof(T), false);
  return *address;
}
template <class T>
void store(T* address, T value) {
  emulator::access(address, sizeof(T), true);
  *address = value;
}
template <class T>
void store_streaming(T* address, T value) {
  store(address, value);
}
template <class T>
T load_l2(const T* address) {
  return load(address);
}

inline unsigned load_acquire(const unsigned* address) {
  emulator::poll("load_acquire");
  emulator::access(address, sizeof(unsigned), false);
  return *address;
}
inline void store_release(unsigned* address, unsigned value) { store(address, value); }
template <class T>
T atomic_add(T* address, T value) {
  emulator::access(address, sizeof(T), true);  // may suspend before, never between
  const T before = *address;
  *address = before + value;
  return before;
}
inline unsigned add_release(unsigned* address, unsigned value) { return atomic_add(address, value); }
inline void fence_device() {}

inline emulator::Warp& own_warp() { return emulator::current->block->warps[size_t(warp_index())]; }
inline void sync_warp() { emulator::arrive_and_wait(own_warp().barrier, "sync_warp"); }
inline void sync_block() { emulator::arrive_and_wait(emulator::current->block->barrier, "sync_block"); }
inline void sync_named(int barrier, int threads) {
  static const char* const places[16] = {"",
                                         "sync_named(1)",
                                         "sync_named(2)",
                                         "sync_named(3)",
                                         "sync_named(4)",
                                         "sync_named(5)",
                                         "sync_named(6)",
                                         "sync_named(7)",
                                         "sync_named(8)",
                                         "sync_named(9)",
                                         "sync_named(10)",
                                         "sync_named(11)",
                                         "sync_named(12)",
                                         "sync_named(13)",
                                         "sync_named(14)",
                                         "sync_named(15)"};
  if (barrier < 1 || barrier > 15 || threads <= 0 || threads % 32 != 0)
    emulator::fail("sync_named takes a barrier 1 to 15 and whole warps");
  emulator::Barrier& named = emulator::current->block->named[barrier];
  if (named.arrived > 0 && named.expected != threads)
    emulator::fail("sync_named: others expect another number of threads");
  named.expected = threads;
  emulator::arrive_and_wait(named, places[barrier]);
}
inline void arrive_cluster() {
  emulator::Thread& self = *emulator::current;
  emulator::Barrier& barrier = self.block->cluster->barrier;
  if (self.cluster_arrived) emulator::fail("arrive_cluster again without wait_cluster");
  self.cluster_arrived = true;
  self.cluster_generation = barrier.generation;
  emulator::arrive(barrier);
}
inline void wait_cluster() {
  emulator::Thread& self = *emulator::current;
  if (!self.cluster_arrived) emulator::fail("wait_cluster without arrive_cluster");
  self.cluster_arrived = false;
  emulator::wait_above(self.block->cluster->barrier, self.cluster_generation, "wait_cluster");
}
inline void sync_cluster() {
  arrive_cluster();
  wait_cluster();
}

// Every lane shows `value`; then the result of `read` on all of them. The second barrier keeps the next exchange away.
template <class T, class Read>
auto exchange(const T& value, const Read& read) {
  static_assert(sizeof(T) <= sizeof(emulator::Warp::exchange[0]), "");
  emulator::Warp& warp = own_warp();
  std::memcpy(warp.exchange[lane_index()], &value, sizeof(T));
  sync_warp();
  const auto result = read([&](int lane) {
    T shown;
    std::memcpy(&shown, warp.exchange[lane & 31], sizeof(T));
    return shown;
  });
  sync_warp();
  return result;
}
template <class T>
T shuffle(T value, int lane) {
  return exchange(value, [&](const auto& of) { return of(lane); });
}
template <class T>
T shuffle_xor(T value, int mask) {
  const int own = lane_index();
  return exchange(value, [&](const auto& of) { return of(own ^ mask); });
}
inline unsigned ballot(bool value) {
  return exchange(value, [](const auto& of) {
    unsigned set = 0;
    for (int lane = 0; lane < 32; ++lane) set |= unsigned(of(lane)) << lane;
    return set;
  });
}
inline bool any_lane(bool value) { return ballot(value) != 0; }
inline bool all_lanes(bool value) { return ballot(value) == ~0u; }

// The data comes at wait_copies, the latest moment that the GPU allows.
template <int bytes>
void copy_async(void* shared, const void* global, int valid = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "");
  if (valid < 0 || valid > bytes) emulator::fail("copy_async: valid bytes out of range");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) emulator::fail("copy_async from a misaligned address");
  emulator::current->copies.push_back({shared, global, bytes, size_t(valid)});
}
inline void commit_copies() { emulator::current->groups.push_back(emulator::current->copies.size()); }
template <int groups_left>
void wait_copies() {
  emulator::Thread& self = *emulator::current;
  if (self.groups.size() <= size_t(groups_left)) return;
  const size_t count = self.groups[self.groups.size() - size_t(groups_left) - 1];
  for (size_t i = 0; i < count; ++i) {
    const emulator::Copy& copy = self.copies[i];
    emulator::access(copy.to, copy.bytes, true);
    for (size_t at = 0; at < copy.valid; ++at)
      emulator::access(static_cast<const unsigned char*>(copy.from) + at, 1, false);
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + std::ptrdiff_t(count));
  self.groups.erase(self.groups.begin(), self.groups.end() - groups_left);
  for (size_t& end : self.groups) end -= count;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
uint32_t bits_of(T value) {
  static_assert(sizeof(T) == 4, "");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return float_of(uint32_t(value.bits) << 16); }
inline float to_float(F16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31,
                 mantissa = value.bits & 0x3FF;
  if (exponent == 31) return float_of(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}
template <class T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    const uint32_t bits = bits_of(value);
    if (value != value) return {0x7FFF};
    return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  } else {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (value != value) return {0x7FFF};
    if (size >= 65520.0f) return {uint16_t(sign | 0x7C00)};
    if (size < 0x1p-14f) return {uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)))};
    const uint32_t bits = bits_of(size);
    return {uint16_t(sign | ((bits - 0x38000000u + 0xFFF + (bits >> 13 & 1)) >> 13))};
  }
}
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float tanh_exact(float x) { return std::tanh(x); }

struct MmaOperands {
  uint32_t a[4], b[2];
};
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const MmaOperands own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int lane = lane_index();
  const auto value = [](uint32_t pair, int k) { return to_float(T{uint16_t(k % 2 ? pair >> 16 : pair)}); };
  exchange(own, [&](const auto& of) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, upper = i / 2, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const MmaOperands left = of(row * 4 + k % 8 / 2), right = of(column * 4 + k % 8 / 2);
        d[i] += value(left.a[upper + k / 8 * 2], k) * value(right.b[k / 8], k);
      }
    }
    return 0;
  });
}
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const MmaOperands own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int lane = lane_index();
  const auto value = [](uint32_t bits) { return float_of(bits & ~0x1FFFu); };
  exchange(own, [&](const auto& of) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, upper = i / 2, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 8; ++k) {
        const MmaOperands left = of(row * 4 + k % 4), right = of(column * 4 + k % 4);
        d[i] += value(left.a[upper + k / 4 * 2]) * value(right.b[k / 4]);
      }
    }
    return 0;
  });
}

}  // namespace rnnkern::cuda
