#include "cpu/team.h"

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
    if (state == 0) {
      const auto deadline = std::chrono::steady_clock::now() + kGathering;
      for (int spins = 1; state_.load(std::memory_order_acquire) < wanted_; ++spins) {
        pause_cpu();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > deadline) break;
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
