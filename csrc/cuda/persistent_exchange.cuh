// How the blocks of a group show each other their values: two buffers in turn, [k_blocks][rows][64 bytes] each.
//
// send     16 bytes to where every block of the group will look for them
// arrive   when a thread has sent; no thread of the block waits for other blocks here
// wait     until the values that this thread's warp multiplies have come; and until all of the block have arrived
// operand  16 bytes of k block k of a buffer, at `place` in it
//
// The buffer that is sent to was last read before the previous `arrive` of every block. This block's warps together
// have waited for all of these, and the barrier after the product joins them: without it a warp could send too early.
#pragma once

#include "cuda/device.h"
#include "cuda/persistent.h"
#include "cuda/persistent_product.cuh"

namespace rnnkern::cuda {

// A cluster's blocks write into each other's shared memory; its barrier orders that. A block alone needs no cluster.
template <class Arguments>
struct ClusterExchange {
  const PersistentLayout& layout;

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
  RNNKERN_DEVICE Words operand(unsigned round, int, int place) const {
    return load(reinterpret_cast<const Words*>(shared_memory() + (round & 1) * layout.buffer_bytes + place));
  }
};

// Blocks anywhere: values and flags go through L2. A warp waits for the blocks that feed its part of the sum alone, and
// loads its operand from there to registers.
template <class Arguments>
struct GridExchange {
  const Arguments& a;
  const PersistentLayout& layout;
  const int group;

  RNNKERN_DEVICE explicit GridExchange(const Arguments& a_)
      : a(a_), layout(a_.layout), group(block_index() / a_.layout.blocks) {}
  RNNKERN_DEVICE unsigned char* buffer(unsigned round) const {
    return a.buffers + (int64_t(group) * 2 + (round & 1)) * layout.buffer_bytes;
  }
  RNNKERN_DEVICE unsigned* flags() const { return a.flags + group * layout.blocks; }
  // Of 16 bytes, that a block sends; what they leave of the last k block is never written.
  RNNKERN_DEVICE int pieces() const { return Arguments::kSent * layout.units * Arguments::kValueBytes / 16; }
  RNNKERN_DEVICE int copies() const { return 1; }
  RNNKERN_DEVICE void send(unsigned round, int place, const Words& words, int) const {
    store(reinterpret_cast<Words*>(buffer(round) + place), words);
  }
  RNNKERN_DEVICE void arrive(unsigned round) const {
    sync_block();
    if (thread_index() == 0) store_release(flags() + block_index() % layout.blocks, round + 1);
  }
  RNNKERN_DEVICE void wait(unsigned round, int k_first, int k_count) const {
    if (k_count <= 0) return;
    const int end = (k_first + k_count) * 4, first = k_first * 4 / pieces();
    for (int of = first + lane_index(); of < layout.blocks && of * pieces() < end; of += 32)
      while (load_acquire(flags() + of) < round + 1) {
      }
    sync_warp();
  }
  RNNKERN_DEVICE Words operand(unsigned round, int k, int place) const {
    if (k * 4 + place % 64 / 16 >= pieces() * layout.blocks) return Words{};  // past what is sent
    return load_l2(reinterpret_cast<const Words*>(buffer(round) + place));
  }
};

}  // namespace rnnkern::cuda
