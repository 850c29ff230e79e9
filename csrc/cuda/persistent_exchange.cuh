// How the blocks of a group show each other their values: two buffers in turn, [k_blocks][rows][64 bytes] each.
//
// send     16 bytes to where every block of the group will look for them
// arrive   when a thread has sent; no thread of the block waits for other blocks here
// wait     until the values that this thread's warp multiplies have come; and until all of the block have arrived
// operand  16 bytes of a buffer
//
// The buffer that is sent to was last read before the previous `arrive` of every block, which this one has waited for.
#pragma once

#include "cuda/device.h"
#include "cuda/persistent.h"
#include "cuda/persistent_product.cuh"

namespace rnnkern::cuda {

// A cluster's blocks write into each other's shared memory; its barrier orders that. A block alone needs no cluster.
struct ClusterExchange {
  const PersistentLayout& layout;

  template <class Arguments>
  RNNKERN_DEVICE explicit ClusterExchange(const Arguments& a) : layout(a.layout) {
    // Values past the last unit are never sent, yet multiplied, by zero.
    for (int at = thread_index() * 16; at < 2 * layout.buffer_bytes; at += block_threads() * 16)
      store(reinterpret_cast<Words*>(shared_memory() + at), Words{});
    if (layout.blocks > 1)
      sync_cluster();
    else
      sync_block();
  }
  RNNKERN_DEVICE int copies() const { return layout.blocks; }
  RNNKERN_DEVICE void send(unsigned round, int place, const Words& words, int to) const {
    Words* const own = reinterpret_cast<Words*>(shared_memory() + (round & 1) * layout.buffer_bytes + place);
    store(layout.blocks > 1 ? cluster_shared(own, to) : own, words);
  }
  RNNKERN_DEVICE void arrive(unsigned) const {
    if (layout.blocks > 1) arrive_cluster();
  }
  RNNKERN_DEVICE void wait(unsigned, int, int) const {
    if (layout.blocks > 1)
      wait_cluster();
    else
      sync_block();
  }
  RNNKERN_DEVICE Words operand(unsigned round, int place) const {
    return load(reinterpret_cast<const Words*>(shared_memory() + (round & 1) * layout.buffer_bytes + place));
  }
};

// Blocks anywhere: values and flags go through L2. A warp waits for the blocks that feed its part of the sum alone, and
// loads its operand from there to registers.
struct GridExchange {
  const PersistentLayout& layout;
  unsigned char* buffers;  // [2][buffer_bytes] of the group
  unsigned* flags;         // [blocks] of the group
  int pieces;              // of 16 bytes that blocks send; the rest of the last k block stays unwritten
  int pieces_of_block;

  template <class Arguments>
  RNNKERN_DEVICE explicit GridExchange(const Arguments& a) : layout(a.layout) {
    const int group = block_index() / layout.blocks;
    buffers = a.buffers + int64_t(group) * 2 * layout.buffer_bytes;
    flags = a.flags + int64_t(group) * layout.blocks;
    pieces_of_block = Arguments::kSent * layout.units * Arguments::kValueBytes / 16;
    pieces = pieces_of_block * layout.blocks;
  }
  RNNKERN_DEVICE int copies() const { return 1; }
  RNNKERN_DEVICE void send(unsigned round, int place, const Words& words, int) const {
    store(reinterpret_cast<Words*>(buffers + int64_t(round & 1) * layout.buffer_bytes + place), words);
  }
  RNNKERN_DEVICE void arrive(unsigned round) const {
    sync_block();
    if (thread_index() == 0) store_release(flags + block_index() % layout.blocks, round + 1);
  }
  RNNKERN_DEVICE void wait(unsigned round, int k_first, int k_count) const {
    if (k_count <= 0) return;
    const int last = (k_first + k_count) * 4 < pieces ? (k_first + k_count) * 4 - 1 : pieces - 1;
    for (int of = k_first * 4 / pieces_of_block + lane_index(); of <= last / pieces_of_block; of += 32)
      while (load_acquire(flags + of) < round + 1) {
      }
    sync_warp();
  }
  RNNKERN_DEVICE Words operand(unsigned round, int place) const {
    const int piece = place / (layout.rows * 64) * 4 + place % 64 / 16;
    if (piece >= pieces) return Words{};
    return load_l2(reinterpret_cast<const Words*>(buffers + int64_t(round & 1) * layout.buffer_bytes + place));
  }
};

}  // namespace rnnkern::cuda
