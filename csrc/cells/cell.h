// What a cell is. A cell is a struct of constants and two pointwise functions; the engines are templates over it.
//
//   kGates        gates, in the order of torch's stacked weight rows
//   kStates       states; state 0 is h, the one that the recurrent product reads and that is the output
//   kSaved        values that forward keeps for backward, per unit, besides the states
//   kSplitGates   how many of the last gates have dL/dgh != dL/dgx (GRU: n); backward must give equal values for the
//   rest forward(gx, gh, state, next, saved)              gx = W_ih x + b_ih, gh = W_hh h + b_hh backward(saved, state,
//   dnext, dgx, dgh, dstate)  dstate leaves out the path through W_hh, which the engine adds
//
// V is double, a SIMD vector, or a CUDA float. sigmoid, tanh, relu, unless_negative and fma are found by
// argument-dependent lookup (scalar versions below). Names are the field's: https://arxiv.org/abs/1412.3555.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define RNNKERN_FN __host__ __device__ __forceinline__
#else
#define RNNKERN_FN inline __attribute__((always_inline))
#endif

namespace rnnkern {

RNNKERN_FN double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
RNNKERN_FN double relu(double x) { return x < 0.0 ? 0.0 : x; }                                // NaN stays NaN
RNNKERN_FN double unless_negative(double x, double value) { return x <= 0.0 ? 0.0 : value; }  // relu's gradient at x
using std::fma;
using std::tanh;

}  // namespace rnnkern
