// Every CUDA intrinsic that kernels use, wrapped. nvcc compiles the wrappers below; with RNNKERN_EMULATED, g++ takes
// those of emulator/device.h, which have the same names and check what they are given.
//
// Rules for kernels: one argument, a struct passed by value; one-dimensional blocks of a multiple of 32 threads; memory
// that other threads see is touched through load, store and their kin alone.
#pragma once

#include <cstdint>

#ifdef RNNKERN_EMULATED
#include "emulator/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#define RNNKERN_DEVICE __device__ __forceinline__
#define RNNKERN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define RNNKERN_ARGUMENT __grid_constant__ const
#define RNNKERN_UNROLLED _Pragma("unroll")  // a loop whose counter indexes registers
#define RNNKERN_PRAGMA(text) _Pragma(#text)
#define RNNKERN_UNROLL(times) RNNKERN_PRAGMA(unroll times)

namespace rnnkern::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

// Where am I.
RNNKERN_DEVICE int thread_index() { return int(threadIdx.x); }
RNNKERN_DEVICE int block_threads() { return int(blockDim.x); }
RNNKERN_DEVICE int block_index() { return int(blockIdx.x); }
RNNKERN_DEVICE int block_count() { return int(gridDim.x); }
RNNKERN_DEVICE int lane_index() { return int(threadIdx.x) & 31; }
RNNKERN_DEVICE int warp_index() { return int(threadIdx.x) >> 5; }
// Clusters exist from sm_90 on; what needs them is compiled for sm_80 too, and never launched there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define RNNKERN_CLUSTER_ASM(...) __trap()
#else
#define RNNKERN_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#endif
RNNKERN_DEVICE int cluster_rank() {
  unsigned rank = 0;
  RNNKERN_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// Shared memory, as many bytes as the launch asked for.
RNNKERN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char rnnkern_shared[];
  return rnnkern_shared;
}
// The same place in the shared memory of another block of the cluster. Valid while that block lives.
template <class T>
RNNKERN_DEVICE T* cluster_shared(T* own, int rank) {
  T* mapped = own;
  RNNKERN_CLUSTER_ASM("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(own), "r"(rank));
  return mapped;
}

// Memory that other threads see. Vectors (Vec<T, N>, 4 to 16 bytes) must lie aligned to their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};
template <class T>
RNNKERN_DEVICE T load(const T* address) {
  return *address;
}
template <class T>
RNNKERN_DEVICE void store(T* address, T value) {
  *address = value;
}
// What no one reads again soon: weights' gradients, saved values.
template <class T>
RNNKERN_DEVICE void store_streaming(T* address, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "");
  if constexpr (sizeof(T) == 2)
    __stcs(reinterpret_cast<unsigned short*>(address), *reinterpret_cast<unsigned short*>(&value));
  else if constexpr (sizeof(T) == 4)
    __stcs(reinterpret_cast<unsigned*>(address), *reinterpret_cast<unsigned*>(&value));
  else if constexpr (sizeof(T) == 8)
    __stcs(reinterpret_cast<uint2*>(address), *reinterpret_cast<uint2*>(&value));
  else
    __stcs(reinterpret_cast<uint4*>(address), *reinterpret_cast<uint4*>(&value));
}
// Past the L1 cache, which does not know what other blocks write. Volatile: each call reads anew.
template <class T>
RNNKERN_DEVICE T load_l2(const T* address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "");
  T value;
  if constexpr (sizeof(T) == 2) {
    unsigned short& to = *reinterpret_cast<unsigned short*>(&value);
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(to) : "l"(address) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    unsigned& to = *reinterpret_cast<unsigned*>(&value);
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(to) : "l"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2& to = *reinterpret_cast<uint2*>(&value);
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(address) : "memory");
  } else {
    uint4& to = *reinterpret_cast<uint4*>(&value);
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(address)
                 : "memory");
  }
  return value;
}

