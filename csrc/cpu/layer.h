// One recurrent layer on the CPU, forward and backward, without torch: raw pointers, sizes, strides, injected threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/isa.h"  // RNNKERN_API
#include "cpu/team.h"

namespace rnnkern {

// S is the storage type of `dtype`, C its compute type (float, or double for f64).
struct LayerWeights {
  const void* w_ih;                // S [G*H, I], or int8; so the next
  const void* w_hh;                // S [G*H, H]
  const void* b_ih;                // S [G*H] or null
  const void* b_hh;                // S [G*H] or null
  const void* scale_ih = nullptr;  // S [G*H]: of f32w8, w_ih stands for scale_ih[row] * w_ih[row]; so the next
  const void* scale_hh = nullptr;  // S [G*H]
};

// Sequences of one length lie padded, [T, B, *], or packed as in torch's PackedSequence, [N, *]: the rows alive at t =
// 0, then those alive at t = 1, and so on, where rows are sorted by length, longest first. [T, B, *] below means
// either.
struct LayerInputs {
  Dtype dtype;
  int64_t T, B, I, H;
  int D;                    // directions
  bool packed_rows;         // x, y, c_all and their gradients are packed; needs lengths, has no resets
  const void* x;            // S [T, B, I], elements of a row contiguous
  int64_t x_time, x_batch;  // strides in elements
  const void* h0;           // S [D, B, H]
  const void* c0;           // C [D, B, H]; null for cells of one state
  LayerWeights weights[2];
  const int64_t* lengths;        // [B] or null: all T
  const uint8_t* resets;         // [T, B] or null
  const void* packed = nullptr;  // from pack_layer, or null
};

struct LayerOutputs {
  void* y;      // S [T, B, D*H]
  void* h_n;    // S [D, B, H]
  void* c_n;    // C [D, B, H] or null
  void* c_all;  // C [T, B, D*H] or null
  void* saved;  // C [saved_size] or null
};

struct LayerGradients {
  const void* dy;      // S [T, B, D*H] or null: zero; so the next three
  const void* dh_n;    // S [D, B, H]
  const void* dc_n;    // C [D, B, H]
  const void* dc_all;  // C [T, B, D*H]
  const void* y;       // what forward gave
  const void* saved;
  void* dx;   // S [T, B, I] or null: not wanted
  void* dh0;  // S [D, B, H] or null: neither dh0 nor dc0 is wanted
  void* dc0;  // C [D, B, H] or null
  struct Weights {
    void *dw_ih, *dw_hh, *db_ih, *db_hh;  // S, shapes of the weights; biases null where there are none
  } weights[2];
  bool need_dw;
  double clip;  // the gradient of every gate, dgx and dgh, is limited to [-clip, clip]; 0: not limited
};

// Multiply-adds from which a forward call is divided among threads, and among those that are awake.
constexpr double kSerialWork = 4e6, kWorthAwakeThreads = 2e5;

struct CellTraits {
  std::string name;
  int gates, states, saved, split_gates;
};
RNNKERN_API const std::vector<CellTraits>& cell_traits();
RNNKERN_API int find_cell(const std::string& name);  // index into cell_traits(); throws std::runtime_error

// Elements of C that forward keeps for backward: for each direction and step, of the rows alive then,
// [ceil(H/16)][row][(saved + states - 1) * 16]. There is room for T * B rows unless they are packed.
RNNKERN_API int64_t saved_size(int cell, const LayerInputs& in);
// Packed weights: elements of C. stale_pack compares a few sampled weights with those from which it was made.
RNNKERN_API int64_t packed_size(int cell, const LayerInputs& in);
void pack_layer(int cell, const LayerInputs& in, void* packed, const ParallelFor& parallel);
bool stale_pack(int cell, const LayerInputs& in);

RNNKERN_API void layer_forward(int cell, const LayerInputs& in, const LayerOutputs& out, const ParallelFor& parallel);
// The same for a caller that has asked stale_pack.
void layer_forward(int cell, const LayerInputs& in, const LayerOutputs& out, const ParallelFor& parallel,
                   bool packed_is_valid);
RNNKERN_API void layer_backward(int cell, const LayerInputs& in, const LayerGradients& grad,
                                const ParallelFor& parallel);

}  // namespace rnnkern
