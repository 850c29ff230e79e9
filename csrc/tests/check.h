// The little that the C++ tests need: a check that reports and counts, random numbers, threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/team.h"

namespace rnnkern_test {

inline int failures = 0;

// Whether a sanitizer watches: the references, which take long then, are left to the build without one.
#ifdef RNNKERN_SANITIZED
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

#define CHECK(condition, ...)                                   \
  do {                                                          \
    if (!(condition)) {                                         \
      ++rnnkern_test::failures;                                 \
      std::printf("%s:%d: %s", __FILE__, __LINE__, #condition); \
      std::printf("  " __VA_ARGS__);                            \
      std::printf("\n");                                        \
    }                                                           \
  } while (0)

// Exit status of a test: 77, which ctest counts as skipped, where this CPU lacks the instruction set asked for.
template <class Body>
int run_tests(const Body& body) {
  try {
    rnnkern::current_isa();
  } catch (const std::exception& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  body();
  std::printf("%s: %d failures\n", rnnkern::isa_name(rnnkern::current_isa()), failures);
  return failures ? 1 : 0;
}

template <class T>
std::vector<T> random_vector(size_t count, unsigned seed, double scale = 1.0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<T> values(count);
  for (T& value : values) value = T(normal(generator));
  return values;
}

// Plain threads, each with an even part.
inline void run_on_threads(int64_t count, rnnkern::ParallelFor::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < count; ++i) threads.emplace_back([=] { body(context, i, i + 1); });
  body(context, 0, 1);
  for (std::thread& thread : threads) thread.join();
}
// An executor that runs everything on the calling thread, in pieces: whoever waits for a peer would hang.
inline void run_in_turn(int64_t count, rnnkern::ParallelFor::Body body, void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i, i + 1);
}

}  // namespace rnnkern_test
