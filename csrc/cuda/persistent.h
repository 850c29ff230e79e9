// The persistent engines, cluster and grid: what the planner decides and the kernels take; persistent.cuh has the idea.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda/launch.h"
#include "cuda/layer.h"

namespace rnnkern::cuda {

// The blocks that share a tile of rows exchange through their distributed shared memory (a cluster), or through L2.
enum class Engine { cluster, grid };
enum class Pass { forward, backward };
// How the product takes float storage; of 16-bit storage there is one way. tf32x3 adds three tf32 products of what x
// and its tf32 rounding leave: errors like those of fp32, which it is not.
enum class Product { tf32, tf32x3 };

constexpr int kPersistentThreads = 256;  // at most; leaves a thread 255 registers
constexpr int kItems = 2;                // units of rows that a thread's pointwise part owns, at most
constexpr int kTileBytes = 1024;         // of weights: 16 rows of 64 bytes
// A warp's weights in registers: forward has many gate rows, backward long sums. 16 tiles, 128 registers, in both.
constexpr int warp_m_tiles(Pass pass) { return pass == Pass::forward ? 2 : 1; }
constexpr int register_k_blocks(Pass pass) { return pass == Pass::forward ? 8 : 16; }

struct PersistentLayout {
  int units;                                   // that a block owns
  int blocks;                                  // of a group
  int groups;                                  // in the launch; group g takes tasks g, g + groups, ...
  int tiles;                                   // of rows; a task is a tile of one direction
  int n_tiles, rows;                           // of a tile of rows: rows = 8 n_tiles
  int m_tiles, m_warps;                        // 16 rows of weights each; warps along them
  int k_blocks, k_warps;                       // 64 bytes of the sum each; warps along them
  int warp_k_blocks;                           // of each of k_warps
  int sum_stride;                              // floats between columns of partial sums
  unsigned reciprocal_units;                   // ceil(2^20 / units)
  int buffer_bytes;                            // of one of the two exchange buffers: [k_blocks][rows][64 bytes]
  int at_sums, at_bias, at_stage, at_weights;  // in shared memory; the cluster's exchange buffers are at 0
};

struct PersistentPlan {
  std::string why_not;  // empty: can run
  LaunchShape shape;
  PersistentLayout layout;
  size_t workspace_bytes;  // aligned to 16, allocated by the caller; the launcher clears what must be
  double step_clocks;      // of all rounds of groups together; an estimate
  int registers;           // of a thread; 0: emulated
};

struct PersistentRequest {
  Engine engine;
  Pass pass;
  int gates;
  int value_bytes;  // of storage
  int products;     // 3 for tf32x3, else 1
  int H, B, D;
  int blocks = 0;   // of a group, if given: tests
  int n_tiles = 0;  // of a tile of rows, likewise
};

// `resident`: how many blocks of such a launch run at once.
PersistentPlan plan_persistent(const PersistentRequest& request, const DeviceFacts& facts,
                               const std::function<int(const LaunchShape&)>& resident);

template <class Layer>
struct Persistent {
  Layer layer;  // Forward<S, float> or Backward<S, float>
  PersistentLayout layout;
  unsigned char* buffers;  // grid: [groups][2][buffer_bytes]
  unsigned* flags;         // grid: [groups][blocks], zero at first: how often the block has sent
};

}  // namespace rnnkern::cuda
