// The pool: what is given back is used again, what lies unused is bounded and can be freed, threads take turns.
#include "cpu/workspace.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"

using namespace rnnkern;
using namespace rnnkern_test;

namespace {

constexpr size_t kMiB = size_t(1) << 20;

void test_reuse() {
  release_pool();
  CHECK(unused_pool_bytes() == 0);
  void* first = take_pooled(8 * kMiB);
  CHECK(reinterpret_cast<uintptr_t>(first) % kAlignment == 0);
  std::memset(first, 1, 8 * kMiB);
  give_back_pooled(first);
  CHECK(unused_pool_bytes() >= 8 * kMiB);
  void* smaller = take_pooled(5 * kMiB);
  CHECK(smaller == first);
  CHECK(unused_pool_bytes() == 0);
  void* another = take_pooled(5 * kMiB);  // the first is in use
  CHECK(another != first);
  give_back_pooled(smaller);
  give_back_pooled(another);
  void* tiny = take_pooled(kMiB);  // a block of more than twice the size is left to others
  CHECK(tiny != first && tiny != another);
  give_back_pooled(tiny);
  release_pool();
  CHECK(unused_pool_bytes() == 0);
}

// Blocks of ever other sizes: used and unused ones together never exceed the most that was in use at once.
void test_bound() {
  release_pool();
  void* most = take_pooled(64 * kMiB);
  give_back_pooled(most);
  for (size_t i = 1; i <= 40; ++i) {
    void* block = take_pooled((1 + i * 7 % 31) * kMiB);
    CHECK(unused_pool_bytes() <= 70 * kMiB);
    give_back_pooled(block);
    CHECK(unused_pool_bytes() <= 70 * kMiB);
  }
  release_pool();
}

void test_threads() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([i, &wrong] {
      for (size_t round = 0; round < 50; ++round) {
        const size_t bytes = (1 + (round + size_t(i)) % 3) * kMiB;
        unsigned char* data = static_cast<unsigned char*>(take_pooled(bytes));
        data[0] = data[bytes - 1] = static_cast<unsigned char>(i);
        std::this_thread::yield();
        wrong += data[0] != i || data[bytes - 1] != i;
        give_back_pooled(data);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0, "%d times two threads had the same block", wrong.load());
  release_pool();
  CHECK(unused_pool_bytes() == 0);
}

}  // namespace

int main() {
  return run_tests([] {
    test_reuse();
    test_bound();
    test_threads();
  });
}
