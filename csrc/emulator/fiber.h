// Fibers: functions that run in turn on one thread, each on a stack of its own. Part of emulator.cpp.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <vector>

#include "emulator/emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define RNNKERN_FIBER_SANITIZER 1
#endif

namespace rnnkern::emulator {

constexpr size_t kStackReserve = 4 << 10;  // below which a stack has overflowed, though nothing is overwritten yet

// Saves the callee's registers, exchanges stacks.
extern "C" void rnnkern_switch_fiber(void** from, void* to);
#if defined(__x86_64__)
__asm__(
    ".text\n.local rnnkern_switch_fiber\n.type rnnkern_switch_fiber,@function\nrnnkern_switch_fiber:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size rnnkern_switch_fiber,.-rnnkern_switch_fiber\n");
constexpr int kSavedRegisters = 6;
#else
#error "the emulator switches stacks by hand, and knows how on x86-64 only"
#endif

// Stacks are kept for the next launch: mapping and clearing them takes longer than small kernels run. They are mapped
// many at a time, since the kernel limits the number of mappings to less than the threads of a large grid.
class Stacks {
 public:
  unsigned char* take() {
    if (free_.empty()) map();
    unsigned char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give_back(unsigned char* stack) {
#ifdef RNNKERN_FIBER_SANITIZER
    __asan_unpoison_memory_region(stack, kStack);  // frames of threads that were given up
#endif
    free_.push_back(stack);
  }
  ~Stacks() {
    for (void* slab : slabs_) munmap(slab, kSlab);
  }

 private:
  static constexpr size_t kSlab = 128 * kStack;

  void map() {
    void* slab = mmap(nullptr, kSlab, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw Error("emulator: no memory for the stacks of so many threads");
    slabs_.push_back(slab);
    for (size_t at = kSlab; at > 0; at -= kStack) free_.push_back(static_cast<unsigned char*>(slab) + at - kStack);
  }

  std::vector<void*> slabs_;
  std::vector<unsigned char*> free_;
};

// The stack that resumes fibers.
struct MainStack {
  void* pointer = nullptr;
  [[maybe_unused]] const void* bottom = nullptr;
  [[maybe_unused]] size_t bytes = 0;
};

// `entry` must call entered() first, and suspend() for good last.
class Fiber {
 public:
  void start(Stacks& stacks, size_t number, void (*entry)()) {
    stack_ = stacks.take();
    // Stacks begin at different cache sets: else those of a warp's lanes would push each other out.
    void** top = reinterpret_cast<void**>(stack_ + kStack - number * 576 % 4096);
    *--top = nullptr;  // a return address that nobody uses, and the alignment that a call leaves
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    pointer_ = top;
  }
  void give_back(Stacks& stacks) { stacks.give_back(stack_); }

  void resume(MainStack& main) {
#ifdef RNNKERN_FIBER_SANITIZER
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, kStack);
#endif
    rnnkern_switch_fiber(&main.pointer, pointer_);
#ifdef RNNKERN_FIBER_SANITIZER
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }
  static void entered([[maybe_unused]] MainStack& main) {
#ifdef RNNKERN_FIBER_SANITIZER
    __sanitizer_finish_switch_fiber(nullptr, &main.bottom, &main.bytes);
#endif
  }
  void suspend(MainStack& main, [[maybe_unused]] bool for_good) {
#ifdef RNNKERN_FIBER_SANITIZER
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, main.bottom, main.bytes);
#endif
    rnnkern_switch_fiber(&pointer_, main.pointer);
#ifdef RNNKERN_FIBER_SANITIZER
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  bool overflowed() const { return static_cast<unsigned char*>(pointer_) < stack_ + kStackReserve; }

 private:
  void* pointer_ = nullptr;
  unsigned char* stack_ = nullptr;
  [[maybe_unused]] void* fake_stack_ = nullptr;
};

}  // namespace rnnkern::emulator
