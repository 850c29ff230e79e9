// The scheduler: fibers, seeded order, deadlocks, bounds.
#include "emulator/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define RNNKERN_FIBER_SANITIZER 1
#endif

namespace rnnkern::emulator {

thread_local Thread* current = nullptr;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kClustersAtOnce = 3;            // of launches that promise no more
constexpr int64_t kFruitless = int64_t(1e8);  // suspensions without a write after which a kernel hangs

// Saves the callee's registers, exchanges stacks.
extern "C" void rnnkern_switch_fiber(void** from, void* to);
#if defined(__x86_64__)
__asm__(
    ".text\n.globl rnnkern_switch_fiber\n.type rnnkern_switch_fiber,@function\nrnnkern_switch_fiber:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size rnnkern_switch_fiber,.-rnnkern_switch_fiber\n");
constexpr int kSavedRegisters = 6;
#else
#error "the emulator switches stacks by hand, and knows how on x86-64 only"
#endif

struct Range {
  const unsigned char* data;
  size_t bytes;
};
thread_local std::vector<Range> global_memory;
thread_local unsigned next_seed = 1;

// Stacks of fibers, kept for the next launch: mapping and clearing them takes longer than small kernels run.
struct Stacks {
  std::vector<unsigned char*> free;
  unsigned char* take() {
    if (free.empty()) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw Error("emulator: no memory for the stacks of so many threads");
      mprotect(memory, 4096, PROT_NONE);
      return static_cast<unsigned char*>(memory);
    }
    unsigned char* stack = free.back();
    free.pop_back();
    return stack;
  }
  ~Stacks() {
    for (unsigned char* stack : free) munmap(stack, kStack);
  }
};
thread_local Stacks stacks;

std::string name_of(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + " thread " + std::to_string(thread.index);
}

class Launch {
 public:
  Launch(const Grid& grid, const std::function<void()>& kernel) : grid_(grid), kernel_(kernel), random_(next_seed) {
    ordered_ = next_seed == 0;
  }

  void run() {
    const int clusters = grid_.blocks / grid_.cluster;
    const int at_once = grid_.cooperative ? clusters : std::min(clusters, kClustersAtOnce);
    for (int first = 0; first < clusters; first += at_once) {
      start(first, std::min(at_once, clusters - first));
      finish();
    }
  }

  void suspend() {
    Thread* self = current;
#ifdef RNNKERN_FIBER_SANITIZER
    __sanitizer_start_switch_fiber(self->returned ? nullptr : &self->fake_stack, main_stack_, main_size_);
#endif
    rnnkern_switch_fiber(&self->stack_pointer, main_pointer_);
#ifdef RNNKERN_FIBER_SANITIZER
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
  }

  // Threads that are neither at a barrier nor done may be anywhere between two accesses.
  void maybe_suspend() {
    if (ordered_ || --until_suspension_ > 0) return;
    until_suspension_ = int(random_() % 512) + 1;
    ++fruitless_;
    current->place = "a memory access";
    suspend();
  }

  void note_progress() {
    ++progress_;
    fruitless_ = 0;
  }

  const Grid& grid() const { return grid_; }

 private:
  static void enter();

