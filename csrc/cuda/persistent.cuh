// The persistent engines: one launch runs all steps of a layer with the recurrent weights on the chip.
//
// A group of blocks owns a tile of rows of one direction; a block of it owns `units` hidden units: their gates, their
// states, and the weights that they need. Forward and backward are one scheme, in which a step is
//   1. product   own weights x values of all blocks       forward: gh = W_hh[own gate rows, :] h
//                                                         backward: dh = W_hh[:, own units]^T dgh
//   2. pointwise part of the own units, a thread per unit of a row, its state in registers
//   3. send      the own values to all blocks             forward: h; backward: dgh, rounded as the product takes it
// A block alone adds up each of its sums, in one order: deterministic, and no float atomics. The order follows from how
// the planner cuts the layer, by H, B and D: a row's result may differ in the last bits from that in another batch.
//
// Backward could as well keep forward's slice and scatter partial sums of dh. For a cluster that moves 4 H bytes per
// row and block where gathering dgh moves G H sizeof(S); on a grid both move about as much. Gathering was taken because
// it is the same kernel, sends 16-byte pieces where partial sums leave the mma in 8-byte ones, needs no fixed-order sum
// of `blocks` slots, and feeds the mma straight from L2.
//
// Napkin, clocks per step, the planner's estimates; LSTM, bf16, 8 rows:
//   H = 512, cluster of 16: 32 units, 128 gate rows. 256 mma of 8 on 4 tensor cores 512; operand 4 x 8 KB of shared
//   memory 256; partial sums 2 x 8 KB 132; 8 KB of DSMEM stores 256, barrier 400; pointwise 200. Together 1760, less
//   what of mma and loads overlaps. Backward sends four times as much: 2720.
//   H = 1024, grid of 128: 8 units, 32 gate rows. mma 256, operand 16 KB from L2 512, value and flag through L2 1300,
//   the rest 340: 2410. H = 2048: 256 KB of weights a block, half of them in shared memory: 5730.
// Registers: 128 of weights of a thread's 255, so one block of 256 threads per multiprocessor; 256 KB would be all.
//
// Rounds r = 0 .. L with L the longest row of the tile: round r > 0 begins with the product of what round r - 1 sent,
// and the last sends nothing. A pass (forward, backward) defines what a round computes. What it stores goes out between
// `arrive` and `wait`, so that no barrier waits for memory; so do the loads of the next round.
#pragma once

#include "cuda/persistent.h"
#include "cuda/persistent_exchange.cuh"
#include "cuda/persistent_product.cuh"
#include "cuda/sequence.cuh"

namespace rnnkern::cuda {

// Where a block stands.
struct Task {
  int direction, tile, rank;
};

// One unit of one row: a thread's, for all steps. Few registers: weights have taken most.
struct Item {
  int length;  // of the row; -1: padding, not in the batch or the layer
  int b, unit;
  int sum;  // where its first product is among the partial sums

