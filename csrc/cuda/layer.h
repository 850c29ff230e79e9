// The recurrence of one layer on a GPU: what its engines take and give. No torch, no CUDA.
//
// x has been multiplied by W_ih before, dW and dX follow from dgx and dgh afterwards: large products, left to torch.
// Letters as elsewhere; N is the rows of all steps: T B, or those of packed rows. S is the storage type, C the compute
// type (float; double for float64).
#pragma once

#include <cstdint>
#include <cstring>

namespace rnnkern::cuda {

// Where the steps of each row lie. Direction 1 runs from each row's last step to its first.
struct Sequence {
  int64_t T, N;
  int B, D;
  const int64_t* lengths;  // [B] or null: all T
  const int64_t* offsets;  // [T + 1]: first row of each step, for packed rows; null: t B
  const uint8_t* resets;   // [T, B] or null: no state passes between t - 1 and t
};

template <class S, class C>
struct Forward {
  Sequence sequence;
  int H;
  const S* gx;       // [N, D, G*H]  W_ih x
  const S* w_hh[2];  // [G*H, H]
  const S* b_ih[2];  // [G*H] or null
  const S* b_hh[2];  // [G*H] or null
  const S* h0;       // [D, B, H]
  const C* c0;       // [D, B, H] or null: a cell of one state
  S* y;              // [N, D*H]; past a row's end it is left alone
  S* h_n;            // [D, B, H]
  C* c_n;            // [D, B, H] or null
  C* c_all;          // [N, D*H] or null: not wanted
  S* saved;          // [N, D, kSaved, H] or null: no backward follows
  C* c_before;       // [N, D, H] or null: c before the step; with `saved`
};

template <class S, class C>
struct Backward {
  Sequence sequence;
  int H;
  const S* w_hh[2];   // [G*H, H]
  const S* dy;        // [N, D*H] or null: zero; so the next four
  const S* dh_n;      // [D, B, H]
  const C* dc_n;      // [D, B, H]
  const C* dh_carry;  // [D, B, H]: takes the place of dh_n, in more digits
  const C* dc_all;    // [N, D*H]
  const S* saved;     // as forward left them; so the next
  const C* c_before;
  const S* h_before;  // [N, D, H]: h before each step
  double clip;        // limit of each element of dgx and dgh; 0: none
  S* dgx;             // [N, D, G*H]; past a row's end left alone; so the next
  S* dgh;             // [N, D, G*H]; the same memory as dgx for cells without split gates
  C* dh0;             // [D, B, H]
  C* dc0;             // [D, B, H] or null
};

// The same with types in the place of void, which the callers' side does not know.
template <class Typed, class Untyped>
Typed typed(const Untyped& arguments) {
  static_assert(sizeof(Typed) == sizeof(Untyped), "");
  Typed result;
  std::memcpy(static_cast<void*>(&result), &arguments, sizeof(Typed));
  return result;
}

}  // namespace rnnkern::cuda
