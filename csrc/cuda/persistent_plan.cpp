// Chooses how a persistent engine cuts a layer: units per block, rows per tile, warps. Pure but for `resident`.
//
// Every cut that fits is given an estimated time per step, in clocks; the least wins. The constants are estimates of an
// H100 from published latencies, not measurements:
//   mma m16n8k16 8 clocks of one of 4 tensor cores; shared memory 128 bytes per clock; L2 32 bytes per clock and SM;
//   exchange and barrier of a cluster 400 clocks, DSMEM 32 bytes per clock; flags and data through L2 1300; the
//   pointwise part 200.
//
// The largest H that it finds room for on an H100, forward / backward:
//                    LSTM          GRU           RNN
//   cluster, 16 bit  768 / 512     768 / 768     1024 / 1024
//   cluster, float   512 / 448     576 / 512     1024 / 1024
//   grid, 16 bit     2112 / 2112   2112 / 2112   over 4096
//   grid, float      1344 / 1344   1344 / 1824   2688 / 2752
#include <algorithm>

#include "cuda/persistent.h"

namespace rnnkern::cuda {
namespace {

int divide_up(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return divide_up(a, b) * b; }

// The cut of a group of `blocks` blocks of `units` units, and tiles of 8 n_tiles rows; all but `groups`.
PersistentPlan cut(const PersistentRequest& r, const DeviceFacts& facts, int blocks, int units, int n_tiles) {
  const bool forward = r.pass == Pass::forward;
  const int sent = forward ? 1 : r.gates, row_gates = forward ? r.gates : 1;
  PersistentPlan plan{};
  PersistentLayout& l = plan.layout;
  l.units = units;
  l.blocks = blocks;
  l.n_tiles = n_tiles;
  l.rows = 8 * n_tiles;
  l.tiles = divide_up(r.B, l.rows);
  l.m_tiles = divide_up(row_gates * units, 16);
  l.m_warps = divide_up(l.m_tiles, warp_m_tiles(r.pass));
  l.k_blocks = divide_up(blocks * sent * units * r.value_bytes, 64);
  constexpr int kWarps = kPersistentThreads / 32;
  if (l.m_warps > kWarps || l.rows * units > kItems * kPersistentThreads) {
    plan.why_not = "more units than threads";
    return plan;
  }
  // A warp's mma follow one another: rather more warps than long chains.
  l.k_warps = std::min(divide_up(l.k_blocks, 4), kWarps / l.m_warps);
  l.warp_k_blocks = divide_up(l.k_blocks, l.k_warps);
  l.k_warps = divide_up(l.k_blocks, l.warp_k_blocks);
  const int warps = std::max(l.m_warps * l.k_warps, divide_up(l.rows * units, kItems * 32));
  l.sum_stride = l.m_tiles * 16 + 4;  // so that lanes of an mma store without bank conflicts
  l.reciprocal_units = unsigned(divide_up(1 << 20, units));
  l.buffer_bytes = l.k_blocks * 64 * l.rows;

  const int overflow = std::max(0, l.warp_k_blocks - register_k_blocks(r.pass));
  const int64_t weight_bytes = int64_t(l.m_warps) * l.k_warps * overflow * warp_m_tiles(r.pass) * kTileBytes;
  const int sum_bytes = 4 * l.k_warps * l.rows * l.sum_stride;
  const int64_t buffers = r.engine == Engine::cluster ? 2 * int64_t(l.buffer_bytes) : 0;
  const int bias_bytes = forward ? round_up(2 * 4 * r.gates * units, 16) : 0;
  const int stage_bytes = warps * kItems * sent * 32 * r.value_bytes;
  const int64_t shared = buffers + sum_bytes + bias_bytes + stage_bytes + weight_bytes;
  if (shared > int64_t(facts.shared_bytes)) {
    plan.why_not = "needs " + std::to_string(shared) + " bytes of shared memory per block, the device has " +
                   std::to_string(facts.shared_bytes);
    return plan;
  }
  l.at_sums = int(buffers);
  l.at_bias = l.at_sums + sum_bytes;
  l.at_stage = l.at_bias + bias_bytes;
  l.at_weights = l.at_stage + stage_bytes;
  const bool cooperative = r.engine == Engine::grid;
  plan.shape = {0, warps * 32, size_t(shared), cooperative ? 1 : blocks, cooperative};

  const double sent_bytes = double(sent) * units * r.value_bytes * l.rows;
  const double mma = 2.0 * l.m_tiles * l.k_blocks * n_tiles * r.products * 8 / 4;
  const double operand = double(l.m_warps) * l.buffer_bytes / (cooperative ? 32 : 128);
  const double sums = 2.0 * sum_bytes / 128, weights = double(weight_bytes) * n_tiles / 128;
  const double exchange = cooperative ? 1300 : blocks == 1 ? 60 : 400 + sent_bytes * blocks / 32;
  plan.step_clocks = mma + operand + sums + weights + exchange + 200;
  return plan;
}

// Sets the launch up for as many groups as may run at once; false where not even one can.
bool place(PersistentPlan& plan, const PersistentRequest& r, const std::function<int(const LaunchShape&)>& resident) {
  PersistentLayout& l = plan.layout;
  const int tasks = l.tiles * r.D;
  plan.shape.blocks = l.blocks;  // of one group, for `resident`
  const int at_once = resident(plan.shape) / l.blocks;
  if (at_once == 0) return false;
  // Clusters wait for a place by themselves; blocks of a cooperative launch must all have one.
  const int rounds = divide_up(tasks, at_once);
  l.groups = r.engine == Engine::cluster ? tasks : std::min(tasks, at_once);
  plan.shape.blocks = l.groups * l.blocks;
  plan.step_clocks *= std::max(rounds, 1);
  if (r.engine == Engine::grid)
    plan.workspace_bytes = size_t(l.groups) * (2 * size_t(l.buffer_bytes) + 4 * size_t(l.blocks));
  return true;
}

}  // namespace

PersistentPlan plan_persistent(const PersistentRequest& r, const DeviceFacts& facts,
                               const std::function<int(const LaunchShape&)>& resident) {
  const int granule = 16 / r.value_bytes;  // units are sent in pieces of 16 bytes
  const bool cluster = r.engine == Engine::cluster;
  PersistentPlan best{};
  best.why_not = "no unit, row or direction";
  bool found = false;
  if (r.H <= 0 || r.B <= 0 || r.D <= 0) return best;
  const auto consider = [&](int blocks, int units) {
    for (int n_tiles = 1; n_tiles <= 4; n_tiles *= 2) {
      if (r.n_tiles ? n_tiles != r.n_tiles : n_tiles > 1 && r.B <= 4 * n_tiles) continue;
      PersistentPlan plan = cut(r, facts, blocks, units, n_tiles);
      if (plan.why_not.empty() && !place(plan, r, resident))
        plan.why_not = "not one group of " + std::to_string(blocks) + " blocks fits on the device at once";
      if (!plan.why_not.empty()) {
        if (!found && (n_tiles == 1 || r.n_tiles)) best.why_not = plan.why_not;  // the least that it takes
      } else if (!found || plan.step_clocks < best.step_clocks) {
        best = plan;
        found = true;
      }
    }
  };
  if (cluster) {
    for (int blocks = 1; blocks <= facts.largest_cluster; blocks *= 2) {
      if (r.blocks && blocks != r.blocks) continue;
      // A block without units would be one too many.
      const int units = round_up(divide_up(r.H, blocks), granule);
      if (blocks == 1 || r.blocks || (blocks - 1) * units < r.H) consider(blocks, units);
    }
  } else {
    for (int units = granule; units <= kPersistentThreads * kItems / 8;
         units += units < 8 * granule ? granule : units) {
      const int blocks = divide_up(r.H, units);
      if (r.blocks ? blocks == r.blocks : blocks <= facts.multiprocessors) consider(blocks, units);
      if (units >= r.H) break;
    }
  }
  if (!found)
    best.why_not = "the " + std::string(cluster ? "cluster" : "grid") + " engine has no room for " +
                   std::to_string(r.gates) + " gates of H = " + std::to_string(r.H) + " in " +
                   std::to_string(r.value_bytes) + "-byte values: " + best.why_not;
  return best;
}

}  // namespace rnnkern::cuda