  void start(int first, int count) {
    clusters_.clear();
    clusters_.resize(size_t(count));
    shared_.clear();
    threads_.clear();
    threads_.reserve(size_t(count) * size_t(grid_.cluster) * size_t(grid_.threads));
    for (int c = 0; c < count; ++c) {
      Cluster& cluster = clusters_[size_t(c)];
      cluster.barrier.expected = grid_.cluster * grid_.threads;
      cluster.blocks.resize(size_t(grid_.cluster));
      for (int rank = 0; rank < grid_.cluster; ++rank) {
        Block& block = cluster.blocks[size_t(rank)];
        block.index = (first + c) * grid_.cluster + rank;
        block.rank = rank;
        block.cluster = &cluster;
        const size_t bytes = (grid_.shared_bytes + 1023) / 1024 * 1024;
        shared_.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(1024, std::max(bytes, size_t(1024)))));
        block.shared = shared_.back().get();
        std::memset(block.shared, 0xFF, bytes);  // NaN in every format
        block.barrier.expected = grid_.threads;
        block.warps.resize(size_t(grid_.threads / 32));
        for (Warp& warp : block.warps) warp.barrier.expected = 32;
        for (int t = 0; t < grid_.threads; ++t) add_thread(block, t);
      }
    }
  }

  void add_thread(Block& block, int index) {
    threads_.emplace_back();
    Thread& thread = threads_.back();
    thread.block = &block;
    thread.index = index;
    thread.stack = stacks.take();
    void** top = reinterpret_cast<void**>(thread.stack + kStack);
    *--top = nullptr;  // a return address that nobody uses, and the alignment that a call leaves
    *--top = reinterpret_cast<void*>(&Launch::enter);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    thread.stack_pointer = top;
  }

  void give_back_stacks() {
    for (Thread& thread : threads_) {
#ifdef RNNKERN_FIBER_SANITIZER
      __asan_unpoison_memory_region(thread.stack + 4096, kStack - 4096);  // frames of threads that were given up
#endif
      stacks.free.push_back(thread.stack);
    }
  }

  bool blocked(const Thread& thread) const {
    return thread.returned || (thread.waits_for && thread.waits_for->generation <= thread.waits_above);
  }

  void resume(Thread& thread) {
    current = &thread;
    thread.waits_for = nullptr;
    thread.polls = false;
#ifdef RNNKERN_FIBER_SANITIZER
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStack);
#endif
    rnnkern_switch_fiber(&main_pointer_, thread.stack_pointer);
#ifdef RNNKERN_FIBER_SANITIZER
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
    if (!failure_.empty()) {
      give_back_stacks();
      throw Error(failure_);
    }
    left_ -= thread.returned;
  }

  // One round over a warp's lanes; whether one of them could go on.
  bool run_warp(size_t warp) {
    bool any = false;
    for (size_t lane = 0; lane < 32; ++lane) {
      Thread& thread = threads_[warp * 32 + (ordered_ ? lane : lane ^ lane_order_)];
      if (blocked(thread)) continue;
      resume(thread);
      any = any || !thread.polls;
    }
    return any;
  }

  void finish() {
    left_ = threads_.size();
    const size_t warps = threads_.size() / 32;
    until_suspension_ = int(random_() % 512) + 1;
    while (left_ > 0) {
      const int64_t before = progress_;
      bool any = false;
      if (ordered_) {
        for (size_t warp = 0; warp < warps; ++warp) any = run_warp(warp) || any;
      } else {
        for (size_t i = 0; i < warps; ++i) {
          const size_t warp = random_() % warps;
          lane_order_ = random_() % 32;
          const int burst = 1 << random_() % 9;
          for (int round = 0; round < burst && run_warp(warp); ++round) any = true;
        }
        // Chance may have passed over the one that can go on.
        for (size_t warp = 0; !any && progress_ == before && warp < warps; ++warp) any = run_warp(warp);
      }
      if ((left_ > 0 && !any && progress_ == before) || fruitless_ > kFruitless) {
        const std::string report = deadlock();
        give_back_stacks();
        throw Error(report);
      }
    }
    give_back_stacks();
  }

  // Who waits where: threads of one warp and place together.
  std::string deadlock() const {
    std::string text = "deadlock: nobody can go on\n";
    std::map<std::pair<std::string, int>, int> waiting;  // (place, warp) -> threads, in order of blocks
    int lines = 0;
    for (const Cluster& cluster : clusters_) {
      for (const Block& block : cluster.blocks) {
        waiting.clear();
        for (const Thread& thread : threads_) {
          if (thread.block == &block && !thread.returned) waiting[{thread.place, thread.index / 32}]++;
        }
        for (const auto& [key, count] : waiting) {
          if (++lines > 64) return text + "  ...\n";
          text += "  block " + std::to_string(block.index) + " warp " + std::to_string(key.second) + ": " +
                  std::to_string(count) + " threads in " + key.first + "\n";
        }
        if (block.returned > 0)
          text += "  block " + std::to_string(block.index) + ": " + std::to_string(block.returned) +
                  " threads have returned\n";
      }
    }
    return text;
  }

  const Grid grid_;
  const std::function<void()>& kernel_;
  std::mt19937 random_;
  bool ordered_;
  std::vector<Cluster> clusters_;
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<unsigned char, Free>> shared_;
  std::vector<Thread> threads_;
  void* main_pointer_ = nullptr;
  [[maybe_unused]] const void* main_stack_ = nullptr;
  [[maybe_unused]] size_t main_size_ = 0;
  size_t left_ = 0, lane_order_ = 0;
  int until_suspension_ = 1;
  int64_t progress_ = 0, fruitless_ = 0;
  std::string failure_;
};

