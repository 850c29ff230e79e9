// One step of decoding in one launch: a cell, or a cell and the attention that its new state queries.
//
// Nothing is allocated, synchronised or read on the host, so both may be captured in a CUDA graph. S is the storage
// type (float, Bf16, F16; void for callers that do not know it); sums and c are float. Results are deterministic, and a
// row's do not depend on the rest of the batch. step.cuh and step_attention.cuh have the kernels.
#pragma once

#include <cstdint>

#include "cells/cell.h"

namespace rnnkern::cuda {

template <class S>
struct CellStep {
  int B, I, H;
  const S* x;      // [B, I]
  const S* h;      // [B, H]
  const float* c;  // [B, H] or null: a cell of one state
  const S* w_ih;   // [G*H, I]
  const S* w_hh;   // [G*H, H]
  const S* b_ih;   // [G*H] or null
  const S* b_hh;   // [G*H] or null
  S* h_next;       // [B, H]; not h, which other blocks still read: the launcher refuses it
  float* c_next;   // [B, H] or null; may be c
};

// [B, Tk, columns]: strides in elements, the columns of a row contiguous.
template <class S>
struct StepRows {
  const S* data;
  int64_t batch, time;
};

//   query = h', or w_query h'
//   score = scale query . key[k], or vector . tanh(query + key[k]), k < lengths
//   context = sum of softmax(score)_k value[k]; zero for a row without keys, and padding is never read
template <class S>
struct AttentionStep {
  CellStep<S> cell;
  int64_t Tk;
  int D, Dv;
  const S* w_query;        // [D, H], or null: then D = H
  StepRows<S> key;         // [B, Tk, D], as the score reads them: projected
  StepRows<S> value;       // [B, Tk, Dv]
  const S* vector;         // [D]: the additive score; null: dot
  float scale;             // of the dot score
  const int64_t* lengths;  // [B] or null: all Tk; what is beyond 0..Tk is taken as the nearest of these
  S* context;              // [B, Dv]
  float* query;            // [B, D], written on the way; so the next
  float* parts;        // [B, step_splits(Tk), Dv + 2]: sums of the values of some keys, their largest score, their sum
  unsigned* counters;  // [step_counters(B)]: zero before the launch and after it, so that no other launch clears it
};

constexpr int kStepKeys = 32;  // of one part
constexpr int kStepPhases = 3;

RNNKERN_FN int64_t step_splits(int64_t Tk) { return Tk <= kStepKeys ? 1 : (Tk + kStepKeys - 1) / kStepKeys; }
RNNKERN_FN int64_t step_counters(int64_t B) { return kStepPhases + B; }
// Floats of query and parts.
RNNKERN_FN int64_t step_scratch(int64_t B, int64_t Tk, int64_t D, int64_t Dv) {
  return B * (D + step_splits(Tk) * (Dv + 2));
}

}  // namespace rnnkern::cuda
