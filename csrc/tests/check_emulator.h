// What the tests of emulated kernels share: memory, seeds, and what an emulated launch says.
#pragma once

#include <initializer_list>
#include <limits>
#include <string>

#include "check.h"
#include "cuda/device.h"
#include "emulator/emulator.h"

namespace rnnkern_test {

namespace emulator = rnnkern::emulator;

constexpr unsigned kSeeds = 8;

// An array that kernels may touch, of NaN or of all bits set.
template <class T>
struct Global {
  std::vector<T> values;
  emulator::GlobalMemory memory;
  explicit Global(size_t count, T value = T(std::numeric_limits<T>::has_quiet_NaN ? std::nan("") : -1))
      : values(count, value) {
    memory.add(values.data(), count * sizeof(T));
  }
  T* data() { return values.data(); }
  T& operator[](size_t i) { return values[i]; }
};

// The message of the Error with which a launch ends, or "" if it runs to its end.
template <class Kernel>
std::string error_of(const emulator::Grid& grid, const Kernel& kernel) {
  try {
    emulator::launch(grid, kernel);
  } catch (const emulator::Error& error) {
    return error.what();
  }
  return "";
}

template <class Body>
void on_seeds(const Body& body) {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(seed);
    body(seed);
  }
}

}  // namespace rnnkern_test
