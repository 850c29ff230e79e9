// Memory that outlives a call: fresh pages cost more than the work done in them (about 0.24 ms per MiB), so scratch
// memory is kept by the thread that asked for it and reused, on huge pages where it is large.
#pragma once

#include <cstddef>

#include "cells/cell.h"  // RNNKERN_FN: forced inline, so that no instruction set's copy is shared

#include "cpu/isa.h"  // RNNKERN_API

namespace rnnkern {

constexpr size_t kAlignment = 128;

// At least `bytes` of uninitialised memory, valid until this thread's next call with the same slot.
enum Slot { kWorkspaceSlot, kPackedSlot, kStackSlot, kSlots };
void* workspace(Slot slot, size_t bytes);

// Memory for large tensors, uninitialised, from blocks that were given back before: what backward needs is as large in
// every training step, and its first touch takes as long as much of the step. What lies unused is kept only as long as
// it and what is in use together stay below the most that ever was in use; `release_pool` frees it.
void* take_pooled(size_t bytes);
void give_back_pooled(void* data);
RNNKERN_API void release_pool();
RNNKERN_API size_t unused_pool_bytes();
constexpr size_t kWorthPooling = size_t(1) << 20;

// Asks for huge pages below a fresh allocation: first touch is then ten times cheaper.
RNNKERN_API void prefer_huge_pages(void* data, size_t bytes);
constexpr size_t kWorthHugePages = size_t(2) << 20;

// For tests: fill what is given out uninitialised (workspaces, and the operators' outputs) with NaN.
RNNKERN_API void set_poison(bool on);
RNNKERN_API void poison(void* data, size_t bytes);  // does so if it is on

// Carves aligned arrays out of one block. Run it twice: with a null base to learn the size, then for real.
class Arena {
 public:
  RNNKERN_FN explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  RNNKERN_FN T* take(size_t count) {
    T* data = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return data;
  }
  RNNKERN_FN size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace rnnkern
