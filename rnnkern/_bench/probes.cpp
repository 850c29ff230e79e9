// What this machine can do: fused multiply-adds, tanh, reading memory, and passing a cache line between two cores.
//
// Compiled where it is used (-O3 -march=native) and called through ctypes. Every probe gives the best of a few
// repetitions, since a ceiling is what undisturbed hardware does. Threads are not pinned: the engines' threads are not
// either.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));
constexpr int kRepetitions = 10;

#if defined(__x86_64__)
#define OPAQUE(v) asm volatile("" : "+x"(v))
#else
#define OPAQUE(v) asm volatile("" : "+w"(v))
#endif

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `work` on every thread at once, several times over; gives the best time of the slowest thread.
double best_seconds(int threads, const std::function<void(int)>& work) {
  std::atomic<int> arrived{0};
  std::vector<std::vector<double>> seconds(threads, std::vector<double>(kRepetitions));
  auto body = [&](int thread) {
    for (int repetition = 0; repetition < kRepetitions; ++repetition) {
      arrived.fetch_add(1);
      while (arrived.load() < threads * (repetition + 1)) std::this_thread::yield();
      const double start = now();
      work(thread);
      seconds[thread][repetition] = now() - start;
    }
  };
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; ++thread) team.emplace_back(body, thread);
  body(0);
  for (std::thread& member : team) member.join();
  double best = 1e30;
  for (int repetition = 0; repetition < kRepetitions; ++repetition) {
    double slowest = 0;
    for (int thread = 0; thread < threads; ++thread) slowest = std::max(slowest, seconds[thread][repetition]);
    best = std::min(best, slowest);
  }
  return best;
}

// tanh as a ratio of polynomials of degree 13 and 6, the cheapest form that is right to a few units in the last place.
inline Vector rational_tanh(Vector x) {
  const Vector s = x * x;
  Vector p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = s * p + -8.60467152213735e-11f;
  p = s * p + 5.12229709037114e-08f;
  p = s * p + 1.48572235717979e-05f;
  p = s * p + 6.37261928875436e-04f;
  p = (s * p + 4.89352455891786e-03f) * x;
  Vector q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = s * q + 2.26843463243900e-03f;
  q = s * q + 4.89352518554385e-03f;
  return p / q;
}

}  // namespace

extern "C" {

double rnnkern_probe_fma_gflops(int threads) {
  constexpr long kSteps = 1'000'000;
  constexpr int kChains = 12;  // latency 4, two per cycle, and some room
  const double seconds = best_seconds(threads, [](int) {
    Vector sum[kChains] = {}, a = {}, b = {};
    a += 0.5f;
    b += 1.0f;
    OPAQUE(a);
    OPAQUE(b);
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) OPAQUE(sum[chain]);  // else the compiler sees twelve equal chains
    for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * a + b;
    }
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) OPAQUE(sum[chain]);
  });
  return 2.0 * kSteps * kChains * kLanes * threads / seconds / 1e9;
}

double rnnkern_probe_tanh_gps(int threads) {
  constexpr int kVectors = 64, kPasses = 5'000;
  const double seconds = best_seconds(threads, [](int) {
    alignas(64) Vector values[kVectors];
    for (int i = 0; i < kVectors; ++i) values[i] = Vector{} + 0.01f * i;
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) values[i] = rational_tanh(values[i]);
      asm volatile("" : : "r"(values) : "memory");
    }
  });
  return 1.0 * kVectors * kLanes * kPasses * threads / seconds / 1e9;
}

// Every thread reads its own `bytes` (a multiple of 1 KiB) again and again. GB/s of all threads together.
double rnnkern_probe_read_gbps(int threads, size_t bytes) {
  constexpr int kSums = 8;
  const size_t vectors = bytes / sizeof(Vector);
  const long passes = std::max<long>(2, static_cast<long>(100e6 / bytes));
  std::vector<Vector*> buffers(threads);
  for (Vector*& buffer : buffers) buffer = static_cast<Vector*>(::operator new(bytes, std::align_val_t(4096)));
  best_seconds(threads, [&](int thread) { std::memset(buffers[thread], 0, bytes); });
  const double seconds = best_seconds(threads, [&](int thread) {
    const Vector* buffer = buffers[thread];
    Vector sum[kSums] = {};
    for (long pass = 0; pass < passes; ++pass) {
      for (size_t i = 0; i + kSums <= vectors; i += kSums) {
#pragma GCC unroll 8
        for (int k = 0; k < kSums; ++k) sum[k] += buffer[i + k];
      }
      asm volatile("" : : "r"(buffer) : "memory");
    }
#pragma GCC unroll 8
    for (int k = 0; k < kSums; ++k) OPAQUE(sum[k]);
  });
  for (Vector* buffer : buffers) ::operator delete(buffer, std::align_val_t(4096));
  return 1.0 * bytes * passes * threads / seconds / 1e9;
}

// One thread raises a flag, the other answers: nanoseconds for there and back. Says how near the two cores are.
double rnnkern_probe_ping_pong_ns() {
  constexpr int kRounds = 5'000;
  struct alignas(128) Flag {
    std::atomic<long> value{0};
  } flag;
  const double seconds = best_seconds(2, [&](int thread) {
    const long start = flag.value.load() / (2 * kRounds) * (2 * kRounds);
    for (long round = 0; round < kRounds; ++round) {
      const long turn = start + 2 * round + thread;
      for (int spins = 0; flag.value.load(std::memory_order_acquire) != turn;) {
        if (++spins > 2'000) std::this_thread::yield();  // both threads may share one core
      }
      flag.value.store(turn + 1, std::memory_order_release);
    }
  });
  return seconds / kRounds * 1e9;
}

}  // extern "C"
