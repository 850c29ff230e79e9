// The scheduler: seeded order, barriers, deadlocks.
#include "emulator/emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <random>

#include "emulator/fiber.h"
#include "emulator/memory.h"

namespace rnnkern::emulator {

RNNKERN_THREAD_LOCAL Thread* current = nullptr;
RNNKERN_THREAD_LOCAL const Grid* current_grid = nullptr;

namespace {

constexpr int kClustersAtOnce = 3;       // at most, of launches that promise no more
constexpr int64_t kFruitless = 1000;     // suspensions of each thread without a write or a barrier: it hangs
constexpr int kFruitlessRounds = 64;     // of nothing but polls; a thread may pass some whose flag is set already
constexpr size_t kGap = 4096;            // between the shared memory of blocks
constexpr int kOrderedSuspension = 256;  // accesses: threads that wait without polling must let others run

thread_local unsigned next_seed = 1, launches = 0;
thread_local Stacks stacks;

std::string name_of(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + " thread " + std::to_string(thread.index);
}

class Launch {
 public:
  Launch(const Grid& grid, const std::function<void()>& kernel)
      : grid_(grid), kernel_(kernel), random_(next_seed * 65537 + launches++), ordered_(next_seed == 0) {}

  void run() {
    std::vector<int> order(size_t(grid_.blocks / grid_.cluster));
    for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
    size_t at_once = order.size();
    if (!grid_.cooperative) {
      if (!ordered_) std::shuffle(order.begin(), order.end(), random_);
      at_once = std::min(at_once, ordered_ ? size_t(1) : 1 + random_() % kClustersAtOnce);
    }
    for (size_t first = 0; first < order.size(); first += at_once) {
      start(order.data() + first, std::min(at_once, order.size() - first));
      struct GiveBack {
        Launch& self;
        ~GiveBack() {
          for (Fiber& fiber : self.fibers_) fiber.give_back(stacks);
        }
      } give_back{*this};
      finish();
    }
  }

  void suspend() { fibers_[size_t(current - threads_.data())].suspend(main_, current->returned); }

  // Threads that are neither at a barrier nor done may be anywhere between two accesses.
  void maybe_suspend() {
    if (--until_suspension_ > 0) return;
    draw_suspension();
    ++fruitless_;
    current->place = "a memory access";
    suspend();
  }

  void poll() {
    ++fruitless_;
    suspend();
  }

  void note_progress() {
    ++progress_;
    fruitless_ = 0;
  }

  bool coin() { return !ordered_ && random_() % 2; }

 private:
  struct ScheduledWarp {
    Thread* lanes;
    const Barrier* stuck_on = nullptr;  // where all lanes wait that have not returned
    int64_t stuck_above = 0;
    bool done = false;
  };

  static void enter();

  void start(const int* clusters, size_t count) {
    clusters_.clear();
    clusters_.resize(count);
    shared_.clear();
    threads_.clear();
    threads_.reserve(count * size_t(grid_.cluster) * size_t(grid_.threads));
    for (size_t c = 0; c < count; ++c) {
      Cluster& cluster = clusters_[c];
      cluster.barrier.expected = grid_.cluster * grid_.threads;
      cluster.blocks.resize(size_t(grid_.cluster));
      for (int rank = 0; rank < grid_.cluster; ++rank) {
        Block& block = cluster.blocks[size_t(rank)];
        block.index = clusters[c] * grid_.cluster + rank;
        block.rank = rank;
        block.cluster = &cluster;
        const size_t bytes = (grid_.shared_bytes + 1023) / 1024 * 1024;
        shared_.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(1024, bytes + kGap)));
        block.shared = shared_.back().get();
        std::memset(block.shared, 0xFF, bytes);  // NaN in every format
        block.barrier.expected = grid_.threads;
        block.warps.resize(size_t(grid_.threads / 32));
        for (Warp& warp : block.warps) warp.barrier.expected = 32;
        for (int t = 0; t < grid_.threads; ++t) {
          threads_.emplace_back();
          threads_.back().block = &block;
          threads_.back().index = t;
        }
      }
    }
    fibers_.clear();
    fibers_.resize(threads_.size());
    for (size_t i = 0; i < fibers_.size(); ++i) fibers_[i].start(stacks, i, &Launch::enter);
    warps_.clear();
    for (size_t i = 0; i < threads_.size(); i += 32) warps_.push_back({&threads_[i]});
  }

  void draw_suspension() {
    // Both rare and frequent ones: the mean of a stretch is between 4 and 512 accesses.
    until_suspension_ = ordered_ ? kOrderedSuspension : 1 + int(random_() % (8u << random_() % 8));
  }

  void resume(Thread& thread) {
    Fiber& fiber = fibers_[size_t(&thread - threads_.data())];
    current = &thread;
    thread.waits_for = nullptr;
    thread.polls = false;
    fiber.resume(main_);
    current = nullptr;
    if (fiber.overflowed()) failure_ = std::make_exception_ptr(Error(name_of(thread) + ": its stack overflows"));
    if (failure_) std::rethrow_exception(failure_);
  }

  // One round over a warp's lanes; whether one of them could go on.
  bool run_warp(ScheduledWarp& warp) {
    if (warp.stuck_on && warp.stuck_on->generation <= warp.stuck_above) return false;
    warp.stuck_on = nullptr;
    const Barrier* barrier = nullptr;
    int64_t above = 0;
    int returned = 0;
    bool any = false, together = true;
    for (size_t lane = 0; lane < 32; ++lane) {
      Thread& thread = warp.lanes[lane ^ lane_order_];
      if (thread.returned) {
        ++returned;
      } else if (thread.waits_for && thread.waits_for->generation <= thread.waits_above) {
        together = together && (barrier == nullptr || barrier == thread.waits_for);
        barrier = thread.waits_for;
        above = thread.waits_above;
      } else {
        resume(thread);
        ++resumed_;
        any = any || !thread.polls;
        together = false;
      }
    }
    warp.done = returned == 32;
    if (together && barrier) {
      warp.stuck_on = barrier;
      warp.stuck_above = above;
    }
    return any;
  }

