// The emulator does what CUDA does: indices, exchange in a warp, barriers, clusters, copies, products, numbers.
#include "check_emulator.h"

using namespace rnnkern::cuda;
using namespace rnnkern_test;

namespace {

template <class T>
T* shared_of() {
  return reinterpret_cast<T*>(shared_memory());
}

void test_indices() {
  Global<int> out(3 * 64 * 7);
  emulator::launch({3, 64}, [&] {
    const int seen[7] = {thread_index(), block_threads(), block_index(), block_count(),
                         lane_index(),   warp_index(),    cluster_rank()};
    for (int i = 0; i < 7; ++i) store(out.data() + (block_index() * 64 + thread_index()) * 7 + i, seen[i]);
  });
  for (int b = 0; b < 3; ++b) {
    for (int t = 0; t < 64; ++t) {
      const int expected[7] = {t, 64, b, 3, t % 32, t / 32, 0};
      for (int i = 0; i < 7; ++i)
        CHECK(out[size_t((b * 64 + t) * 7 + i)] == expected[i], "block %d thread %d fact %d", b, t, i);
    }
  }
  Global<int> ranks(8);
  emulator::launch({8, 32, 0, 4}, [&] { store(ranks.data() + block_index(), cluster_rank()); });
  for (int b = 0; b < 8; ++b) CHECK(ranks[size_t(b)] == b % 4, "rank of block %d", b);
}

void test_warp() {
  Global<int> out(64 * 6);
  emulator::launch({1, 64}, [&] {
    const int lane = lane_index(), own = 100 * warp_index() + lane;
    int seen[6] = {shuffle(own, 5), shuffle_xor(own, 3), int(ballot(lane % 3 == 0)), 0, 0, 0};
    struct Pair {
      double first;
      int second;
    };
    seen[3] = shuffle(Pair{0.5 * own, own}, (lane + 1) % 32).second;
    seen[4] = any_lane(lane == 31) + 2 * any_lane(false);
    seen[5] = all_lanes(true) + 2 * all_lanes(lane != 7);
    for (int i = 0; i < 6; ++i) store(out.data() + thread_index() * 6 + i, seen[i]);
  });
  for (int t = 0; t < 64; ++t) {
    const int base = t / 32 * 100, lane = t % 32;
    const int expected[6] = {base + 5, base + (lane ^ 3), int(0x49249249u), base + (lane + 1) % 32, 1, 1};
    for (int i = 0; i < 6; ++i)
      CHECK(out[size_t(t * 6 + i)] == expected[i], "thread %d value %d: %d", t, i, out[size_t(t * 6 + i)]);
  }
}

// Rounds in which every thread reads what another wrote in the round before, `members` at a time.
template <class Sync>
void pass_on(int* slots, int member, int members, int rounds, int* out, const Sync& sync) {
  store(slots + member, member);
  sync();
  int value = 0;
  for (int round = 0; round < rounds; ++round) {
    value = load(slots + (member + 1) % members);
    sync();
    store(slots + member, value);
    sync();
  }
  store(out, value);
}

void test_block_barriers() {
  Global<int> out(128);
  const emulator::Grid grid{1, 128, 128 * sizeof(int)};
  emulator::launch(grid, [&] {
    const int t = thread_index();
    pass_on(shared_of<int>(), t, 128, 10, out.data() + t, sync_block);
  });
  for (int t = 0; t < 128; ++t) CHECK(out[size_t(t)] == (t + 10) % 128, "thread %d got %d", t, out[size_t(t)]);

  // Warps 0 to 2 take barrier 3, warp 3 barrier 4, each a number of rounds of its own; warps alone sync_warp.
  emulator::launch(grid, [&] {
    const int t = thread_index();
    if (t < 96)
      pass_on(shared_of<int>(), t, 96, 10, out.data() + t, [] { sync_named(3, 96); });
    else
      pass_on(shared_of<int>() + 96, t - 96, 32, 33, out.data() + t, [] { sync_named(4, 32); });
    sync_block();
    if (t >= 96) pass_on(shared_of<int>() + 96, t - 96, 32, 7, out.data() + t, sync_warp);
  });
  for (int t = 0; t < 128; ++t) {
    const int expected = t < 96 ? (t + 10) % 96 : (t - 96 + 7) % 32;
    CHECK(out[size_t(t)] == expected, "thread %d got %d", t, out[size_t(t)]);
  }
}

void test_cluster() {
  constexpr int kBlocks = 8, kCluster = 4, kRounds = 5;
  Global<int> out(kBlocks * 32);
  emulator::launch({kBlocks, 32, 32 * sizeof(int), kCluster}, [&] {
    int* own = shared_of<int>() + thread_index();
    store(own, block_index());
    int value = 0;
    for (int round = 0; round < kRounds; ++round) {
      arrive_cluster();
      const int next = (cluster_rank() + 1) % kCluster;  // while others arrive
      wait_cluster();
      value = load(cluster_shared(own, next));
      sync_cluster();
      store(own, value);
    }
    sync_cluster();
    store(cluster_shared(own, cluster_rank() ^ 1), value);  // remote writes
    sync_cluster();
    store(out.data() + block_index() * 32 + thread_index(), load(own));
  });
  for (int b = 0; b < kBlocks; ++b) {
    const int expected = b / kCluster * kCluster + ((b % kCluster ^ 1) + kRounds) % kCluster;
    for (int t = 0; t < 32; ++t) CHECK(out[size_t(b * 32 + t)] == expected, "block %d got %d", b, out[size_t(b * 32)]);
  }
}

// As the grid engine does: one thread of each block counts, and waits for all.
void sync_grid(unsigned* counter, unsigned round) {
  sync_block();
  if (thread_index() == 0) {
    add_release(counter, 1);
    while (load_acquire(counter) < (round + 1) * unsigned(block_count())) {
    }
  }
  sync_block();
}

void test_grid(int blocks, int threads) {
  Global<unsigned> counter(1, 0);
  Global<int> slots(size_t(blocks * threads)), out(size_t(blocks * threads));
  emulator::launch({blocks, threads, 0, 1, true}, [&] {
    const int at = block_index() * threads + thread_index();
    unsigned round = 0;
    pass_on(slots.data(), at, blocks * threads, 2, out.data() + at, [&] { sync_grid(counter.data(), round++); });
  });
  int wrong = 0;
  for (int i = 0; i < blocks * threads; ++i) wrong += out[size_t(i)] != (i + 2) % (blocks * threads);
  CHECK(wrong == 0, "%d threads of %d blocks got the wrong value", wrong, blocks);

  // A flag, raised by one block for all.
  Global<unsigned> flag(1, 0);
  emulator::launch({blocks, 32, 0, 1, true}, [&] {
    if (block_index() == blocks - 1) {
      store(slots.data(), 42);
      fence_device();
      if (lane_index() == 0) store_release(flag.data(), 1);
    } else {
      while (load_acquire(flag.data()) == 0) {
      }
      store(out.data() + block_index(), load_l2(slots.data()));
    }
  });
  for (int b = 0; b + 1 < blocks; ++b) CHECK(out[size_t(b)] == 42, "block %d read %d", b, out[size_t(b)]);
}

void test_atomics() {
  Global<unsigned> count(1, 0), drawn(256, 0);
  Global<float> sum(1, 0.0f);
  emulator::launch({4, 64, sizeof(unsigned)}, [&] {
    unsigned* shared = shared_of<unsigned>();
    if (thread_index() == 0) store(shared, 0u);
    sync_block();
    atomic_add(shared, 2u);
    atomic_add(sum.data(), 0.5f);
    store(drawn.data() + add_release(count.data(), 1), 1u);
    sync_block();
    if (thread_index() == 0) CHECK(load(shared) == 128, "%u", load(shared));
  });
  CHECK(count[0] == 256 && sum[0] == 128.0f, "%u, %g", count[0], double(sum[0]));
  for (unsigned seen : drawn.values) CHECK(seen == 1, "two threads drew one number");
}

// Two buffers, of which one is filled while the other is read; the last copies are cut off.
void test_copies(unsigned seed) {
  constexpr int kTiles = 5, kFloats = 128;
  Global<float> in(kTiles * kFloats), out(kTiles * kFloats);
  for (size_t i = 0; i < in.values.size(); ++i) in[i] = float(i);
  int absent = 0;
  emulator::launch({1, 32, 2 * kFloats * sizeof(float)}, [&] {
    const int at = 4 * lane_index();
    const auto fetch = [&](int tile) {
      copy_async<16>(shared_of<float>() + tile % 2 * kFloats + at, in.data() + tile * kFloats + at,
                     tile + 1 < kTiles ? 16 : 8);
      commit_copies();
    };
    fetch(0);
    absent += std::isnan(load(shared_of<float>() + at));
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile + 1 < kTiles) {
        fetch(tile + 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      sync_warp();
      for (int i = 0; i < 4; ++i) {
        const int value = i * 32 + lane_index();
        store(out.data() + tile * kFloats + value, load(shared_of<float>() + tile % 2 * kFloats + value));
      }
      sync_warp();
    }
  });
  CHECK(seed == 0 ? absent == 32 : absent > 0 && absent < 32, "%d lanes had to wait for their copies", absent);
  for (size_t i = 0; i < out.values.size(); ++i) {
    const bool cut = i / kFloats + 1 == kTiles && i % 4 >= 2;
    CHECK(out[i] == (cut ? 0.0f : float(i)), "%zu: %g", i, double(out[i]));
  }
  Global<int> words(32);
  emulator::launch({1, 32, 32 * sizeof(int)}, [&] {
    copy_async<4>(shared_of<int>() + lane_index(), in.data() + lane_index());
    commit_copies();
    wait_copies<0>();
    store(words.data() + lane_index(), load(shared_of<int>() + lane_index()));
  });
  for (int i = 0; i < 32; ++i) CHECK(float_of(uint32_t(words[size_t(i)])) == float(i), "word %d", i);
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

// One product of each shape by its fragments, against a plain one in double. Sums of few small integers are exact, so
// that a value in the wrong place cannot hide.
template <class T>
void test_mma() {
  constexpr bool tf32 = std::is_same_v<T, float>;
  constexpr int K = tf32 ? 8 : 16;
  std::vector<float> a(16 * K), b(K * 8), c(16 * 8);
  std::mt19937 random(7);
  for (std::vector<float>* matrix : {&a, &b, &c}) {
    for (float& value : *matrix) value = float(int(random() % 31) - 15);
  }
  Global<float> out(2 * 16 * 8);
  emulator::launch({1, 64}, [&] {
    const int group = lane_index() / 4, pair = lane_index() % 4;
    uint32_t left[4], right[2];
    float d[4];
    for (int i = 0; i < 4; ++i) {
      const float* row = a.data() + (group + i % 2 * 8) * K;
      const int k = i / 2 * (K / 2);
      if constexpr (tf32)
        left[i] = bits_of(row[k + pair]) | 0x1ABC;  // bits that tf32 has not
      else
        left[i] = pack<T>(row[k + 2 * pair], row[k + 2 * pair + 1]);
      d[i] = c[size_t((group + i / 2 * 8) * 8 + 2 * pair + i % 2)];
    }
    for (int i = 0; i < 2; ++i) {
      const int k = i * (K / 2);
      if constexpr (tf32)
        right[i] = bits_of(b[size_t((k + pair) * 8 + group)]) | 0x1FFF;
      else
        right[i] = pack<T>(b[size_t((k + 2 * pair) * 8 + group)], b[size_t((k + 2 * pair + 1) * 8 + group)]);
    }
    if constexpr (tf32)
      mma_16x8x8_tf32(d, left, right);
    else
      mma_16x8x16<T>(d, left, right);
    for (int i = 0; i < 4; ++i)
      store(out.data() + warp_index() * 128 + (group + i / 2 * 8) * 8 + 2 * pair + i % 2, d[i]);
  });
  for (int i = 0; i < 2 * 128; ++i) {
    const int row = i % 128 / 8, column = i % 8;
    double expected = c[size_t(i % 128)];
    for (int k = 0; k < K; ++k) expected += double(a[size_t(row * K + k)]) * double(b[size_t(k * 8 + column)]);
    CHECK(double(out[size_t(i)]) == expected, "K %d: [%d, %d] is %g, not %g", K, row, column, double(out[size_t(i)]),
          expected);
  }
}

// The value of a 16-bit float of which `mantissa` bits are the fraction's.
double value_of(uint16_t bits, int mantissa) {
  const int exponent_bits = 15 - mantissa, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa & ((1 << exponent_bits) - 1), fraction = bits & ((1 << mantissa) - 1);
  double size;
  if (exponent == (1 << exponent_bits) - 1)
    size = fraction ? std::nan("") : HUGE_VAL;
  else
    size = std::ldexp(fraction + (exponent ? 1 << mantissa : 0), std::max(exponent, 1) - bias - mantissa);
  return bits & 0x8000 ? -size : size;
}

// Every number of the format and the floats about the middle between neighbours, where rounding turns.
template <class T>
void test_conversions(int mantissa) {
  const uint16_t infinity = uint16_t(((1 << (15 - mantissa)) - 1) << mantissa);
  const auto check = [&](float value, uint16_t expected) {
    CHECK(from_float<T>(value).bits == expected, "%a: %04x, not %04x", double(value), from_float<T>(value).bits,
          expected);
    CHECK(from_float<T>(-value).bits == (expected | 0x8000), "%a", double(-value));
  };
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const double exact = value_of(uint16_t(bits), mantissa);
    const float value = to_float(T{uint16_t(bits)});
    if (std::isnan(exact)) {
      CHECK(std::isnan(value), "%04x", bits);
      continue;
    }
    CHECK(double(value) == exact && std::signbit(value) == (bits >> 15), "%04x: %a, not %a", bits, double(value),
          exact);
    if (bits >= infinity) continue;
    check(value, uint16_t(bits));
    // The next number, or what it would be: infinity stands for the next power of two.
    const double next =
        bits + 1 == infinity ? std::ldexp(1.0, (1 << (14 - mantissa))) : value_of(uint16_t(bits + 1), mantissa);
    const double middle = (exact + next) / 2;
    if (double(float(middle)) != middle) continue;  // below bfloat16's least number
    check(float(middle), uint16_t(bits + bits % 2));
    check(std::nextafter(float(middle), 0.0f), uint16_t(bits));
    check(std::nextafter(float(middle), HUGE_VALF), uint16_t(bits + 1));
  }
  CHECK(from_float<T>(HUGE_VALF).bits == infinity);
  CHECK(std::isnan(to_float(from_float<T>(std::nanf("")))));
}

void test_functions() {
  CHECK(exp2_approx(0.0f) == 1.0f && exp2_approx(-0x1p-140f) == 1.0f && exp2_approx(-HUGE_VALF) == 0.0f);
  CHECK(std::isinf(exp2_approx(HUGE_VALF)) && std::isinf(exp2_approx(128.0f)) &&
        std::isnan(exp2_approx(std::nanf(""))));
  CHECK(std::isinf(reciprocal_approx(0.0f)) && reciprocal_approx(-HUGE_VALF) == 0.0f &&
        std::isnan(reciprocal_approx(std::nanf(""))));
  CHECK(exp2_approx(-140.0f) == 0.0f && std::isinf(reciprocal_approx(0x1p-140f)), "numbers below the normal are zero");
  CHECK(multiply_add(0x1.001p0f, 0x1.001p0f, -1.0f) == 0x1.0008p-11f, "rounds once");
}

// As far off as the GPU may be, never further, and always by the same.
void test_approximations_are_inexact() {
  const auto check = [](const char* name, float (*function)(float), double (*exact)(double), double most, float scale) {
    double worst = 0, sum = 0;
    constexpr int kCount = 100000;
    for (int i = 0; i < kCount; ++i) {
      const float x = (float(i) + 0.5f) * scale / kCount - 0.3f * scale, value = function(x);
      const double error = (double(value) - exact(double(x))) / std::ldexp(1.0, std::ilogb(exact(double(x))) - 23);
      worst = std::max(worst, std::fabs(error));
      sum += error;
      CHECK(value == function(x), "%s(%a) differs", name, double(x));
    }
    CHECK(worst <= most && worst > 0.98 * most, "%s is off by %g units in the last place", name, worst);
    CHECK(std::fabs(sum / kCount) < 0.02, "%s is off by %g units on average", name, sum / kCount);
  };
  const auto exp2 = [](double x) { return std::exp2(x); };
  const auto reciprocal = [](double x) { return 1.0 / x; };
  check("exp2_approx", exp2_approx, exp2, 2.0, 40.0f);
  check("reciprocal_approx", reciprocal_approx, reciprocal, 1.0, 1000.0f);
}

void test_shared_memory_is_poisoned() {
  emulator::launch({4, 64, 256 * sizeof(float)}, [] {
    for (int i = thread_index(); i < 256; i += 64) CHECK(std::isnan(load(shared_of<float>() + i)), "%d", i);
    sync_block();
    store(shared_of<float>() + thread_index(), 1.0f);
  });
}

// A launch that fails leaves nothing behind, and exceptions of others pass.
void test_failures_are_contained() {
  for (int round = 0; round < 3; ++round) {
    const std::string error = error_of({2, 64}, [] {
      if (thread_index() == 40) emulator::fail("on purpose");
      sync_block();
    });
    CHECK(error == "block 0 thread 40: on purpose" || error == "block 1 thread 40: on purpose", "%s", error.c_str());
    int caught = 0;
    try {
      emulator::launch({1, 32}, [] { throw 7; });
    } catch (int value) {
      caught = value;
    }
    CHECK(caught == 7, "%d", caught);
    test_block_barriers();
  }
  CHECK(error_of({1, 33}, [] {}).find("cannot be launched") != std::string::npos);
  CHECK(error_of({3, 32, 0, 2}, [] {}).find("cannot be launched") != std::string::npos);
  CHECK(error_of({1, 32}, [] { emulator::launch({1, 32}, [] {}); }).find("cannot launch another") != std::string::npos);
}

// The same seed gives the same schedule; another seed, and the next launch, another.
void test_schedules() {
  const auto order = [] {
    Global<unsigned> drawn(1, 0);
    Global<unsigned> order(128);
    emulator::launch({1, 128}, [&] { store(order.data() + thread_index(), atomic_add(drawn.data(), 1u)); });
    return order.values;
  };
  emulator::set_seed(5);
  const auto first = order(), second = order();
  emulator::set_seed(5);
  CHECK(order() == first && order() == second, "a seed does not repeat its schedule");
  emulator::set_seed(6);
  CHECK(order() != first && first != second, "schedules do not differ");
}

}  // namespace

int main() {
  on_seeds([](unsigned seed) {
    test_indices();
    test_warp();
    test_block_barriers();
    test_cluster();
    test_grid(7, 64);
    test_atomics();
    test_copies(seed);
    test_mma<Bf16>();
    test_mma<F16>();
    test_mma<float>();
    test_shared_memory_is_poisoned();
    test_failures_are_contained();
  });
  test_grid(132, 256);  // as many threads as the largest launch of an H100's grid
  test_conversions<Bf16>(7);
  test_conversions<F16>(10);
  test_functions();
  test_approximations_are_inexact();
  test_schedules();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