  RNNKERN_DEVICE Row row(int direction) const { return Row(direction, b, length); }
};

template <class Layer>
RNNKERN_DEVICE Item make_item(const Layer& layer, const PersistentLayout& layout, const Task& task, int i) {
  const int index = thread_index() + i * block_threads();
  const int column = int(unsigned(index) * layout.reciprocal_units >> 20), local = index - column * layout.units;
  Item item{-1, task.tile * layout.rows + column, task.rank * layout.units + local, column * layout.sum_stride + local};
  if (index < layout.rows * layout.units && item.unit < layer.H && item.b < layer.sequence.B)
    item.length = int(Row(layer.sequence, task.direction, item.b).length);
  return item;
}

template <class Layer>
RNNKERN_DEVICE int longest_row(const Layer& layer, const PersistentLayout& layout, const Task& task) {
  const Sequence& sequence = layer.sequence;
  if (!sequence.lengths) return int(sequence.T);
  int longest = 0;
  for (int b = task.tile * layout.rows; b < (task.tile + 1) * layout.rows && b < sequence.B; ++b) {
    const int length = int(load(sequence.lengths + b));
    longest = length > longest ? length : longest;
  }
  return longest;
}

// Sends each item's values, values[i][j] of item i: warps put them side by side, then 16 bytes of units that follow one
// another go to each of the group. The order of the sum is [rank][j][unit].
template <int kSent, class S, class Exchange>
RNNKERN_DEVICE void send_values(const Exchange& exchange, const PersistentLayout& layout, unsigned round, int rank,
                                const S (&values)[kItems][kSent]) {
  constexpr int kGranule = 16 / sizeof(S), kPieces = 32 / kGranule;  // of a warp's item
  S* const stage = reinterpret_cast<S*>(shared_memory() + layout.at_stage) + warp_index() * kItems * kSent * 32;
  RNNKERN_UNROLLED
  for (int i = 0; i < kItems; ++i) {
    RNNKERN_UNROLLED
    for (int j = 0; j < kSent; ++j) store(stage + (i * kSent + j) * 32 + lane_index(), values[i][j]);
  }
  sync_warp();
  const int piece = lane_index() % kPieces, first_copy = lane_index() / kPieces;
  RNNKERN_UNROLLED
  for (int i = 0; i < kItems; ++i) {
    const int index = warp_index() * 32 + piece * kGranule + i * block_threads();
    if (index >= layout.rows * layout.units) continue;
    const int column = int(unsigned(index) * layout.reciprocal_units >> 20), local = index - column * layout.units;
    RNNKERN_UNROLLED
    for (int j = 0; j < kSent; ++j) {
      const int k = ((rank * kSent + j) * layout.units + local) / kGranule;
      const int place = (k / 4 * layout.rows + column) * 64 + k % 4 * 16;
      const Words words = load(reinterpret_cast<const Words*>(stage + (i * kSent + j) * 32 + piece * kGranule));
      for (int to = first_copy; to < exchange.copies(); to += kGranule) exchange.send(round, place, words, to);
    }
  }
}

template <class CellPass>
struct PersistentArguments : Persistent<typename CellPass::Layer> {
  static constexpr int kSent = CellPass::kSent, kValueBytes = sizeof(typename CellPass::S);
};

template <class CellPass, template <class> class Exchange>
RNNKERN_KERNEL(kPersistentThreads, 1)
persistent(RNNKERN_ARGUMENT PersistentArguments<CellPass> a) {
  using S = typename CellPass::S;
  const PersistentLayout& layout = a.layout;
  float* const sums = reinterpret_cast<float*>(shared_memory() + layout.at_sums);
  SliceProduct<typename CellPass::Math, CellPass::kPass> product(layout);
  const Exchange<PersistentArguments<CellPass>> exchange(a);
  Task task;
  task.rank = block_index() % layout.blocks;
  int loaded = -1;      // direction whose weights are here
  unsigned before = 0;  // rounds of earlier tasks that sent

  for (int which = block_index() / layout.blocks; which < layout.tiles * a.layer.sequence.D; which += layout.groups) {
    task.direction = which / layout.tiles;
    task.tile = which % layout.tiles;
    if (task.direction != loaded) {
      sync_block();  // the previous task may still read biases
      CellPass::load_weights(a.layer, layout, task, product);
      loaded = task.direction;
      sync_block();
    }
    const int longest = longest_row(a.layer, layout, task);
    CellPass pass(a.layer, layout, task, longest);
    for (int round = 0; round <= longest; ++round) {
      const unsigned sent = before + unsigned(round);
      if (round > 0) {
        exchange.wait(sent - 1, product.k_first, product.k_count);
        product.run([&](int k, int place) { return exchange.operand(sent - 1, k, place); }, sums);
        sync_block();
      }
      S values[kItems][CellPass::kSent];
      pass.compute(round, sums, values);
      if (round < longest) {
        send_values(exchange, layout, sent, task.rank, values);
        exchange.arrive(sent);
      }
      pass.put(round);
      if (round < longest) pass.fetch(round + 1);
    }
    before += unsigned(longest);
  }
}

}  // namespace rnnkern::cuda
