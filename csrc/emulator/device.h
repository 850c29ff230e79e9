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
#define RNNKERN_UNROLLED
#define RNNKERN_UNROLL(times)

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
  emulator::check_access(address, sizeof(T), sizeof(T), true, emulator::Space::global);
  store(address, value);
}
template <class T>
T load_l2(const T* address) {
  emulator::check_access(address, sizeof(T), sizeof(T), false, emulator::Space::global);
  return load(address);
}

inline unsigned load_acquire(const unsigned* address) {
  emulator::check_access(address, sizeof(unsigned), sizeof(unsigned), false, emulator::Space::global);
  emulator::poll("load_acquire");
  return *address;
}
inline void store_release(unsigned* address, unsigned value) {
  emulator::check_access(address, sizeof(unsigned), sizeof(unsigned), true, emulator::Space::global);
  store(address, value);
}
template <class T>
T atomic_add(T* address, T value) {
  emulator::access(address, sizeof(T), value != T(0));  // may suspend before, never between
  const T before = *address;
  *address = before + value;
  return before;
}
inline unsigned add_release(unsigned* address, unsigned value) {
  emulator::check_access(address, sizeof(unsigned), sizeof(unsigned), true, emulator::Space::global);
  return atomic_add(address, value);
}
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
  emulator::arrive(barrier, "arrive_cluster");
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

// What every lane shows, once all do. The last to come runs `combine` on it, before anybody goes on. Slots alternate:
// who shows something in the same slot again has met all lanes in between, after they had read it.
template <class T, class Combine>
const T* exchange(const char* place, const T& value, const Combine& combine) {
  static_assert(sizeof(T) <= sizeof(emulator::Warp::shown[0][0]) && std::is_trivially_copyable_v<T>, "");
  emulator::Warp& warp = own_warp();
  const int64_t generation = warp.barrier.generation;
  T* shown = reinterpret_cast<T*>(&warp.shown[generation % 2]);
  shown[lane_index()] = value;
  if (warp.barrier.arrived + 1 == warp.barrier.expected) combine(shown);
  emulator::arrive(warp.barrier, place);
  emulator::wait_above(warp.barrier, generation, place);
  return shown;
}
template <class T>
const T* exchange(const char* place, const T& value) {
  return exchange(place, value, [](T*) {});
}
template <class T>
T shuffle(T value, int lane) {
  return exchange("shuffle", value)[lane & 31];
}
template <class T>
T shuffle_xor(T value, int mask) {
  return exchange("shuffle_xor", value)[(lane_index() ^ mask) & 31];
}
inline unsigned ballot(bool value) {
  return *exchange("a vote", unsigned(value), [](unsigned* votes) {
    for (int lane = 1; lane < 32; ++lane) votes[0] |= votes[lane] << lane;
  });
}
inline bool any_lane(bool value) { return ballot(value) != 0; }
inline bool all_lanes(bool value) { return ballot(value) == ~0u; }

