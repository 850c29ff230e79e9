// The stepwise engine: torch multiplies h by W_hh, one kernel per step does the rest. Any size, any dtype.
//
//   begin           h, c <- h0, c0, as the first step reads them
//   step s          gh = h W_hh^T by torch, then next_step: gates, new state, y
//   backward        for s from the last: step_backward, and dh = dgh W_hh by torch; end_backward
//
// A thread owns one unit of one row and direction. Rows past their end keep what they have.
#pragma once

#include "cuda/real.h"
#include "cuda/sequence.cuh"
#include "cuda/stepwise.h"

namespace rnnkern::cuda {

// Unit u of row b in direction d, from a thread's place in the grid; false past the last.
struct Unit {
  int d, b, u;
  int64_t at;  // in [D, B, H]
  RNNKERN_DEVICE bool locate(const Sequence& sequence, int H) {
    at = int64_t(block_index()) * block_threads() + thread_index();
    if (at >= int64_t(sequence.D) * sequence.B * H) return false;
    u = int(at % H);
    b = int(at / H % sequence.B);
    d = int(at / H / sequence.B);
    return true;
  }
};

template <class C, class S>
RNNKERN_DEVICE C widen(S value) {
  if constexpr (std::is_same_v<S, double>)
    return value;
  else
    return to_float(value);
}
template <class S, class C>
RNNKERN_DEVICE S narrow(C value) {
  if constexpr (std::is_same_v<S, double>)
    return value;
  else
    return from_float<S>(value);
}

template <class S, class C>
RNNKERN_KERNEL(kStepThreads, 1)
begin(RNNKERN_ARGUMENT StepForward<S, C> a) {
  const Sequence& sequence = a.forward.sequence;
  Unit unit;
  if (!unit.locate(sequence, a.forward.H)) return;
  const Row row(sequence, unit.d, unit.b);
  const S h = load(a.forward.h0 + unit.at);
  const bool zero = row.starts(sequence, 0);
  store(a.h + unit.at, zero ? narrow<S>(C(0)) : h);
  if (row.length == 0) store(a.forward.h_n + unit.at, h);
  if (!a.c) return;
  const C c = load(a.forward.c0 + unit.at);
  store(a.c + unit.at, zero ? C(0) : c);
  if (row.length == 0) store(a.forward.c_n + unit.at, c);
}

template <class Cell, class S, class C>
RNNKERN_KERNEL(kStepThreads, 1)
next_step(RNNKERN_ARGUMENT StepForward<S, C> a) {
  constexpr int G = Cell::kGates;
  using R = Real<C>;
  const Forward<S, C>& f = a.forward;
  const Sequence& sequence = f.sequence;
  Unit unit;
  if (!unit.locate(sequence, f.H)) return;
  const Row row(sequence, unit.d, unit.b);
  if (a.step >= row.length) return;
  const int64_t H = f.H, place = row.place(sequence, a.step), at_d = place * sequence.D + unit.d;
  const int64_t states = int64_t(sequence.B) * H;

  R gx[G], gh[G], state[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
  for (int g = 0; g < G; ++g) {
    gx[g] = widen<C>(load(f.gx + (at_d * G + g) * H + unit.u));
    gh[g] = load(a.gh + unit.d * states * G + (int64_t(unit.b) * G + g) * H + unit.u);
    if (f.b_ih[unit.d]) gx[g] = gx[g] + R(widen<C>(load(f.b_ih[unit.d] + g * H + unit.u)));
    if (f.b_hh[unit.d]) gh[g] = gh[g] + R(widen<C>(load(f.b_hh[unit.d] + g * H + unit.u)));
  }
  state[0] = widen<C>(load(a.h + unit.at));
  if constexpr (Cell::kStates > 1) state[1] = load(a.c + unit.at);
  Cell::forward(gx, gh, state, next, saved);

  const S h = narrow<S>(next[0].value);
  const int64_t out = place * sequence.D * H + unit.d * H + unit.u;
  store(f.y + out, h);
  if (f.saved) {
    for (int i = 0; i < Cell::kSaved; ++i)
      store_streaming(f.saved + (at_d * Cell::kSaved + i) * H + unit.u, narrow<S>(saved[i].value));
  }
  const bool last = a.step + 1 == row.length, zero = !last && row.starts(sequence, a.step + 1);
  if (last) store(f.h_n + unit.at, h);
  store(a.h + unit.at, zero ? narrow<S>(C(0)) : h);
  if constexpr (Cell::kStates > 1) {
    if (f.saved) store_streaming(f.c_before + at_d * H + unit.u, state[1].value);
    if (f.c_all) store_streaming(f.c_all + out, next[1].value);
    if (last) store(f.c_n + unit.at, next[1].value);
    store(a.c + unit.at, zero ? C(0) : next[1].value);
  }
}

// h before each step, [N, D, H]: y of the step before it, h0 at the first, zero where an episode starts.
template <class S>
RNNKERN_KERNEL(kStepThreads, 1)
previous_h(RNNKERN_ARGUMENT PreviousH<S> a) {
  const Sequence& sequence = a.sequence;
  const int64_t at = int64_t(block_index()) * block_threads() + thread_index(), H = a.H;
  const int64_t rows = int64_t(sequence.D) * sequence.T * sequence.B;
  if (at >= rows * H) return;
  const int64_t u = at % H, step = at / H / sequence.B % sequence.T;
  const int b = int(at / H % sequence.B), d = int(at / H / sequence.B / sequence.T);
  const Row row(sequence, d, b);
  if (step >= row.length) {
    if (!sequence.offsets) store(a.h_before + ((step * sequence.B + b) * sequence.D + d) * H + u, narrow<S>(0.0f));
    return;
  }
  S h;
  if (row.starts(sequence, step))
    h = narrow<S>(0.0f);
  else if (step == 0)
    h = load(a.h0 + (int64_t(d) * sequence.B + b) * H + u);
  else
    h = load(a.y + row.place(sequence, step - 1) * sequence.D * H + d * H + u);
  store(a.h_before + (row.place(sequence, step) * sequence.D + d) * H + u, h);
}

// x with zeros past each row's end, where it may hold anything.
template <class S>
RNNKERN_KERNEL(kStepThreads, 1)
without_padding(RNNKERN_ARGUMENT WithoutPadding<S> a) {
  const int64_t at = int64_t(block_index()) * block_threads() + thread_index(), place = at / a.I;
  if (place >= a.sequence.N) return;
  const bool padding = place / a.sequence.B >= load(a.sequence.lengths + place % a.sequence.B);
  store(a.out + at, padding ? narrow<S>(0.0f) : load(a.x + at));
}

// dL/dh after a row's last step.
template <class S, class C>
RNNKERN_DEVICE C last_dh(const Backward<S, C>& w, int64_t at) {
  return w.dh_carry ? load(w.dh_carry + at) : w.dh_n ? widen<C>(load(w.dh_n + at)) : C(0);
}

template <class Cell, class S, class C>
RNNKERN_KERNEL(kStepThreads, 1)
step_backward(RNNKERN_ARGUMENT StepBackward<S, C> a) {
  constexpr int G = Cell::kGates;
  using R = Real<C>;
  const Backward<S, C>& w = a.backward;
  const Sequence& sequence = w.sequence;
  Unit unit;
  if (!unit.locate(sequence, w.H)) return;
  const Row row(sequence, unit.d, unit.b);
  const int64_t H = w.H, states = int64_t(sequence.B) * H;
  S* const dgh_step = a.dgh_step + unit.d * states * G + int64_t(unit.b) * G * H + unit.u;
  if (a.step >= row.length) {
    for (int g = 0; g < G; ++g) store(dgh_step + g * H, narrow<S>(C(0)));
    return;
  }
  const int64_t place = row.place(sequence, a.step), at_d = place * sequence.D + unit.d;
  const int64_t out = place * sequence.D * H + unit.d * H + unit.u;

  R state[Cell::kStates], dnext[Cell::kStates], saved[Cell::kSaved], dgx[G], dgh[G], dstate[Cell::kStates];
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = widen<C>(load(w.saved + (at_d * Cell::kSaved + i) * H + unit.u));
  state[0] = widen<C>(load(w.h_before + at_d * H + unit.u));
  C dh = 0, dc = 0;
  if (a.step + 1 == row.length) {
    dh = last_dh(w, unit.at);
    if (Cell::kStates > 1 && w.dc_n) dc = load(w.dc_n + unit.at);
  } else if (!row.starts(sequence, a.step + 1)) {
    dh = load(a.dh_product + unit.at) + load(a.dh_direct + unit.at);
    if (Cell::kStates > 1) dc = load(a.dc + unit.at);
  }
  if (w.dy) dh += widen<C>(load(w.dy + out));
  dnext[0] = dh;
  if constexpr (Cell::kStates > 1) {
    state[1] = load(w.c_before + at_d * H + unit.u);
    if (w.dc_all) dc += load(w.dc_all + out);
    dnext[1] = dc;
  }
  Cell::backward(saved, state, dnext, dgx, dgh, dstate);

  for (int g = 0; g < G; ++g) {
    C x = dgx[g].value, h = dgh[g].value;
    const C clip = C(w.clip);
    if (clip > 0) {
      x = x > clip ? clip : x < -clip ? -clip : x;  // NaN stays NaN
      h = h > clip ? clip : h < -clip ? -clip : h;
    }
    const int64_t at = (at_d * G + g) * H + unit.u;
    if (Cell::kSplitGates > 0) store_streaming(w.dgx + at, narrow<S>(x));
    store_streaming(w.dgh + at, narrow<S>(h));
    store(dgh_step + g * H, narrow<S>(h));
  }
  store(a.dh_direct + unit.at, dstate[0].value);
  if constexpr (Cell::kStates > 1) store(a.dc + unit.at, dstate[1].value);
}

// dh0 and dc0, after the product of step 0.
template <class S, class C>
RNNKERN_KERNEL(kStepThreads, 1)
end_backward(RNNKERN_ARGUMENT StepBackward<S, C> a) {
  const Backward<S, C>& w = a.backward;
  Unit unit;
  if (!unit.locate(w.sequence, w.H)) return;
  const Row row(w.sequence, unit.d, unit.b);
  C dh = 0, dc = 0;
  if (row.length == 0) {
    dh = last_dh(w, unit.at);
    if (w.dc0 && w.dc_n) dc = load(w.dc_n + unit.at);
  } else if (!row.starts(w.sequence, 0)) {
    dh = load(a.dh_product + unit.at) + load(a.dh_direct + unit.at);
    if (w.dc0) dc = load(a.dc + unit.at);
  }
  store(w.dh0 + unit.at, dh);
  if (w.dc0) store(w.dc0 + unit.at, dc);
}

}  // namespace rnnkern::cuda
