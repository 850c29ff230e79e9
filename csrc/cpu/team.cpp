#include "cpu/team.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <thread>

namespace rnnkern {
namespace {

constexpr int kSpins = 1000;                          // about 10 us before the first yield
constexpr std::chrono::microseconds kGathering{300};  // how long an opened team waits for its members

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins briefly, then gives the core away between looks: more members than cores must not stop each other.
template <class Done>
void wait_until(const Done& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

// The CPUs that a team's members run on. Linux may wake a thread on the CPU of the one that wakes it, though another is
// idle, and leave both there for milliseconds, longer than many calls take.
class Cpus {
 public:
  // Takes the CPU that this thread runs on; where a member has it already, moves the thread to one that it may run on
  // and that none has, if there is one.
  void take_one() {
#if defined(__linux__)
    if (take(sched_getcpu())) return;
    cpu_set_t allowed, others;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    CPU_ZERO(&others);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &allowed) && !taken(cpu)) CPU_SET(cpu, &others);
    }
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
    take(sched_getcpu());
    sched_setaffinity(0, sizeof allowed, &allowed);
#endif
  }

 private:
#if defined(__linux__)
  static uint64_t bit(int cpu) { return uint64_t(1) << (cpu % 64); }
  bool taken(int cpu) const { return words_[cpu / 64].load(std::memory_order_relaxed) & bit(cpu); }
  bool take(int cpu) {  // false if it was taken; a CPU of no known number is nobody's
    if (cpu < 0 || cpu >= CPU_SETSIZE) return true;
    return !(words_[cpu / 64].fetch_or(bit(cpu), std::memory_order_relaxed) & bit(cpu));
  }
  std::atomic<uint64_t> words_[CPU_SETSIZE / 64] = {};
#endif
};

}  // namespace

void Flag::wait(int64_t for_value) const {
  wait_until([&] { return __atomic_load_n(&value, __ATOMIC_ACQUIRE) >= for_value; });
}

class Team {
 public:
  explicit Team(int wanted) : wanted_(wanted) {}

  // The number under which this thread joins, or -1 when the team is closed. The first to come waits for the others
  // and closes the team; the size is known to all from then on.
  int join() {
    int state = state_.load(std::memory_order_acquire);
    do {
      if (state & kClosed || state >= wanted_) return -1;
    } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel));
    cpus_.take_one();
    if (state == 0) {
      const auto deadline = std::chrono::steady_clock::now() + kGathering;
      for (int spins = 1; state_.load(std::memory_order_acquire) < wanted_; ++spins) {
        pause_cpu();
        if (spins % 64 != 0) continue;
        std::this_thread::yield();  // a member may wait for this very CPU
        if (std::chrono::steady_clock::now() > deadline) break;
      }
      size_.store(state_.fetch_or(kClosed, std::memory_order_acq_rel), std::memory_order_release);
    } else {
      wait_until([&] { return size_.load(std::memory_order_acquire) > 0; });
    }
    return state;
  }

  int size() const { return size_.load(std::memory_order_acquire); }

  void barrier() {
    const int size = this->size();
    if (size == 1) return;
    const int64_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
    }
  }

 private:
  static constexpr int kClosed = 1 << 30;
  const int wanted_;
  Cpus cpus_;
  alignas(128) std::atomic<int> state_{0};
  alignas(128) std::atomic<int> size_{0};
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<int64_t> generation_{0};
};

void Member::barrier() const {
  if (team) team->barrier();
}

void run_team(const ParallelFor& parallel, int wanted, void (*body)(void*, const Member&), void* context) {
  if (wanted <= 1 || parallel.threads <= 1) {
    body(context, Member{0, 1, nullptr});
    return;
  }
  Team team(wanted < parallel.threads ? wanted : parallel.threads);
  run_parallel(parallel, wanted < parallel.threads ? wanted : parallel.threads, [&](int64_t, int64_t) {
    const int index = team.join();
    if (index >= 0) body(context, Member{index, team.size(), &team});
  });
}

}  // namespace rnnkern
