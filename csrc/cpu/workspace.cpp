#include "cpu/workspace.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rnnkern {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kSlots = 2;

std::atomic<bool> poison_on{false};

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  ~Block() { std::free(data); }
};

}  // namespace

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void set_poison(bool on) { poison_on.store(on, std::memory_order_relaxed); }

void poison(void* data, size_t bytes) {
  if (bytes && poison_on.load(std::memory_order_relaxed)) std::memset(data, 0xff, bytes);
}

void* workspace(int slot, size_t bytes) {
  thread_local Block blocks[kSlots];
  Block& block = blocks[slot];
  if (block.bytes < bytes) {
    std::free(block.data);
    block = Block{};
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    block.data = std::aligned_alloc(alignment, rounded);
    if (!block.data) throw std::bad_alloc();
    block.bytes = rounded;
    if (rounded >= kWorthHugePages) prefer_huge_pages(block.data, rounded);
  }
  poison(block.data, bytes);
  return block.data;
}

}  // namespace rnnkern
