// Teams and flags: every member runs, barriers hold, and an executor without concurrency cannot hang a team.
#if defined(__linux__)
#include <sched.h>
#endif

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

#if defined(__linux__)
cpu_set_t only(std::initializer_list<int> cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  return set;
}

// A member that begins on the CPU of another goes to a free one, and is bound to no CPU afterwards.
void check_members_part() {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  static int first, second;  // run_on_threads hands its threads no context
  first = second = -1;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) (first < 0 ? first : second) = cpu;
  }
  if (second < 0) return;  // one CPU
  int parted = 0, together = 0;
  const int rounds = 20;
  for (int round = 0; round < rounds; ++round) {
    static std::atomic<bool> opened;
    opened = false;
    std::atomic<int> cpus[2] = {{-1}, {-1}};
    const auto run = [](int64_t, ParallelFor::Body body, void* context) {
      std::thread other([&] {
        const cpu_set_t here = only({first}), both = only({first, second});
        sched_setaffinity(0, sizeof here, &here);
        while (!opened) std::this_thread::yield();
        sched_setaffinity(0, sizeof both, &both);  // still here
        body(context, 1, 2);
        cpu_set_t after;
        sched_getaffinity(0, sizeof after, &after);
        CHECK(CPU_EQUAL(&after, &both), "a member may run on %d CPUs, not 2, after the team's work", CPU_COUNT(&after));
      });
      std::thread opener([&] {
        const cpu_set_t here = only({first});
        sched_setaffinity(0, sizeof here, &here);
        opened = true;
        body(context, 0, 1);
      });
      opener.join();
      other.join();
    };
    run_team({run, 2}, 2, [&](const Member& member) { cpus[member.index] = sched_getcpu(); });
    if (cpus[0] < 0 || cpus[1] < 0) continue;  // a team of one
    together++;
    parted += cpus[0] != cpus[1];
  }
  CHECK(parted * 2 >= together, "members were on two CPUs in %d of %d teams", parted, together);
}
#endif

int main() {
  return run_tests([] {
    for (int threads : {1, 2, 4, 7}) {
      check_barriers({run_on_threads, threads}, threads);
      check_barriers({run_in_turn, threads}, threads);
      check_flags(threads);
    }
#if defined(__linux__)
    check_members_part();
#endif
    std::atomic<int64_t> sum{0};
    run_parallel({run_on_threads, 3}, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum += i;
    });
    CHECK(sum == 45, "sum %lld", static_cast<long long>(sum.load()));
  });
}
