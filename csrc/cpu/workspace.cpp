#include "cpu/workspace.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace rnnkern {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kSlots = 2;

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
  if (bytes >= 2 * kHugePage && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
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
    prefer_huge_pages(block.data, rounded);
  }
  return block.data;
}

}  // namespace rnnkern