// The data comes at once or at wait_copies: the earliest and the latest moment that the GPU allows.
inline void carry_out(const emulator::Copy& copy) {
  emulator::access(copy.to, copy.bytes, true);
  emulator::check_access(copy.from, copy.valid, 1, false, emulator::Space::global);
  std::memset(copy.to, 0, copy.bytes);
  std::memcpy(copy.to, copy.from, copy.valid);
}
template <int bytes>
void copy_async(void* shared, const void* global, int valid = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "");
  if (valid < 0 || valid > bytes) emulator::fail("copy_async: valid bytes out of range");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) emulator::fail("copy_async from a misaligned address");
  emulator::check_access(shared, bytes, bytes, true, emulator::Space::own_shared);
  const emulator::Copy copy{shared, global, bytes, size_t(valid)};
  if (emulator::coin())
    carry_out(copy);
  else
    emulator::current->copies.push_back(copy);
}
inline void commit_copies() { emulator::current->groups.push_back(emulator::current->copies.size()); }
template <int groups_left>
void wait_copies() {
  emulator::Thread& self = *emulator::current;
  if (self.groups.size() <= size_t(groups_left)) return;
  const size_t count = self.groups[self.groups.size() - size_t(groups_left) - 1];
  for (size_t i = 0; i < count; ++i) carry_out(self.copies[i]);
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
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
// Off by up to `most` units in the last place, as the GPU's approximations may be by the PTX ISA: by how much of that,
// up or down, the argument's bits decide.
inline float inexact(double exact, float argument, int most) {
  const double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
  const double part = double(bits_of(argument) * 0x9E3779B1u) * 0x1p-31 - 1;  // in [-1, 1)
  float value = float(exact + part * most * unit);
  while (std::fabs(double(value) - exact) > most * unit) value = std::nextafter(value, float(exact));
  return value;
}
inline float exp2_approx(float x) {
  x = flush(x);
  const double exact = std::exp2(double(x));
  if (x == 0.0f || std::isnan(x) || exact >= 0x1p128 || exact < 0x1p-126) return flush(float(exact));
  return flush(inexact(exact, x, 2));
}
inline float reciprocal_approx(float x) {
  x = flush(x);
  const double exact = 1.0 / double(x);
  if (std::isnan(x) || !(std::fabs(exact) < 0x1p128) || std::fabs(exact) < 0x1p-126) return flush(float(exact));
  return flush(inexact(exact, x, 1));
}

// A lane's operands as floats, and its part of d. The last lane to come multiplies for all.
template <int kHalf>  // values that a lane holds of a row of a
struct MmaPart {
  float a[2][kHalf], b[kHalf], d[4];  // a of rows group and group + 8
};
// A lane's values are in order of k: k_of(lane % 4, i) is that of value i.
template <int kHalf, class K>
void multiply_matrices(const char* place, float (&d)[4], const MmaPart<kHalf>& own, const K& k_of) {
  const MmaPart<kHalf>* shown = exchange(place, own, [&](MmaPart<kHalf>* part) {
    float b[4 * kHalf][8], a[16][4 * kHalf];  // [k, column], [row, k]
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < kHalf; ++i) {
        const int k = k_of(lane % 4, i), group = lane / 4;
        b[k][group] = part[lane].b[i];
        a[group][k] = part[lane].a[0][i];
        a[group + 8][k] = part[lane].a[1][i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      float sum[8];
      for (int column = 0; column < 8; ++column)
        sum[column] = part[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
      for (int k = 0; k < 4 * kHalf; ++k) {
        for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
      }
      for (int column = 0; column < 8; ++column)
        part[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2] = sum[column];
    }
  });
  std::memcpy(d, shown[lane_index()].d, sizeof d);
}
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaPart<4> own;
  for (int i = 0; i < 4; ++i) {
    const auto value = [&](uint32_t pair) { return to_float(T{uint16_t(i % 2 ? pair >> 16 : pair)}); };
    own.a[0][i] = value(a[i / 2 * 2]);
    own.a[1][i] = value(a[i / 2 * 2 + 1]);
    own.b[i] = value(b[i / 2]);
  }
  std::memcpy(own.d, d, sizeof d);
  multiply_matrices("mma_16x8x16", d, own, [](int pair, int i) { return 2 * pair + i % 2 + i / 2 * 8; });
}
inline uint32_t round_tf32(float value) {
  const uint32_t bits = bits_of(value);
  return value != value ? 0x7FFFFFFFu : (bits + 0x1000u) & ~0x1FFFu;  // ties away from zero
}
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaPart<2> own;
  for (int i = 0; i < 2; ++i) {
    const auto value = [](uint32_t bits) { return float_of(bits & ~0x1FFFu); };
    own.a[0][i] = value(a[i * 2]);
    own.a[1][i] = value(a[i * 2 + 1]);
    own.b[i] = value(b[i]);
  }
  std::memcpy(own.d, d, sizeof d);
  multiply_matrices("mma_16x8x8_tf32", d, own, [](int pair, int i) { return pair + 4 * i; });
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  using Row = Vec<uint16_t, 8>;
  emulator::check_access(row, sizeof(Row), sizeof(Row), false, emulator::Space::own_shared);
  const Row* rows = exchange("load_matrices", load(static_cast<const Row*>(row)));
  const int group = lane_index() / 4, pair = lane_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int c) { return uint32_t(rows[i * 8 + r].at[c]); };
    to[i] = kTransposed ? element(2 * pair, group) | element(2 * pair + 1, group) << 16
                        : element(group, 2 * pair) | element(group, 2 * pair + 1) << 16;
  }
}

}  // namespace rnnkern::cuda
