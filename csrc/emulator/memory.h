// What a kernel may touch: global memory that was registered, and the shared memory of its cluster. Part of
// emulator.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "emulator/emulator.h"

namespace rnnkern::emulator {

namespace {

struct Range {
  const unsigned char* data;
  size_t bytes;
};
thread_local std::vector<Range> global_memory;
thread_local size_t last_found = 0;  // in global_memory

bool inside(const void* address, size_t bytes, const void* start, size_t size) {
  const auto at = reinterpret_cast<uintptr_t>(address), from = reinterpret_cast<uintptr_t>(start);
  return at >= from && at + bytes <= from + size;
}

bool inside_global(const void* address, size_t bytes) {
  if (last_found < global_memory.size() &&
      inside(address, bytes, global_memory[last_found].data, global_memory[last_found].bytes))
    return true;
  for (size_t i = 0; i < global_memory.size(); ++i) {
    if (!inside(address, bytes, global_memory[i].data, global_memory[i].bytes)) continue;
    last_found = i;
    return true;
  }
  return false;
}

// In the shared memory of a block of the cluster that runs.
bool inside_shared(const void* address, size_t bytes) {
  for (const Block& block : current->block->cluster->blocks) {
    if (!inside(address, bytes, block.shared, grid().shared_bytes)) continue;
    if (block.begun && block.returned < grid().threads) return true;
    fail("access to the shared memory of block " + std::to_string(block.index) +
         (block.begun ? ", which has returned" : ", which has not begun: no sync_cluster came before"));
  }
  return false;
}

// The memory that the address is in or closest to.
std::string whereabouts(const void* address) {
  intptr_t nearest = 4096;
  std::string text;
  const auto consider = [&](const void* start, size_t bytes, const std::string& what) {
    const intptr_t distance = reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(start);
    const intptr_t outside = distance < 0 ? -distance : std::max(distance - intptr_t(bytes), intptr_t(0));
    if (outside >= nearest) return;
    nearest = outside;
    text = ", " + std::to_string(distance) + " bytes from the start of " + std::to_string(bytes) + " bytes of " + what;
  };
  for (const Block& block : current->block->cluster->blocks)
    consider(block.shared, grid().shared_bytes, "shared memory of block " + std::to_string(block.index));
  for (const Range& range : global_memory) consider(range.data, range.bytes, "global memory");
  return text;
}

}  // namespace

GlobalMemory::~GlobalMemory() { global_memory.resize(global_memory.size() - count_); }

void GlobalMemory::add(const void* data, size_t bytes) {
  for (const Range& range : global_memory) {
    if (inside(data, bytes, range.data, range.bytes)) return;  // callers name a tensor at every step
  }
  global_memory.push_back({static_cast<const unsigned char*>(data), bytes});
  ++count_;
}

void check_access(const void* address, size_t bytes, size_t alignment, bool write, Space space) {
  const auto describe = [&] {
    char text[32];
    std::snprintf(text, sizeof text, "%p", address);
    return std::string(write ? "write of " : "read of ") + std::to_string(bytes) + " bytes at " + text +
           whereabouts(address);
  };
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("misaligned: " + describe());
  const bool own = inside(address, bytes, current->block->shared, grid().shared_bytes);
  if (space == Space::own_shared && !own) fail("not in the block's own shared memory: " + describe());
  if (own && space != Space::global) return;
  if (bytes == 0 || inside_global(address, bytes)) return;
  if (own || inside_shared(address, bytes)) {
    if (space == Space::global) fail("not in global memory: " + describe());
    return;
  }
  fail("out of bounds: " + describe());
}

}  // namespace rnnkern::emulator
