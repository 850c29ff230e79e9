// Between layer.cpp, which plans a call, and the engines, which are compiled once per instruction set.
#pragma once

#include "cpu/layer.h"

namespace rnnkern {

// What every member of the team needs to know about a call.
struct LayerPlan {
  const LayerInputs* in;
  int64_t steps;             // the longest length
  const int32_t* order;      // [B] batch rows, longest first
  const int64_t* length;     // [B] their lengths
  const int32_t* alive;      // [steps] rows with length > t
  const int64_t* first_row;  // [steps + 1] rows alive before step t, all steps added
  bool pack;                 // whether weights are packed beforehand; else block by block as they are used
  int members;               // the most that the team may have
  Flag* flags;               // [members], zero
  void* packed;  // weights, as LayerKernels::pack or pack_transposed writes them; null: packed as they are used
  void* workspace;
};

struct LayerKernels {
  // Elements of the compute type of one direction's packed weights, and packing of unit blocks [begin, end).
  int64_t (*packed_size)(const LayerInputs& in);
  void (*pack)(const LayerInputs& in, int d, int64_t begin, int64_t end, void* packed);
  size_t (*forward_bytes)(const LayerPlan& plan);
  void (*forward)(const LayerPlan& plan, const LayerOutputs& out, const Member& member);
  // Backward's packed weights are transposed: panels [begin, end) of `panels` for direction d.
  size_t (*backward_bytes)(const LayerPlan& plan);
  int64_t (*backward_panels)(const LayerInputs& in);
  int64_t (*backward_panel_bytes)(const LayerInputs& in);
  void (*pack_transposed)(const LayerPlan& plan, int d, int64_t begin, int64_t end);
  void (*backward)(const LayerPlan& plan, const LayerGradients& grad, const Member& member);
  // Adds up what the directions left in the workspace and rounds to storage: time steps [begin, end) of dx, and (for
  // begin = 0) the weight gradients.
  void (*finish_backward)(const LayerPlan& plan, const LayerGradients& grad, int64_t begin, int64_t end);
};

}  // namespace rnnkern
