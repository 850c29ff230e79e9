// Runs CUDA kernels on the CPU, for tests: one fiber per CUDA thread, all on the calling thread.
//
// What it makes visible that a GPU hides: shared memory starts as NaN, every access through the wrappers of
// cuda/device.h is checked for bounds and alignment, an access may suspend its thread, warps advance in seeded bursts,
// asynchronous copies land at once or no earlier than they are waited for, blocks begin in any order, and where nobody
// can go on it says who waits for what. It is stricter than a GPU where a kernel should not rely on what one does: a
// thread that has returned is missing at every barrier.
// What it hides that a GPU shows: memory is sequentially consistent, so a missing fence goes unnoticed; and a race that
// needs two threads within the same access.
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

// Runs the kernel to its end. Throws Error, or what the kernel throws; then memory is as the kernel left it.
void launch(const Grid& grid, const std::function<void()>& kernel);

// Seeds the schedules of the launches that follow in this thread, each another one; 0: warps and blocks take turns.
void set_seed(unsigned seed);

// Memory that kernels of this thread may touch while this exists, besides shared memory. Destroy in reverse order.
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

// A thread's stack holds a kernel's variables and a message; huge pages hold those of a few blocks.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 32 << 10;
#endif

struct Barrier {
  int expected = 0, arrived = 0;
  int64_t generation = 0;
  const char* place = "";  // where the first came from
};

struct Copy {  // asynchronous, to shared memory
  void* to;
  const void* from;
  size_t bytes, valid;  // the rest becomes zero
};

struct Warp {
  Barrier barrier;
  alignas(64) unsigned char shown[2][32][64];  // what lanes show each other, in turns: see exchange
};

struct Block {
  int index, rank;  // in the grid, in the cluster
  struct Cluster* cluster;
  unsigned char* shared;
  Barrier barrier, named[16];
  std::vector<Warp> warps;
  bool begun = false;
  int returned = 0;  // threads
};

struct Cluster {
  Barrier barrier;
  std::vector<Block> blocks;
};

struct Thread {
  Block* block;
  int index;
  bool returned = false, polls = false, cluster_arrived = false;
  const Barrier* waits_for = nullptr;  // until its generation is above the next
  int64_t waits_above = 0;
  const char* place = "";          // what it does when it does not run
  int64_t cluster_generation = 0;  // at its last arrival
  std::vector<Copy> copies;        // issued, not waited for
  std::vector<size_t> groups;      // ends of committed groups in `copies`
};

// Of the initial executable: found without a call, also from a library.
#define RNNKERN_THREAD_LOCAL thread_local __attribute__((tls_model("initial-exec")))
extern RNNKERN_THREAD_LOCAL Thread* current;
extern RNNKERN_THREAD_LOCAL const Grid* current_grid;
inline const Grid& grid() { return *current_grid; }

void arrive(Barrier& barrier, const char* place);
void wait_above(const Barrier& barrier, int64_t generation, const char* place);
void arrive_and_wait(Barrier& barrier, const char* place);
void poll(const char* place);  // of a loop that waits for memory to change
bool coin();                   // heads or tails, where a GPU may do either

enum class Space { any, global, own_shared };
void access(const void* address, size_t bytes, bool write);  // checks; may suspend the thread before
// Checks alone, of a range that may be empty.
void check_access(const void* address, size_t bytes, size_t alignment, bool write, Space space);
[[noreturn]] void fail(const std::string& what);  // ends the launch

}  // namespace rnnkern::emulator