thread_local Launch* running = nullptr;

void Launch::enter() {
#ifdef RNNKERN_FIBER_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &running->main_stack_, &running->main_size_);
#endif
  try {
    running->kernel_();
  } catch (const Error& error) {
    running->failure_ = name_of(*current) + ": " + error.what();
  }
  current->returned = true;
  current->block->returned++;
  running->note_progress();
  running->suspend();
  std::abort();
}

std::string describe(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

bool inside(const void* address, size_t bytes, const void* start, size_t size) {
  const auto at = reinterpret_cast<uintptr_t>(address), from = reinterpret_cast<uintptr_t>(start);
  return at >= from && at + bytes <= from + size;
}

}  // namespace

void launch(const Grid& grid, const std::function<void()>& kernel) {
  if (running != nullptr) throw Error("emulator: a kernel cannot launch another");
  if (grid.blocks <= 0 || grid.threads <= 0 || grid.threads > 1024 || grid.threads % 32 != 0 || grid.cluster <= 0 ||
      grid.blocks % grid.cluster != 0)
    throw Error("emulator: a grid of " + std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) +
                " threads in clusters of " + std::to_string(grid.cluster) + " cannot be launched");
  Launch self(grid, kernel);
  running = &self;
  struct Done {
    ~Done() { running = nullptr; }
  } done;
  self.run();
}

void set_seed(unsigned seed) { next_seed = seed; }

GlobalMemory::~GlobalMemory() { global_memory.resize(global_memory.size() - count_); }

void GlobalMemory::add(const void* data, size_t bytes) {
  global_memory.push_back({static_cast<const unsigned char*>(data), bytes});
  ++count_;
}

const Grid& grid() { return running->grid(); }

void arrive(Barrier& barrier) {
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  barrier.generation++;
  running->note_progress();
}

void wait_above(const Barrier& barrier, int64_t generation, const char* place) {
  if (barrier.generation > generation) return;
  current->waits_for = &barrier;
  current->waits_above = generation;
  current->place = place;
  running->suspend();
}

void arrive_and_wait(Barrier& barrier, const char* place) {
  const int64_t generation = barrier.generation;
  arrive(barrier);
  wait_above(barrier, generation, place);
}

void poll(const char* place) {
  current->polls = true;
  current->place = place;
  running->suspend();
}

void fail(const std::string& what) { throw Error(what); }

void access(const void* address, size_t bytes, bool write) {
  if (write) running->note_progress();
  running->maybe_suspend();
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("misaligned access of " + std::to_string(bytes) + " bytes at " + describe(address));
  const size_t shared = grid().shared_bytes;
  if (inside(address, bytes, current->block->shared, shared)) return;
  for (const Range& range : global_memory) {
    if (inside(address, bytes, range.data, range.bytes)) return;
  }
  for (const Block& block : current->block->cluster->blocks) {
    if (!inside(address, bytes, block.shared, shared)) continue;
    if (block.returned == grid().threads)
      fail("access to the shared memory of block " + std::to_string(block.index) + ", which has returned");
    return;
  }
  std::string nearest;
  for (const Range& range : global_memory) {
    const auto at = reinterpret_cast<intptr_t>(address), from = reinterpret_cast<intptr_t>(range.data);
    if (at >= from - 4096 && at < from + intptr_t(range.bytes) + 4096)
      nearest = ", " + std::to_string(at - from) + " bytes from the start of a tensor of " +
                std::to_string(range.bytes) + " bytes";
  }
  for (const Block& block : current->block->cluster->blocks) {
    const auto at = reinterpret_cast<intptr_t>(address), from = reinterpret_cast<intptr_t>(block.shared);
    if (at >= from && at < from + intptr_t(shared) + 4096)
      nearest = ", " + std::to_string(at - from) + " bytes from the start of " + std::to_string(shared) +
                " bytes of shared memory of block " + std::to_string(block.index);
  }
  fail(std::string("out of bounds: ") + (write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " +
       describe(address) + nearest);
}

}  // namespace rnnkern::emulator
