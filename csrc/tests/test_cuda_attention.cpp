// The CUDA attention kernels, emulated, against plain double loops: scores, dtypes, lengths, masks, odd sizes, several
// schedules; padding never read, outputs and scratch poisoned.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/device.h"
#include "reference_attention.h"

using namespace rnnkern;
using namespace rnnkern_test;
using cuda::Bf16;
using cuda::F16;

namespace {

int failures = 0;

std::string describe(const Case& c) {
  char text[200];
  std::snprintf(text, sizeof text, "%s B=%d Tq=%d Tk=%d D=%d Dv=%d size=%g lengths=%d mask=%d",
                c.score == Score::dot ? "dot" : "additive", int(c.B), int(c.Tq), int(c.Tk), int(c.D), int(c.Dv), c.size,
                c.lengths, c.mask);
  return text;
}

// Memory that the kernels may touch, all of it and nothing else.
template <class T>
class Memory {
 public:
  Memory(size_t count, emulator::GlobalMemory& global) : data_(count + 1) {
    std::memset(static_cast<void*>(data_.data()), 0xFF, data_.size() * sizeof(T));
    if (count > 0) global.add(data_.data(), count * sizeof(T));
  }
  T* data() { return data_.data(); }

 private:
  std::vector<T> data_;
};

// A [B, T, C] array with `gap` elements of NaN after each row.
template <class S>
struct Array {
  Memory<S> memory;
  Rows rows;
  Array(const std::vector<double>& values, int64_t T, int64_t C, int64_t gap, emulator::GlobalMemory& global)
      : memory(C == 0 ? 0 : values.size() / size_t(C) * size_t(C + gap), global),
        rows{memory.data(), T * (C + gap), C + gap} {
    for (size_t i = 0; i < values.size(); ++i)
      memory.data()[i / size_t(C) * size_t(C + gap) + i % size_t(C)] = cuda::from_float<S>(float(values[i]));
  }
};

template <class S>
Results run(const Problem& p, unsigned seed) {
  const Case& c = p.c;
  emulator::GlobalMemory global;
  const int64_t gap = c.strided ? 3 : 0;
  Array<S> q(p.q, c.Tq, c.D, gap, global), k(p.k, c.Tk, c.D, gap, global), v(p.v, c.Tk, c.Dv, gap, global);
  Array<S> vector(p.vector, 1, c.D, 0, global), dcontext(p.dcontext, c.Tq, c.Dv, gap, global);
  Array<S> dweights(p.dweights, c.Tq, c.Tk, gap, global);
  Memory<S> context(c.B * c.Tq * c.Dv, global), weights(c.B * c.Tq * c.Tk, global), dq(c.B * c.Tq * c.D, global);
  Memory<S> dk(c.B * c.Tk * c.D, global), dv(c.B * c.Tk * c.Dv, global), dvector(c.D, global);
  Memory<int64_t> lengths(c.B, global);
  Memory<uint8_t> mask(p.mask.size(), global);
  std::copy(p.lengths.begin(), p.lengths.end(), lengths.data());
  std::copy(p.mask.begin(), p.mask.end(), mask.data());

  AttentionInputs in{};
  in.dtype = std::is_same_v<S, float> ? Dtype::f32 : std::is_same_v<S, Bf16> ? Dtype::bf16 : Dtype::f16;
  in.score = c.score;
  in.B = c.B, in.Tq = c.Tq, in.Tk = c.Tk, in.D = c.D, in.Dv = c.Dv;
  in.scale = p.scale;
  in.query = q.rows, in.key = k.rows, in.value = v.rows;
  in.vector = c.score == Score::additive ? vector.rows.data : nullptr;
  in.lengths = c.lengths ? lengths.data() : nullptr;
  if (c.mask) in.mask = {mask.data(), c.Tk, 1};
  struct alignas(256) Line {
    unsigned char bytes[256];
  };
  const int64_t forward = cuda::attention_forward_scratch(in), backward = cuda::attention_backward_scratch(in);
  Memory<Line> forward_scratch((forward + 255) / 256, global), backward_scratch((backward + 255) / 256, global);
  emulator::set_seed(seed);
  cuda::attention_forward(in, {context.data(), c.weights ? weights.data() : nullptr}, forward_scratch.data(), nullptr);
  const Rows none{nullptr, 0, 0};
  cuda::attention_backward(in,
                           {c.dcontext ? dcontext.rows : none, c.dweights ? dweights.rows : none, dq.data(), dk.data(),
                            dv.data(), dvector.data()},
                           backward_scratch.data(), nullptr);
  const auto widen = [](Memory<S>& from, int64_t count) {
    std::vector<double> to;
    for (int64_t i = 0; i < count; ++i) to.push_back(cuda::to_float(from.data()[i]));
    return to;
  };
  return {widen(context, c.B * c.Tq * c.Dv), widen(weights, c.weights ? c.B * c.Tq * c.Tk : 0),
          widen(dq, c.B * c.Tq * c.D),       widen(dk, c.B * c.Tk * c.D),
          widen(dv, c.B * c.Tk * c.Dv),      widen(dvector, c.score == Score::additive ? c.D : 0)};
}

void compare(const char* what, const std::vector<double>& actual, const std::vector<double>& expected, double tolerance,
             const Problem& p) {
  double worst = 0, size = 1;
  for (size_t i = 0; i < actual.size(); ++i) {
    size = std::max(size, std::fabs(expected[i]));
    const double error = std::fabs(actual[i] - expected[i]);
    worst = error == error ? std::max(worst, error) : std::numeric_limits<double>::infinity();
  }
  if (worst <= tolerance * size) return;
  ++failures;
  std::printf("%s is off by %g (size %g): %s\n", what, worst, size, describe(p.c).c_str());
}

bool same(const Results& a, const Results& b) {
  return a.context == b.context && a.weights == b.weights && a.dq == b.dq && a.dk == b.dk && a.dv == b.dv &&
         a.dvector == b.dvector;
}

template <class S>
void check(const Case& c, double tolerance, unsigned seed) {
  try {
    const Problem p = make(c, [](double x) { return double(cuda::to_float(cuda::from_float<S>(float(x)))); });
    const Results expected = reference(p), actual = run<S>(p, seed);
    compare("context", actual.context, expected.context, tolerance, p);
    compare("weights", actual.weights, expected.weights, tolerance, p);
    compare("dquery", actual.dq, expected.dq, tolerance, p);
    compare("dkey", actual.dk, expected.dk, tolerance, p);
    compare("dvalue", actual.dv, expected.dv, tolerance, p);
    compare("dvector", actual.dvector, expected.dvector, tolerance, p);
    if (seed % 4 == 0 && !same(run<S>(p, seed + 100), actual)) {
      ++failures;
      std::printf("the schedule changes the result: %s\n", describe(c).c_str());
    }
  } catch (const emulator::Error& error) {
    ++failures;
    std::printf("%s: %s\n", describe(c).c_str(), error.what());
  }
}

// Two dtypes in turn: emulation takes its time.
void check_dtypes(const Case& c, unsigned seed) {
  const unsigned left_out = (seed + seed / 3) % 3;  // three paddings come in turn
  if (left_out != 0) check<float>(c, 1e-5, seed);
  if (left_out != 1) check<Bf16>(c, 1.6e-2, seed);  // 2^-8, times 4: weights, their gradients and results are rounded
  if (left_out != 2) check<F16>(c, 2e-3, seed);
}

}  // namespace

