// Planted faults of every kind that the emulator is there to find. Those that depend on the schedule must show under
// several seeds, and the same kernels without the fault under none.
#include "check_emulator.h"

using namespace rnnkern::cuda;
using namespace rnnkern_test;

namespace {

int* shared_ints() { return reinterpret_cast<int*>(shared_memory()); }

// Under how many seeds a run goes wrong.
template <class Run>
int seeds_that_show(const Run& run) {
  int shown = 0;
  on_seeds([&](unsigned) { shown += run(); });
  return shown;
}

#define CHECK_SHOWS(run, fault)                                             \
  do {                                                                      \
    const int with = seeds_that_show([&] { return run(true); }),            \
              without = seeds_that_show([&] { return run(false); });        \
    CHECK(with >= 3, "%s shows under %d of %u seeds", fault, with, kSeeds); \
    CHECK(without == 0, "shows under %d seeds without %s", without, fault); \
  } while (0)

// The launch must end with an error that holds each of the texts.
template <class Kernel>
void check_fails(const char* name, const emulator::Grid& grid, std::initializer_list<const char*> texts,
                 const Kernel& kernel) {
  on_seeds([&](unsigned seed) {
    const std::string error = error_of(grid, kernel);
    for (const char* text : texts)
      CHECK(error.find(text) != std::string::npos, "%s, seed %u: no \"%s\" in \"%s\"", name, seed, text, error.c_str());
  });
}

template <class T>
int differing(const std::vector<T>& values, T expected) {
  int count = 0;
  for (const T& value : values) count += value != expected;
  return count;
}

// In each round all write its number and read each other's: how often one was of another round.
template <class Sync>
int strangers(int* slots, int member, int members, const Sync& sync) {
  int count = 0;
  for (int round = 0; round < 4; ++round) {
    store(slots + member, round);
    sync();
    for (int i = 0; i < members; ++i) count += load(slots + (member + i) % members) != round;
    sync();
  }
  return count;
}

bool missing_sync_block(bool missing) {
  Global<int> out(128);
  emulator::launch({1, 128, 512}, [&] {
    int calls = 0;
    const int count = strangers(shared_ints(), thread_index(), 128, [&] {
      if (!missing || ++calls != 4) sync_block();
    });
    store(out.data() + thread_index(), count);
  });
  return differing(out.values, 0) > 0;
}

bool missing_sync_warp(bool missing) {
  Global<int> out(64);
  emulator::launch({1, 64, 256}, [&] {
    int calls = 0;
    const int count = strangers(shared_ints() + warp_index() * 32, lane_index(), 32, [&] {
      if (!missing || ++calls != 3) sync_warp();
    });
    store(out.data() + thread_index(), count);
  });
  return differing(out.values, 0) > 0;
}

bool missing_sync_cluster(bool missing) {
  Global<int> out(4 * 32);
  emulator::launch({4, 32, 128, 4}, [&] {
    sync_cluster();
    int count = 0;
    for (int round = 0; round < 4; ++round) {
      store(shared_ints() + lane_index(), round);
      sync_cluster();
      for (int rank = 0; rank < 4; ++rank) count += load(cluster_shared(shared_ints() + lane_index(), rank)) != round;
      if (!missing || round != 1) sync_cluster();
    }
    store(out.data() + block_index() * 32 + lane_index(), count);
  });
  return differing(out.values, 0) > 0;
}

// Arrived, but reads before it has waited.
bool early_after_arrive(bool missing) {
  Global<int> out(4 * 32);
  emulator::launch({4, 32, 128, 4}, [&] {
    sync_cluster();
    store(shared_ints() + lane_index(), 1);
    arrive_cluster();
    if (!missing) wait_cluster();
    int sum = 0;
    for (int rank = 0; rank < 4; ++rank) sum += load(cluster_shared(shared_ints() + lane_index(), rank));
    if (missing) wait_cluster();
    sync_cluster();
    store(out.data() + block_index() * 32 + lane_index(), sum);
  });
  return differing(out.values, 4) > 0;
}

bool race(bool missing) {
  Global<int> count(1, 0);
  emulator::launch({4, 64}, [&] {
    if (missing)
      store(count.data(), load(count.data()) + 1);
    else
      atomic_add(count.data(), 1);
  });
  return count[0] != 256;
}

// The counter is raised before the data is there.
bool early_flag(bool missing) {
  Global<unsigned> flag(1, 0);
  Global<int> data(256, 0), out(1);
  emulator::launch({2, 256, 0, 1, true}, [&] {
    if (block_index() == 0) {
      store(data.data() + thread_index(), 1);
      if (!missing) sync_block();
      if (thread_index() == 0) add_release(flag.data(), 1);
    } else if (thread_index() == 0) {
      while (load_acquire(flag.data()) == 0) {
      }
      int sum = 0;
      for (int i = 0; i < 256; ++i) sum += load(data.data() + i);
      store(out.data(), sum);
    }
  });
  return out[0] != 256;
}

bool missing_wait_copies(bool missing) {
  Global<float> in(4 * 32, 1.0f), out(32);
  emulator::launch({1, 32, 512}, [&] {
    float* own = reinterpret_cast<float*>(shared_memory()) + 4 * lane_index();
    copy_async<16>(own, in.data() + 4 * lane_index());
    commit_copies();
    if (!missing) wait_copies<0>();
    store(out.data() + lane_index(), load(own + 3));
  });
  return differing(out.values, 1.0f) > 0;
}

// A copy into a buffer that others still read.
bool early_copy(bool missing) {
  Global<float> in(4 * 64, 2.0f), out(64);
  emulator::launch({1, 64, 1024}, [&] {
    float* buffer = reinterpret_cast<float*>(shared_memory());
    for (int i = 0; i < 4; ++i) store(buffer + 4 * thread_index() + i, 1.0f);
    sync_block();
    float sum = 0;
    for (int i = 0; i < 256; ++i) sum += load(buffer + i);
    if (!missing) sync_block();
    copy_async<16>(buffer + 4 * thread_index(), in.data() + 4 * thread_index());
    commit_copies();
    wait_copies<0>();
    store(out.data() + thread_index(), sum);
  });
  return differing(out.values, 256.0f) > 0;
}

void test_schedules_show_races() {
  CHECK_SHOWS(missing_sync_block, "a missing sync_block");
  CHECK_SHOWS(missing_sync_warp, "a missing sync_warp");
  CHECK_SHOWS(missing_sync_cluster, "a missing sync_cluster");
  CHECK_SHOWS(early_after_arrive, "a read between arrive_cluster and wait_cluster");
  CHECK_SHOWS(race, "an increment that is not atomic");
  CHECK_SHOWS(early_flag, "a flag before the data");
  CHECK_SHOWS(missing_wait_copies, "a missing wait_copies");
  CHECK_SHOWS(early_copy, "a copy into a buffer in use");
}

void test_bounds() {
  Global<float> data(64, 0.0f);
  const char* const outside = "out of bounds";
  check_fails("global write", {1, 64}, {outside, "write of 4 bytes", "256 bytes from the start of 256", "thread 63"},
              [&] { store(data.data() + thread_index() + 1, 1.0f); });
  check_fails("global read", {1, 32}, {outside, "read of 8 bytes", "-8 bytes from the start", "global memory"},
              [&] { load(reinterpret_cast<const double*>(data.data()) - 1); });
  check_fails("global atomic", {1, 32}, {outside}, [&] { atomic_add(data.data() + 64, 1.0f); });
  check_fails("shared write", {1, 32, 100},
              {outside, "write", "100 bytes from the start of 100 bytes of shared memory"},
              [&] { store(shared_memory() + 100, static_cast<unsigned char>(1)); });
  check_fails("shared read", {1, 32, 100}, {outside, "read of 8 bytes", "96 bytes"},
              [&] { load(reinterpret_cast<const double*>(shared_memory() + 96)); });
  check_fails("remote write", {2, 32, 64, 2},
              {outside, "64 bytes from the start of 64 bytes of shared memory of block"}, [&] {
                sync_cluster();
                int* beyond = cluster_shared(shared_ints(), 1 - cluster_rank()) + 16;
                store(beyond, 1);
                sync_cluster();
              });
  check_fails("other cluster", {2, 32, 64}, {"no block has rank 1"}, [&] { cluster_shared(shared_ints(), 1); });
  check_fails("not shared", {1, 32, 64}, {"the thread's own shared memory"}, [&] { cluster_shared(data.data(), 0); });
  {
    emulator::GlobalMemory again;  // of memory that is known already, and stays so
    again.add(data.data() + 8, 16);
  }
  CHECK(error_of({1, 32}, [&] { load(data.data() + 9); }).empty());
  float outside_memory = 0;
  check_fails("unknown memory", {1, 32}, {outside}, [&] { load(&outside_memory); });

  check_fails("misaligned", {1, 32}, {"misaligned: read of 16 bytes"}, [&] {
    load(reinterpret_cast<const Vec<float, 4>*>(data.data() +
                                                (reinterpret_cast<uintptr_t>(data.data()) % 16 != 0 ? 0 : 1)));
  });
  check_fails("misaligned copy", {1, 32, 64}, {"misaligned"}, [&] { copy_async<8>(shared_memory() + 4, data.data()); });
  check_fails("copy beyond", {1, 32, 64}, {outside, "read of 8 bytes"}, [&] {
    copy_async<8>(shared_memory(), data.data() + 64);
    commit_copies();
    wait_copies<0>();
  });
  check_fails("copy to another block", {2, 32, 64, 2}, {"not in the block's own shared memory"}, [&] {
    sync_cluster();
    copy_async<4>(cluster_shared(shared_memory(), 1 - cluster_rank()), data.data());
    sync_cluster();
  });
  check_fails("flag in shared memory", {1, 32, 64}, {"not in global memory"},
              [&] { load_acquire(reinterpret_cast<const unsigned*>(shared_memory())); });
  check_fails("load_l2 of shared memory", {1, 32, 64}, {"not in global memory"}, [&] { load_l2(shared_ints()); });
}

void test_lives_of_blocks() {
  const auto read_neighbour = [](bool before, bool after) {
    if (before) sync_cluster();
    if (cluster_rank() == 1) load(cluster_shared(shared_ints() + lane_index(), 0));
    if (after) sync_cluster();
  };
  const emulator::Grid grid{2, 32, 128, 2};
  const auto shows = [&](bool before, bool after, const char* text) {
    return seeds_that_show(
        [&] { return error_of(grid, [&] { read_neighbour(before, after); }).find(text) != std::string::npos; });
  };
  CHECK(shows(true, false, "which has returned") >= 2, "a read of a block that has returned");
  CHECK(shows(false, true, "which has not begun") >= 2, "a read of a block that has not begun");
  CHECK(shows(true, true, "") == int(kSeeds) && shows(true, true, "which") == 0, "a read of a block that lives");
}

void test_deadlocks() {
  check_fails("half a block", {1, 128},
              {"deadlock", "block 0: 64 threads have returned (warps 2 3)", "64 threads in sync_block (warps 0 1)"},
              [] {
                if (thread_index() < 64) sync_block();
              });
  check_fails("named", {2, 64}, {"deadlock", "32 threads in sync_named(1) (warps 0)", "32 threads in sync_named(2)"},
              [] { sync_named(warp_index() + 1, 64); });
  check_fails("cluster", {4, 64, 0, 4},
              {"deadlock", "blocks 0 to 2: 64 threads in wait_cluster", "block 3: 64 threads have returned"}, [] {
                if (cluster_rank() < 3) sync_cluster();
              });
  Global<unsigned> flag(1, 0);
  check_fails("flag", {4, 64, 0, 1, true},
              {"deadlock", "1 threads in load_acquire (warps 0)", "63 threads in sync_block"}, [&] {
                while (thread_index() == 0 && load_acquire(flag.data()) == 0) {
                }
                sync_block();
              });
  check_fails("plain spin", {1, 32}, {"deadlock", "32 threads in a memory access"}, [&] {
    while (load(flag.data()) == 0) {
    }
  });
  check_fails("atomic spin", {1, 32}, {"deadlock"}, [&] {
    while (atomic_add(flag.data(), 0u) == 0) {
    }
  });

  // Blocks of which no more than a few run at once must not wait for each other.
  Global<unsigned> count(1, 0);
  const auto wait_for_all = [&] {
    if (thread_index() == 0) {
      add_release(count.data(), 1);
      while (load_acquire(count.data()) < unsigned(block_count())) {
      }
    }
    sync_block();
  };
  on_seeds([&](unsigned) {
    count[0] = 0;
    const std::string error = error_of({8, 64}, wait_for_all);
    CHECK(error.find("the launch is not cooperative") != std::string::npos, "%s", error.c_str());
    count[0] = 0;
    CHECK(error_of({8, 64, 0, 1, true}, wait_for_all).empty());
  });
}

void test_barriers_misused() {
  check_fails("different barriers", {1, 32}, {"while others of the same barrier are in"}, [] {
    if (lane_index() < 16)
      sync_warp();
    else
      shuffle(1, 0);
  });
  check_fails("half a warp", {1, 32}, {"deadlock", "16 threads in a vote", "16 threads have returned"}, [] {
    if (lane_index() < 16) ballot(true);
  });
  check_fails("numbers of threads", {1, 96}, {"others expect another number of threads"},
              [] { sync_named(1, warp_index() == 0 ? 64 : 96); });
  check_fails("barrier 0", {1, 32}, {"barrier 1 to 15"}, [] { sync_named(0, 32); });
  check_fails("arrived twice", {2, 32, 0, 2}, {"arrive_cluster again"}, [] {
    arrive_cluster();
    arrive_cluster();
  });
  check_fails("no arrival", {2, 32, 0, 2}, {"wait_cluster without arrive_cluster"}, [] { wait_cluster(); });
}

// A stack that grows too large is noticed before it reaches its neighbour's.
void test_stacks() {
  check_fails("deep", {1, 32}, {"its stack overflows"}, [] {
    volatile unsigned char frame[emulator::kStack - (3 << 10)];
    frame[0] = 1;
    sync_warp();
    frame[1] = frame[0];
  });
}

}  // namespace

int main() {
  test_schedules_show_races();
  test_bounds();
  test_lives_of_blocks();
  test_deadlocks();
  test_barriers_misused();
  test_stacks();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
