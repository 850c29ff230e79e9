// A layer in double, written as the definition reads: one row after another, one unit after another.
#pragma once

#include <algorithm>
#include <vector>

#include "cells/cell.h"

namespace rnnkern_test {

using Vector = std::vector<double>;

struct Problem {
  int64_t T, B, I, H;
  int D;
  std::vector<int64_t> lengths;  // [B]
  std::vector<uint8_t> resets;   // [T, B] or empty
  Vector x, h0, c0;              // [T, B, I], [D, B, H], [D, B, H]
  Vector w_ih[2], w_hh[2], b_ih[2], b_hh[2];
  double clip = 0;  // as in LayerGradients
};

struct Result {
  Vector y, h_n, c_n, c_all;
  Vector dx, dh0, dc0, dw_ih[2], dw_hh[2], db_ih[2], db_hh[2];
};

struct OutputGradients {
  Vector dy, dh_n, dc_n, dc_all;
};

template <class Cell>
Result reference_layer(const Problem& p, const OutputGradients& out) {
  constexpr int G = Cell::kGates, S = Cell::kStates;
  const int64_t T = p.T, B = p.B, I = p.I, H = p.H, D = p.D;
  Result r;
  r.y.assign(size_t(T * B * D * H), 0.0);
  r.c_all = r.y;
  r.h_n = p.h0;
  r.c_n = p.c0;
  r.dx.assign(size_t(T * B * I), 0.0);
  r.dh0.assign(p.h0.size(), 0.0);
  r.dc0 = r.dh0;
  for (int64_t d = 0; d < D; ++d) {
    r.dw_ih[d].assign(size_t(G * H * I), 0.0);
    r.dw_hh[d].assign(size_t(G * H * H), 0.0);
    r.db_ih[d].assign(size_t(G * H), 0.0);
    r.db_hh[d] = r.db_ih[d];
    for (int64_t b = 0; b < B; ++b) {
      const int64_t n = p.lengths[b];
      const auto time = [&](int64_t step) { return d == 0 ? step : n - 1 - step; };
      // The reverse direction runs the same episodes from their ends.
      const auto fresh = [&](int64_t step) {
        const int64_t t = time(step), boundary = d == 0 ? t : t + 1;
        return !p.resets.empty() && boundary < n && p.resets[size_t(boundary * B + b)] != 0;
      };
      std::vector<Vector> before[S];  // [state][step]: state before the step
      std::vector<Vector> saved(static_cast<size_t>(n), Vector(size_t(H * Cell::kSaved)));
      Vector state[S];
      for (int s = 0; s < S; ++s) {
        const Vector& from = s == 0 ? p.h0 : p.c0;
        state[s].assign(from.begin() + (d * B + b) * H, from.begin() + (d * B + b + 1) * H);
      }
      for (int64_t step = 0; step < n; ++step) {
        const int64_t t = time(step);
        for (int s = 0; s < S; ++s) {
          if (fresh(step)) state[s].assign(size_t(H), 0.0);
          before[s].push_back(state[s]);
        }
        for (int64_t u = 0; u < H; ++u) {
          double gx[G], gh[G], old[S], next[S], kept[Cell::kSaved];
          for (int g = 0; g < G; ++g) {
            const int64_t row = g * H + u;
            gx[g] = p.b_ih[d][row];
            gh[g] = p.b_hh[d][row];
            for (int64_t k = 0; k < I; ++k) gx[g] += p.w_ih[d][row * I + k] * p.x[(t * B + b) * I + k];
            for (int64_t k = 0; k < H; ++k) gh[g] += p.w_hh[d][row * H + k] * before[0][step][k];
          }
          for (int s = 0; s < S; ++s) old[s] = before[s][step][u];
          Cell::forward(gx, gh, old, next, kept);
          for (int s = 0; s < S; ++s) state[s][u] = next[s];
          for (int k = 0; k < Cell::kSaved; ++k) saved[step][u * Cell::kSaved + k] = kept[k];
        }
        for (int64_t u = 0; u < H; ++u) {
          r.y[((t * B + b) * D + d) * H + u] = state[0][u];
          if (S > 1) r.c_all[((t * B + b) * D + d) * H + u] = state[S - 1][u];
        }
      }
      Vector dstate[S];
      for (int s = 0; s < S; ++s) {
        Vector& final_state = s == 0 ? r.h_n : r.c_n;
        const Vector& gradient = s == 0 ? out.dh_n : out.dc_n;
        for (int64_t u = 0; u < H; ++u) {
          final_state[(d * B + b) * H + u] = state[s][u];
          dstate[s].push_back(gradient[(d * B + b) * H + u]);
        }
      }
      for (int64_t step = n - 1; step >= 0; --step) {
        const int64_t t = time(step);
        Vector dh(static_cast<size_t>(H), 0.0);
        for (int64_t u = 0; u < H; ++u) {
          double kept[Cell::kSaved], old[S], dnext[S], dgx[G], dgh[G], dold[S];
          const int64_t at = ((t * B + b) * D + d) * H + u;
          for (int s = 0; s < S; ++s) {
            old[s] = before[s][step][u];
            dnext[s] = dstate[s][u] + (s == 0 ? out.dy[at] : out.dc_all[at]);
          }
          for (int k = 0; k < Cell::kSaved; ++k) kept[k] = saved[step][u * Cell::kSaved + k];
          Cell::backward(kept, old, dnext, dgx, dgh, dold);
          for (int g = 0; g < G; ++g) {
            if (p.clip > 0) {
              dgx[g] = std::min(std::max(dgx[g], -p.clip), p.clip);
              dgh[g] = std::min(std::max(dgh[g], -p.clip), p.clip);
            }
            const int64_t row = g * H + u;
            r.db_ih[d][row] += dgx[g];
            r.db_hh[d][row] += dgh[g];
            for (int64_t k = 0; k < I; ++k) {
              r.dw_ih[d][row * I + k] += dgx[g] * p.x[(t * B + b) * I + k];
              r.dx[(t * B + b) * I + k] += dgx[g] * p.w_ih[d][row * I + k];
            }
            for (int64_t k = 0; k < H; ++k) {
              r.dw_hh[d][row * H + k] += dgh[g] * before[0][step][k];
              dh[k] += dgh[g] * p.w_hh[d][row * H + k];
            }
          }
          for (int s = 0; s < S; ++s) dstate[s][u] = dold[s];
        }
        for (int64_t u = 0; u < H; ++u) dstate[0][u] += dh[u];
        for (int s = 0; s < S; ++s) {
          if (fresh(step)) dstate[s].assign(size_t(H), 0.0);
        }
      }
      for (int64_t u = 0; u < H; ++u) {
        r.dh0[(d * B + b) * H + u] = dstate[0][u];
        if (S > 1) r.dc0[(d * B + b) * H + u] = dstate[S - 1][u];
      }
    }
  }
  return r;
}

}  // namespace rnnkern_test
