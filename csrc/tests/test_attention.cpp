// The attention kernels against plain double loops: scores, dtypes, lengths, masks, odd sizes, threads, padding never
// read; and queries alone against the same queries together.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "reference_attention.h"

using namespace rnnkern;
using namespace rnnkern_test;

namespace {

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

double to_float(double x) { return float(x); }  // the same in float and in double

ParallelFor threads(int count) {
  static int pieces;
  pieces = count;
  return {[](int64_t n, ParallelFor::Body body, void* context) {
            std::vector<std::thread> workers;
            for (int i = 0; i < pieces; ++i) {
              const int64_t begin = n * i / pieces, end = n * (i + 1) / pieces;
              if (begin < end) workers.emplace_back(body, context, begin, end);
            }
            for (std::thread& worker : workers) worker.join();
          },
          count};
}

template <class T>
Results run(const Problem& p, int thread_count) {
  const Case& c = p.c;
  const auto cast = [](const std::vector<double>& x) { return std::vector<T>(x.begin(), x.end()); };
  const auto rows = [](const std::vector<T>& x, int64_t T_, int64_t C) { return Rows{x.data(), T_ * C, C}; };
  const std::vector<T> q = cast(p.q), k = cast(p.k), v = cast(p.v), vector = cast(p.vector);
  const std::vector<T> dcontext = cast(p.dcontext), dweights = cast(p.dweights);
  const T poison = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> context(c.B * c.Tq * c.Dv, poison), weights(c.B * c.Tq * c.Tk, poison);
  std::vector<T> dq(q.size(), poison), dk(k.size(), poison), dv(v.size(), poison), dvector(c.D, poison);
  AttentionInputs in{};
  in.dtype = sizeof(T) == 4 ? Dtype::f32 : Dtype::f64;
  in.score = c.score;
  in.B = c.B, in.Tq = c.Tq, in.Tk = c.Tk, in.D = c.D, in.Dv = c.Dv;
  in.scale = p.scale;
  in.query = rows(q, c.Tq, c.D), in.key = rows(k, c.Tk, c.D), in.value = rows(v, c.Tk, c.Dv);
  in.vector = c.score == Score::additive ? vector.data() : nullptr;
  in.lengths = c.lengths ? p.lengths.data() : nullptr;
  if (c.mask) in.mask = {p.mask.data(), c.Tk, 1};
  attention_forward(in, {context.data(), weights.data()}, threads(thread_count));
  attention_backward(
      in, {rows(dcontext, c.Tq, c.Dv), rows(dweights, c.Tq, c.Tk), dq.data(), dk.data(), dv.data(), dvector.data()},
      threads(thread_count));
  if (c.score == Score::dot) dvector.assign(c.D, 0);
  const auto widen = [](const std::vector<T>& x) { return std::vector<double>(x.begin(), x.end()); };
  return {widen(context), widen(weights), widen(dq), widen(dk), widen(dv), widen(dvector)};
}

void compare(const char* what, const std::vector<double>& actual, const std::vector<double>& expected, double tolerance,
             const Problem& p) {
  double worst = 0, size = 1;
  for (size_t i = 0; i < actual.size(); ++i) {
    size = std::max(size, std::fabs(expected[i]));
    const double error = std::fabs(actual[i] - expected[i]);
    worst = error == error ? std::max(worst, error) : std::numeric_limits<double>::infinity();
  }
  const Case& c = p.c;
  CHECK(worst <= tolerance * size,
        "%s is off by %g (size %g): %s B=%d Tq=%d Tk=%d D=%d Dv=%d size=%g lengths=%d mask=%d", what, worst, size,
        c.score == Score::dot ? "dot" : "additive", int(c.B), int(c.Tq), int(c.Tk), int(c.D), int(c.Dv), c.size,
        c.lengths, c.mask);
}

template <class T>
void check(const Problem& p, const Results& expected, double tolerance) {
  const Results one = run<T>(p, 1), three = run<T>(p, 3);
  compare("context", one.context, expected.context, tolerance, p);
  compare("weights", one.weights, expected.weights, tolerance, p);
  compare("dquery", one.dq, expected.dq, tolerance, p);
  compare("dkey", one.dk, expected.dk, tolerance, p);
  compare("dvalue", one.dv, expected.dv, tolerance, p);
  compare("dvector", one.dvector, expected.dvector, tolerance, p);
  CHECK(one.context == three.context && one.weights == three.weights && one.dq == three.dq && one.dk == three.dk &&
            one.dv == three.dv && one.dvector == three.dvector,
        "threads change the result: Tq=%d Tk=%d D=%d", int(p.c.Tq), int(p.c.Tk), int(p.c.D));
}

// Few queries read keys and values where they lie, many pack them: to the same bits.
template <class T>
void check_alone(const Problem& p) {
  const Case& c = p.c;
  const Results together = run<T>(p, 1);
  for (int64_t count : {1, 4, 7}) {
    for (int64_t first = 0; first + count <= c.Tq; first += count) {
      Problem alone = p;
      alone.c.Tq = count;
      const auto rows = [&](const std::vector<double>& x, int64_t columns) {
        std::vector<double> taken;
        for (int64_t b = 0; b < c.B; ++b) {
          const auto begin = x.begin() + (b * c.Tq + first) * columns;
          taken.insert(taken.end(), begin, begin + count * columns);
        }
        return taken;
      };
      alone.q = rows(p.q, c.D);
      alone.dcontext = rows(p.dcontext, c.Dv);
      alone.dweights = rows(p.dweights, c.Tk);
      const Results r = run<T>(alone, 1);
      CHECK(r.context == rows(together.context, c.Dv) && r.weights == rows(together.weights, c.Tk),
            "%d queries from %d on differ alone: %s B=%d Tk=%d D=%d Dv=%d size=%g", int(count), int(first),
            c.score == Score::dot ? "dot" : "additive", int(c.B), int(c.Tk), int(c.D), int(c.Dv), c.size);
    }
  }
}

}  // namespace

int main() {
  try {
    std::printf("%s\n", isa_name(current_isa()));
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 77;
  }
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1},    {3, 1, 7, 17, 5},     {2, 5, 50, 100, 33},   {2, 67, 261, 48, 16},
                               {0, 3, 4, 5, 6},    {2, 3, 0, 5, 6},      {2, 130, 40, 20, 100}, {2, 1, 261, 33, 48},
                               {2, 3, 530, 7, 20}, {1, 9, 4100, 17, 48}, {70, 3, 40, 70, 20}};
  for (Score score : {Score::dot, Score::additive}) {
    for (const auto& s : shapes) {
      for (int padding = 0; padding < 3; ++padding) {
        for (double size : {1.0, 100.0}) {
          const double element = score == Score::dot && size > 1 ? 4 : size;
          const Problem p = make({score, s[0], s[1], s[2], s[3], s[4], element, padding == 1, padding == 2}, to_float);
          const Results expected = reference(p);
          check<float>(p, expected, 2e-5);
          check<double>(p, expected, 2e-13);
        }
      }
    }
    for (int64_t D : {1, 16, 17, 33, 48, 100}) {
      for (double size : {1.0, 10.5}) {  // some rows of the latter are beyond float's guard, some are not
        const Problem p = make({score, 2, 14, D == 33 ? 261 : 50, D, 37, size, false, size > 1}, to_float);
        check_alone<float>(p);
        check_alone<double>(p);
      }
    }
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