// Flags and counters in global memory. A loop that waits for one must read it with load_acquire.
RNNKERN_DEVICE unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
RNNKERN_DEVICE void store_release(unsigned* address, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
RNNKERN_DEVICE unsigned add_release(unsigned* address, unsigned value) {
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}
RNNKERN_DEVICE float atomic_add(float* address, float value) { return atomicAdd(address, value); }
RNNKERN_DEVICE unsigned atomic_add(unsigned* address, unsigned value) { return atomicAdd(address, value); }
RNNKERN_DEVICE void fence_device() { __threadfence(); }

// Barriers.
RNNKERN_DEVICE void sync_warp() { __syncwarp(); }
RNNKERN_DEVICE void sync_block() { __syncthreads(); }
RNNKERN_DEVICE void sync_named(int barrier, int threads) {  // barrier 1 to 15, whole warps
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
RNNKERN_DEVICE void arrive_cluster() {
  __syncwarp();  // `aligned` asks for the whole warp together
  RNNKERN_CLUSTER_ASM("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
RNNKERN_DEVICE void wait_cluster() {
  __syncwarp();
  RNNKERN_CLUSTER_ASM("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}
RNNKERN_DEVICE void sync_cluster() {
  arrive_cluster();
  wait_cluster();
}

// Within a warp, all lanes together.
template <class T>
RNNKERN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class T>
RNNKERN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
RNNKERN_DEVICE bool any_lane(bool value) { return __any_sync(~0u, value); }
RNNKERN_DEVICE bool all_lanes(bool value) { return __all_sync(~0u, value); }
RNNKERN_DEVICE unsigned ballot(bool value) { return __ballot_sync(~0u, value); }

// Asynchronous copies of 4, 8 or 16 aligned bytes from global to shared memory, of which `valid` are read and the rest
// set to zero. They may be read after wait_copies and a barrier.
template <int bytes>
RNNKERN_DEVICE void copy_async(void* shared, const void* global, int valid = bytes) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(bytes), "r"(valid)
                 : "memory");
}
RNNKERN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>  // committed later may still be on their way
RNNKERN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// Numbers.
RNNKERN_DEVICE float to_float(float value) { return value; }
RNNKERN_DEVICE float to_float(Bf16 value) { return __bfloat162float(value); }
RNNKERN_DEVICE float to_float(F16 value) { return __half2float(value); }
template <class T>
RNNKERN_DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return T(value);  // to nearest, ties to even
}
template <class T>
RNNKERN_DEVICE uint32_t bits_of(T value) {
  static_assert(sizeof(T) == 4, "");
  return *reinterpret_cast<const uint32_t*>(&value);
}
RNNKERN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
RNNKERN_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// At most so far off by the PTX ISA; exact where x or the result is 0 or infinite, exp2 at 0 too.
RNNKERN_DEVICE float exp2_approx(float x) {  // 2 ulp
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RNNKERN_DEVICE float reciprocal_approx(float x) {  // 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d[16, 8] += a[16, 16] b[16, 8], spread over a warp: with group = lane / 4 and pair = lane % 4, a lane holds
//   a: rows group, group + 8 (a[0], a[1]) of columns 2 pair, 2 pair + 1; a[2], a[3] the same of columns + 8
//   b: rows 2 pair, 2 pair + 1 (b[0]) and + 8 (b[1]) of column group
//   d: row group, columns 2 pair, 2 pair + 1 (d[0], d[1]); row group + 8 (d[2], d[3])
template <class T>
RNNKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The nearest tf32, as a float whose last 13 bits are zero.
RNNKERN_DEVICE uint32_t round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
// d[16, 8] += a[16, 8] b[8, 8] of floats, whose last 13 bits are ignored. A lane holds
//   a: rows group, group + 8 (a[0], a[1]) of column pair; a[2], a[3] the same of column pair + 4
//   b: rows pair (b[0]), pair + 4 (b[1]) of column group;  d: as above
RNNKERN_DEVICE void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements in shared memory: lane l names row l % 8 of matrix l / 8, 16 aligned bytes. Of
// matrix i, to[i] holds elements 2 pair and 2 pair + 1 of row group; transposed, of column group.
template <bool kTransposed>
RNNKERN_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

}  // namespace rnnkern::cuda
#endif