  void finish() {
    draw_suspension();
    int fruitless_rounds = 0;
    while (!warps_.empty()) {
      const int64_t before = progress_;
      bool any = false;
      for (size_t i = 0; i < warps_.size() && !ordered_; ++i) {
        ScheduledWarp& warp = warps_[random_() % warps_.size()];
        lane_order_ = random_() % 32;
        const int burst = 1 << random_() % 9;
        for (int round = 0; round < burst && run_warp(warp); ++round) any = true;
      }
      resumed_ = 0;
      if (!any) {  // in order; or chance may have passed over the one that can go on
        for (ScheduledWarp& warp : warps_) any = run_warp(warp) || any;
        if (resumed_ == 0 && !all_done()) throw Error(deadlock());
      }
      warps_.erase(std::remove_if(warps_.begin(), warps_.end(), [](const ScheduledWarp& warp) { return warp.done; }),
                   warps_.end());
      fruitless_rounds = any || progress_ != before ? 0 : fruitless_rounds + 1;
      if (fruitless_rounds > kFruitlessRounds || fruitless_ > kFruitless * int64_t(threads_.size()))
        throw Error(deadlock());
    }
  }

  bool all_done() const {
    return std::all_of(warps_.begin(), warps_.end(), [](const ScheduledWarp& warp) { return warp.done; });
  }

  // Who waits where: for each place of a block, how many threads of which warps. Blocks that look the same together.
  std::string deadlock() const {
    std::string text = "deadlock: nobody can go on", previous;
    int first = 0, last = 0;
    const auto flush = [&] {
      if (previous.empty()) return;
      text += first == last ? "\n  block " + std::to_string(first) + ": "
                            : "\n  blocks " + std::to_string(first) + " to " + std::to_string(last) + ": ";
      text += previous;
    };
    for (const Cluster& cluster : clusters_) {
      for (const Block& block : cluster.blocks) {
        const std::string state = state_of(block);
        if (state == previous && block.index == last + 1) {
          last = block.index;
          continue;
        }
        flush();
        first = last = block.index;
        previous = state;
      }
    }
    flush();
    const size_t all = size_t(grid_.blocks), here = clusters_.size() * size_t(grid_.cluster);
    if (here < all)
      text += "\n  " + std::to_string(all - here) +
              " other blocks are done or have not begun: the launch is not cooperative";
    return text;
  }

  std::string state_of(const Block& block) const {
    std::map<std::string, std::pair<int, std::string>> places;  // threads, names of warps
    for (const Thread& thread : threads_) {
      if (thread.block != &block) continue;
      auto& [count, warps] = places[thread.returned ? "have returned" : std::string("in ") + thread.place];
      ++count;
      const std::string warp = " " + std::to_string(thread.index / 32);
      if (warps.size() < warp.size() || warps.compare(warps.size() - warp.size(), warp.size(), warp) != 0)
        warps += warp;
    }
    std::string text;
    for (const auto& [place, who] : places) {
      const auto& [count, warps] = who;
      text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
      if (places.size() > 1) text += " (warps" + warps + ")";
    }
    return text;
  }

  const Grid grid_;
  const std::function<void()>& kernel_;
  std::minstd_rand random_;
  const bool ordered_;
  std::vector<Cluster> clusters_;
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<unsigned char, Free>> shared_;
  std::vector<Thread> threads_;
  std::vector<Fiber> fibers_;         // of threads_
  std::vector<ScheduledWarp> warps_;  // that have not returned
  MainStack main_;
  size_t lane_order_ = 0, resumed_ = 0;
  int until_suspension_ = 1;
  int64_t progress_ = 0, fruitless_ = 0;
  std::exception_ptr failure_;
};

RNNKERN_THREAD_LOCAL Launch* running = nullptr;

void Launch::enter() {
  Fiber::entered(running->main_);
  current->block->begun = true;
  try {
    running->kernel_();
  } catch (const Error& error) {
    running->failure_ = std::make_exception_ptr(Error(name_of(*current) + ": " + error.what()));
  } catch (...) {
    running->failure_ = std::current_exception();
  }
  current->returned = true;
  current->block->returned++;
  running->note_progress();
  running->suspend();
  std::abort();
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
  current_grid = &grid;
  struct Done {
    ~Done() {
      running = nullptr;
      current = nullptr;
    }
  } done;
  self.run();
}

void set_seed(unsigned seed) {
  next_seed = seed;
  launches = 0;
}

void arrive(Barrier& barrier, const char* place) {
  if (barrier.arrived == 0)
    barrier.place = place;
  else if (barrier.place != place && std::strcmp(barrier.place, place) != 0)
    fail(std::string("in ") + place + ", while others of the same barrier are in " + barrier.place);
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
  arrive(barrier, place);
  wait_above(barrier, generation, place);
}

void poll(const char* place) {
  current->polls = true;
  current->place = place;
  running->poll();
}

bool coin() { return running->coin(); }

void fail(const std::string& what) { throw Error(what); }

void access(const void* address, size_t bytes, bool write) {
  if (write) running->note_progress();
  running->maybe_suspend();
  check_access(address, bytes, bytes, write, Space::any);
}

}  // namespace rnnkern::emulator
