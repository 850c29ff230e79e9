// Teams and flags: every member runs, barriers hold, and an executor without concurrency cannot hang a team.
#include <atomic>

#include "check.h"

using namespace rnnkern;
using namespace rnnkern_test;

void check_barriers(const ParallelFor& parallel, int wanted) {
  std::vector<int> arrived(64, 0);
  std::atomic<int> members{0}, wrong{0};
  run_team(parallel, wanted, [&](const Member& member) {
    members++;
    for (int round = 1; round <= 200; ++round) {
      arrived[size_t(member.index)] = round;
      member.barrier();
      for (int i = 0; i < member.size; ++i) wrong += arrived[size_t(i)] != round;
      member.barrier();
    }
  });
  CHECK(wrong == 0, "%d times a member was not at the barrier", wrong.load());
  CHECK(members >= 1 && members <= wanted, "%d members of %d", members.load(), wanted);
}

void check_flags(int size) {
  std::vector<Flag> flags(static_cast<size_t>(size));
  std::vector<int64_t> values(static_cast<size_t>(size), 0);
  std::atomic<int> wrong{0};
  run_team({run_on_threads, size}, size, [&](const Member& member) {
    for (int64_t step = 1; step <= 200; ++step) {
      values[size_t(member.index)] = step;
      flags[size_t(member.index)].raise(2 * step - 1);
      for (int i = 0; i < member.size; ++i) {
        flags[size_t(i)].wait(2 * step - 1);
        wrong += values[size_t(i)] != step;
      }
      flags[size_t(member.index)].raise(2 * step);  // done reading
      for (int i = 0; i < member.size; ++i) flags[size_t(i)].wait(2 * step);
    }
  });
  CHECK(wrong == 0, "%d stale reads behind a flag", wrong.load());
}

int main() {
  return run_tests([] {
    for (int threads : {1, 2, 4, 7}) {
      check_barriers({run_on_threads, threads}, threads);
      check_barriers({run_in_turn, threads}, threads);
      check_flags(threads);
    }
    std::atomic<int64_t> sum{0};
    run_parallel({run_on_threads, 3}, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum += i;
    });
    CHECK(sum == 45, "sum %lld", static_cast<long long>(sum.load()));
  });
}
