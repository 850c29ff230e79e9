// Runs CUDA kernels on the CPU, for tests: one fiber per CUDA thread, all on the calling thread.
//
// What it makes visible that a GPU hides: shared memory starts as NaN, every access through the wrappers of
// cuda/device.h is checked for bounds and alignment, an access may suspend its thread, warps advance in seeded bursts,
// copies land no earlier than they are waited for, and where nobody can go on it says who waits for what.
// What it hides that a GPU shows: memory is sequentially consistent, so a missing fence goes unnoticed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace rnnkern::emulator {

// A kernel did what a GPU would punish, or would not: the message names block, thread and place.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Grid {
  int blocks, threads;       // one-dimensional; threads a multiple of 32
  size_t shared_bytes = 0;   // of each block
  int cluster = 1;           // blocks of a cluster
  bool cooperative = false;  // all blocks at once; else a few clusters at a time, so that nobody may wait for others
};

// Runs the kernel to its end. Throws Error.
void launch(const Grid& grid, const std::function<void()>& kernel);

// Seeds the schedule of the launches that follow in this thread; 0: warps take turns.
void set_seed(unsigned seed);

// Memory that kernels may touch while this exists, besides shared memory.
class GlobalMemory {
 public:
  GlobalMemory() = default;
  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;
  ~GlobalMemory();
  void add(const void* data, size_t bytes);

 private:
  size_t count_ = 0;
};

// --- What emulated wrappers stand on ---

struct Barrier {
  int expected = 0, arrived = 0;
  int64_t generation = 0;
};

struct Copy {  // asynchronous, to shared memory
  void* to;
  const void* from;
  size_t bytes, valid;  // the rest becomes zero
};

struct Warp {
  Barrier barrier;
  uint64_t exchange[32][8];  // what lanes show each other
};

struct Block {
  int index, rank;  // in the grid, in the cluster
  struct Cluster* cluster;
  unsigned char* shared;
  Barrier barrier, named[16];
  std::vector<Warp> warps;
  int returned = 0;  // threads
};

struct Cluster {
  Barrier barrier;
  std::vector<Block> blocks;
};

struct Thread {
  Block* block;
  int index;
  void* stack_pointer;
  unsigned char* stack;
  const Barrier* waits_for = nullptr;  // until its generation is above the next
  int64_t waits_above = 0;
  const char* place = "";  // what it does when it does not run
  bool returned = false, polls = false, cluster_arrived = false;
  int64_t cluster_generation = 0;         // at its last arrival
  std::vector<Copy> copies;               // issued, not waited for
  std::vector<size_t> groups;             // ends of committed groups in `copies`
  void *fake_stack = nullptr, *reserved;  // AddressSanitizer's
};

extern thread_local Thread* current;
const Grid& grid();

void arrive(Barrier& barrier);
void wait_above(const Barrier& barrier, int64_t generation, const char* place);
void arrive_and_wait(Barrier& barrier, const char* place);
void poll(const char* place);                                // of a loop that waits for memory to change
void access(const void* address, size_t bytes, bool write);  // checks; may suspend the thread
[[noreturn]] void fail(const std::string& what);             // ends the launch

}  // namespace rnnkern::emulator