int main() {
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1},    {3, 1, 17, 33, 100}, {3, 1, 130, 100, 17}, {3, 17, 33, 17, 33},
                               {1, 33, 100, 8, 1}, {3, 67, 70, 36, 24}, {0, 3, 4, 5, 6},      {2, 3, 0, 5, 6},
                               {2, 0, 5, 4, 3},    {1, 2, 300, 64, 8},  {2, 1, 0, 5, 6},      {1, 100, 17, 72, 72}};
  unsigned seed = 0;
  for (Score score : {Score::dot, Score::additive}) {
    for (const auto& s : shapes) {
      for (int padding = 0; padding < 3; ++padding)
        check_dtypes({score, s[0], s[1], s[2], s[3], s[4], 1.0, padding == 1, padding == 2}, seed++);
    }
    for (int64_t Tq : {1, 5}) {
      for (int padding = 0; padding < 3; ++padding) {
        Case c{score, 3, Tq, 70, 40, 24, 1.0, padding == 1, padding == 2};
        c.strided = true;
        check_dtypes(c, seed++);
        c.dcontext = padding != 0;
        c.dweights = c.weights = padding == 0;
        c.strided = false;
        check_dtypes(c, seed++);
      }
    }
  }
  // More parts of one row than join_single keeps factors of.
  for (Score score : {Score::dot, Score::additive}) check_dtypes({score, 1, 1, 16500, 3, 2, 1.0, true, false}, seed++);
  for (double size : {9.9, 10.5, 30.0, 100.0}) {
    for (int64_t Tq : {1, 9, 40}) check_dtypes({Score::additive, 2, Tq, 70, 50, 5, size, false, size > 20}, seed++);
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
