#include "cpu/workspace.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace rnnkern {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

std::atomic<bool> poison_on{false};

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  ~Block() { std::free(data); }
};

// Large allocations on huge pages, but for what the last one would not fill; others on cache lines.
void* allocate(size_t bytes) {
  const bool large = bytes >= kWorthHugePages;
  void* data = nullptr;
  if (posix_memalign(&data, large ? kHugePage : kAlignment, bytes) != 0) throw std::bad_alloc();
  if (large) prefer_huge_pages(data, bytes);
  return data;
}

// Never waits for its lock: a thread that finds it taken (by another one, or in a forked child for ever) goes to the
// system's allocator.
class Pool {
 public:
  void* take(size_t bytes) {
    bytes += sizeof(Header);
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) {
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const bool fits = (*it)->bytes >= bytes && (*it)->bytes <= 2 * bytes;
        if (fits && (best == free_.end() || (*it)->bytes < (*best)->bytes)) best = it;
      }
      if (best != free_.end()) {
        Header* block = *best;
        free_.erase(best);
        unused_ -= block->bytes;
        return use(block);
      }
      const size_t needed = used_ + bytes, most = most_used_;
      shrink(most > needed ? most - needed : 0);
    }
    Header* block = static_cast<Header*>(allocate(bytes));
    block->bytes = bytes;
    return use(block);
  }

  void give_back(void* data) {
    Header* block = static_cast<Header*>(data) - 1;
    used_ -= block->bytes;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return std::free(block);
    free_.push_back(block);
    unused_ += block->bytes;
  }

  size_t unused() const { return unused_; }

  void release() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) shrink(0);
  }

 private:
  struct alignas(kAlignment) Header {
    size_t bytes;  // of the whole block
  };

  void* use(Header* block) {
    const size_t used = used_ += block->bytes;
    size_t most = most_used_;
    while (most < used && !most_used_.compare_exchange_weak(most, used)) continue;
    return block + 1;
  }

  // Frees the blocks that were given back first.
  void shrink(size_t to) {
    size_t count = 0;
    for (; unused_ > to; ++count) {
      unused_ -= free_[count]->bytes;
      std::free(free_[count]);
    }
    free_.erase(free_.begin(), free_.begin() + int64_t(count));
  }

  std::mutex mutex_;
  std::vector<Header*> free_;      // oldest first
  std::atomic<size_t> unused_{0};  // bytes in free_
  std::atomic<size_t> used_{0}, most_used_{0};
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: tensors may outlive static objects
  return *pool;
}

}  // namespace

void* take_pooled(size_t bytes) { return pool().take(bytes); }
void give_back_pooled(void* data) { pool().give_back(data); }
void release_pool() { pool().release(); }
size_t unused_pool_bytes() { return pool().unused(); }

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

void* workspace(Slot slot, size_t bytes) {
  thread_local Block blocks[kSlots];
  Block& block = blocks[slot];
  if (block.bytes < bytes) {
    std::free(block.data);
    block = Block{};
    block.data = allocate(bytes);
    block.bytes = bytes;
  }
  poison(block.data, bytes);
  return block.data;
}

}  // namespace rnnkern
