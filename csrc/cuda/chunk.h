// A layer of one direction in pieces of time: each is a sequence of its own, that starts from the state in which the
// one before it ended. Same arithmetic as in one piece, to the last bit.
//
// The state between pieces lies where the layer's last one goes: forward reads h_n and writes it again, backward dh0.
// A thread reads its unit before it writes it, and no other does.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/layer.h"

namespace rnnkern::cuda {

struct Chunk {
  int64_t first_step, first_row;  // of the layer
  bool last;
  Sequence sequence;  // lengths and offsets are for the caller to set, where the layer has them
};

// `lengths`: [B] on the host, or null; `longest` of them, or T; at most that many chunks.
inline std::vector<Chunk> cut_steps(const Sequence& whole, const int64_t* lengths, int64_t longest, int64_t chunks) {
  const auto rows_before = [&](int64_t step) {
    if (!whole.offsets) return step * whole.B;
    int64_t rows = 0;
    for (int b = 0; b < whole.B; ++b) rows += std::min(lengths[b], step);
    return rows;
  };
  std::vector<Chunk> cut;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = longest * c / chunks, end = longest * (c + 1) / chunks;
    Chunk chunk{first, rows_before(first), c == chunks - 1, whole};
    chunk.sequence.T = end - first;
    chunk.sequence.N = rows_before(end) - chunk.first_row;
    if (whole.resets) chunk.sequence.resets += first * whole.B;
    cut.push_back(chunk);
  }
  return cut;
}

// Steps of each row in the chunk, [B].
inline std::vector<int64_t> lengths_in(const Chunk& chunk, const int64_t* lengths) {
  std::vector<int64_t> within;
  for (int b = 0; b < chunk.sequence.B; ++b)
    within.push_back(std::min(std::max<int64_t>(lengths[b] - chunk.first_step, 0), chunk.sequence.T));
  return within;
}

// Bytes that a unit of a step takes in each kind of array.
struct UnitBytes {
  int64_t storage, compute, gates, saved;  // one value; one value; of gx, dgx and dgh; of what the cell saves
};

template <class Void>                          // void or const void
void advance(Void*& pointer, int64_t bytes) {  // null stays null
  if (pointer) pointer = static_cast<char*>(const_cast<void*>(pointer)) + bytes;
}

inline Forward<void, void> part_of(const Forward<void, void>& whole, const Chunk& chunk, const UnitBytes& bytes) {
  Forward<void, void> part = whole;
  const int64_t units = chunk.first_row * whole.H;
  part.sequence = chunk.sequence;
  advance(part.gx, units * bytes.gates);
  advance(part.y, units * bytes.storage);
  advance(part.c_all, units * bytes.compute);
  advance(part.saved, units * bytes.saved);
  advance(part.c_before, units * bytes.compute);
  if (chunk.first_step > 0) {
    part.h0 = whole.h_n;
    part.c0 = whole.c_n;
  }
  return part;
}

inline Backward<void, void> part_of(const Backward<void, void>& whole, const Chunk& chunk, const UnitBytes& bytes) {
  Backward<void, void> part = whole;
  const int64_t units = chunk.first_row * whole.H;
  part.sequence = chunk.sequence;
  advance(part.dy, units * bytes.storage);
  advance(part.dc_all, units * bytes.compute);
  advance(part.saved, units * bytes.saved);
  advance(part.c_before, units * bytes.compute);
  advance(part.h_before, units * bytes.storage);
  advance(part.dgx, units * bytes.gates);
  advance(part.dgh, units * bytes.gates);
  if (!chunk.last) {
    part.dh_carry = whole.dh0;
    part.dc_n = whole.dc0;
  }
  return part;
}

}  // namespace rnnkern::cuda
