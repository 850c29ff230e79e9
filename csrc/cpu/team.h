// Threads for the engines. The caller injects `parallel_for` (torch's, so that torch's thread count governs, or plain
// std::threads in tests); a team makes of it what a recurrence needs: members that run at the same time.
#pragma once

#include <cstdint>

#include "cells/cell.h"  // RNNKERN_FN

namespace rnnkern {

// Calls body(context, begin, end) so that [0, count) is covered, possibly in parallel; returns when all is done.
struct ParallelFor {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, Body body, void* context);
  int threads;         // how many it may use at most
  bool awake = false;  // whether they wait for work actively, so that even little of it is worth dividing
};

// A member's view of its team: its number, and a barrier that all members pass together.
class Team;
struct Member {
  int index, size;
  Team* team;
  void barrier() const;
};

// A flag that one member raises and others wait for, on a cache line of its own.
struct alignas(128) Flag {
  int64_t value = 0;
  RNNKERN_FN void raise(int64_t to) { __atomic_store_n(&value, to, __ATOMIC_RELEASE); }
  void wait(int64_t for_value) const;  // spins, then yields
};

// Runs body(context, member) on up to `wanted` threads that are guaranteed to run at the same time. A thread that has
// not turned up within a short time is left out: the team is closed without it and the others do its share, so that
// no one ever waits for a thread that may not be scheduled. The result must not depend on the size of the team.
void run_team(const ParallelFor& parallel, int wanted, void (*body)(void* context, const Member& member),
              void* context);

template <class Body>
void run_team(const ParallelFor& parallel, int wanted, const Body& body) {
  run_team(
      parallel, wanted, [](void* context, const Member& member) { (*static_cast<const Body*>(context))(member); },
      const_cast<Body*>(&body));
}

// Runs body(begin, end) over [0, count), in parallel where there are threads.
template <class Body>
void run_parallel(const ParallelFor& parallel, int64_t count, const Body& body) {
  if (parallel.threads <= 1 || count <= 1) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  parallel.run(
      count, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace rnnkern
