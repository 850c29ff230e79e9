#include "cpu/stack.h"

#include <algorithm>
#include <cstring>

#include "cpu/workspace.h"

namespace rnnkern {
namespace {

LayerInputs layer_inputs(const Stack& stack, const StackCall& call, const StackLayer& layer) {
  LayerInputs in{};
  in.dtype = stack.dtype;
  in.T = call.T;
  in.B = call.B;
  in.I = layer.I;
  in.H = stack.H;
  in.D = 1;
  in.weights[0] = layer.weights;
  in.packed = layer.packed;
  return in;
}

}  // namespace

double stack_work(const Stack& stack, int64_t T, int64_t B) {
  double inputs = 0;
  for (const StackLayer& layer : stack.layers) inputs += double(layer.I + stack.H);
  return inputs * double(T) * double(B) * double(cell_traits()[size_t(stack.cell)].gates) * double(stack.H);
}

bool run_stack(const Stack& stack, const StackCall& call, const ParallelFor& parallel) {
  for (const StackLayer& layer : stack.layers) {
    if (stale_pack(stack.cell, layer_inputs(stack, call, layer))) return false;
  }
  const size_t L = stack.layers.size(), state = size_t(call.B * stack.H * dtype_size(stack.dtype)),
               sequence = L > 1 && call.T > 1 ? size_t(call.T) * state : 0;
  const bool two_states = call.c_n != nullptr, in_place = call.h0 == call.h_n;
  char *zeros = nullptr, *h_copy = nullptr, *c_copy = nullptr, *between[2] = {};
  size_t bytes = 0;
  for (const bool counting : {true, false}) {
    Arena arena(counting || bytes == 0 ? nullptr : workspace(kStackSlot, bytes));
    if (!call.h0) zeros = arena.take<char>(state);
    if (in_place) {
      h_copy = arena.take<char>(L * state);
      if (two_states) c_copy = arena.take<char>(L * state);
    }
    for (char*& y : between) y = arena.take<char>(sequence);
    bytes = arena.used();
  }
  if (zeros) std::memset(zeros, 0, state);
  if (in_place) {  // the engines write their results before they have read all that they start from
    std::memcpy(h_copy, call.h0, L * state);
    if (two_states) std::memcpy(c_copy, call.c0, L * state);
  }
  const char* const h0 = zeros ? zeros : in_place ? h_copy : static_cast<const char*>(call.h0);
  const char* const c0 = zeros ? zeros : in_place ? c_copy : static_cast<const char*>(call.c0);
  const void* x = call.x;
  int64_t x_time = call.x_time, x_batch = call.x_batch;
  for (size_t l = 0; l < L; ++l) {
    const size_t at = l * state, from = zeros ? 0 : at;
    void* h_n = static_cast<char*>(call.h_n) + at;
    LayerInputs in = layer_inputs(stack, call, stack.layers[l]);
    in.x = x;
    in.x_time = x_time;
    in.x_batch = x_batch;
    in.h0 = h0 + from;
    in.c0 = two_states ? c0 + from : nullptr;
    LayerOutputs out{};
    // One step's output is its state: it is the next layer's input where it lies.
    out.y = l + 1 == L && call.y ? call.y : call.T == 1 ? h_n : between[l % 2];
    out.h_n = h_n;
    out.c_n = two_states ? static_cast<char*>(call.c_n) + at : nullptr;
    layer_forward(stack.cell, in, out, parallel, true);
    x = out.y;
    x_time = call.B * stack.H;
    x_batch = stack.H;
  }
  return true;
}

}  // namespace rnnkern
