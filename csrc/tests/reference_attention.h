// Attention in plain double loops, and problems for it: what the tests of the CPU and of the CUDA kernels compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "cpu/attention.h"

namespace rnnkern_test {

using rnnkern::Score;

const double kNan = std::numeric_limits<double>::quiet_NaN();

inline double uniform() { return std::rand() / (RAND_MAX + 1.0) * 2 - 1; }

struct Case {
  Score score;
  int64_t B, Tq, Tk, D, Dv;
  double size;  // of the elements of query and key
  bool lengths, mask;
  bool strided = false;                   // elements after each row that nobody may touch
  bool dcontext = true, dweights = true;  // given
  bool weights = true;                    // asked for
};

// All arrays of one problem, in double; what is padding holds NaN.
struct Problem {
  Case c;
  double scale = 0.25;
  std::vector<double> q, k, v, vector, dcontext, dweights;
  std::vector<int64_t> lengths;
  std::vector<uint8_t> mask;

  bool valid(int64_t b, int64_t j) const { return !(c.lengths && j >= lengths[b]) && !(c.mask && mask[b * c.Tk + j]); }
};

// `round` gives the nearest value of the type that the kernels take.
template <class Round>
Problem make(const Case& c, const Round& round) {
  const auto random = [&](int64_t count, double size) {
    std::vector<double> x(count);
    for (double& value : x) value = round(uniform() * size);
    return x;
  };
  Problem p;
  p.c = c;
  p.q = random(c.B * c.Tq * c.D, c.size);
  p.k = random(c.B * c.Tk * c.D, c.size);
  p.v = random(c.B * c.Tk * c.Dv, 1);
  p.vector = random(c.D, 1);
  p.dcontext = random(c.B * c.Tq * c.Dv, 1);
  p.dweights = random(c.B * c.Tq * c.Tk, 1);
  for (int64_t b = 0; b < c.B; ++b) p.lengths.push_back((b * 7 + c.Tk / 2) % (c.Tk + 1));
  if (c.B > 1) p.lengths[1] = 0;
  for (int64_t i = 0; i < c.B * c.Tk; ++i) p.mask.push_back(i / c.Tk == 1 || uniform() < -0.3);  // row 1: all padding
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t j = 0; j < c.Tk; ++j) {
      if (p.valid(b, j)) continue;
      std::fill_n(p.k.begin() + (b * c.Tk + j) * c.D, c.D, kNan);
      std::fill_n(p.v.begin() + (b * c.Tk + j) * c.Dv, c.Dv, kNan);
    }
  }
  return p;
}

struct Results {
  std::vector<double> context, weights, dq, dk, dv, dvector;
};

inline Results reference(const Problem& p) {
  const Case& c = p.c;
  Results r{std::vector<double>(c.B * c.Tq * c.Dv), std::vector<double>(c.B * c.Tq * c.Tk),
            std::vector<double>(c.B * c.Tq * c.D),  std::vector<double>(c.B * c.Tk * c.D),
            std::vector<double>(c.B * c.Tk * c.Dv), std::vector<double>(c.D)};
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t i = 0; i < c.Tq; ++i) {
      const double *q = &p.q[(b * c.Tq + i) * c.D], *dc = p.dcontext.data() + (b * c.Tq + i) * c.Dv;
      double *w = r.weights.data() + (b * c.Tq + i) * c.Tk, *context = r.context.data() + (b * c.Tq + i) * c.Dv;
      double *dq = r.dq.data() + (b * c.Tq + i) * c.D, peak = -1e300, sum = 0, mean = 0;
      std::vector<double> dp(c.Tk);
      for (int64_t j = 0; j < c.Tk; ++j) {
        if (!p.valid(b, j)) continue;
        const double* k = &p.k[(b * c.Tk + j) * c.D];
        for (int64_t d = 0; d < c.D; ++d)
          w[j] += c.score == Score::dot ? p.scale * q[d] * k[d] : p.vector[d] * std::tanh(q[d] + k[d]);
        peak = std::max(peak, w[j]);
      }
      for (int64_t j = 0; j < c.Tk; ++j) sum += p.valid(b, j) ? std::exp(w[j] - peak) : 0;
      for (int64_t j = 0; j < c.Tk; ++j) {
        if (!p.valid(b, j)) continue;
        const double* v = p.v.data() + (b * c.Tk + j) * c.Dv;
        w[j] = std::exp(w[j] - peak) / sum;
        dp[j] = c.dweights ? p.dweights[(b * c.Tq + i) * c.Tk + j] : 0;
        for (int64_t d = 0; d < c.Dv; ++d) {
          context[d] += w[j] * v[d];
          if (!c.dcontext) continue;
          dp[j] += dc[d] * v[d];
          r.dv[(b * c.Tk + j) * c.Dv + d] += w[j] * dc[d];
        }
        mean += w[j] * dp[j];
      }
      for (int64_t j = 0; j < c.Tk; ++j) {
        if (!p.valid(b, j)) continue;
        const double ds = w[j] * (dp[j] - mean), *k = &p.k[(b * c.Tk + j) * c.D];
        double* dk = &r.dk[(b * c.Tk + j) * c.D];
        for (int64_t d = 0; d < c.D; ++d) {
          if (c.score == Score::dot) {
            dq[d] += p.scale * ds * k[d];
            dk[d] += p.scale * ds * q[d];
          } else {
            const double t = std::tanh(q[d] + k[d]), g = ds * p.vector[d] * (1 - t * t);
            dq[d] += g;
            dk[d] += g;
            r.dvector[d] += ds * t;
          }
        }
      }
    }
  }
  return r;
}

}  // namespace rnnkern_test
