// Times the kernels of latencies.cuh, and launches, one JSON object per line: latencies.py builds and runs it.
//
// A step's time is that of 3 n steps less that of n, over 2 n: what a launch costs falls out. Each is the median of
// kRounds such differences, and the quartiles stand beside it. `--list` prints the names and needs no GPU.
#include <cooperative_groups.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <optional>
#include <vector>

#include "cuda/launch.h"
#include "latencies.cuh"

namespace rnnkern::cuda {
namespace {

constexpr int kRounds = 15;
constexpr size_t kShared = 64 << 10;  // read by read_cluster
constexpr size_t kL2 = 16 << 20;      // read by read_l2: fits one half of the L2 cache of an H100
constexpr int kLaunches = 1000;

RNNKERN_KERNEL(kThreads, 1) cooperative_barrier(RNNKERN_ARGUMENT Loop loop) {
  for (int step = 0; step < loop.steps; ++step) cooperative_groups::this_grid().sync();
}

int log2_of(int value) {
  int log2 = 0;
  while (1 << log2 < value) ++log2;
  return log2;
}

struct Quartiles {
  double low, middle, high;
};
Quartiles quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t last = values.size() - 1;
  return {values[last / 4], values[last / 2], values[last - last / 4]};
}

class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&start_), "an event");
    check(cudaEventCreate(&end_), "an event");
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(end_);
  }
  template <class Work>
  double seconds(const Work& work, Stream stream) {
    check(cudaEventRecord(start_, stream), "an event");
    work();
    check(cudaEventRecord(end_, stream), "an event");
    check(cudaEventSynchronize(end_), "what was timed");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_, end_), "an event");
    return 1e-3 * milliseconds;
  }

 private:
  cudaEvent_t start_, end_;
};

struct Bench {
  DeviceFacts facts = device_facts();
  Stream stream = nullptr;
  Timer timer;
  Loop memory{};

  Bench() {
    check(cudaStreamCreate(&stream), "a stream");
    const size_t blocks = size_t(8 * facts.multiprocessors);
    memory.cluster = 1;
    check(cudaMalloc(&memory.flags, blocks * kFlagStride * sizeof(unsigned)), "memory");
    check(cudaMalloc(&memory.data, kL2), "memory");
    check(cudaMemset(memory.data, 0x5A, kL2), "memory");
    check(cudaMalloc(&memory.out, blocks * (16 << 10)), "memory");
    Loop loop = memory;
    loop.steps = 1 << 20;  // tenths of a second, in which clocks rise
    launch("multiply_tiles", multiply_tiles<Bf16, kUnroll>, {facts.multiprocessors, kThreads}, loop, stream);
    check(cudaStreamSynchronize(stream), "the first kernel");
  }

  // Seconds per step, or nothing where such a launch cannot run at once.
  std::optional<Quartiles> steps(void (*kernel)(Loop), const LaunchShape& shape, Loop loop, int steps) {
    if (shape.cluster > facts.largest_cluster || resident_blocks(kernel, shape) < shape.blocks) return std::nullopt;
    const auto run = [&](int count) {
      loop.steps = count;
      check(cudaMemsetAsync(loop.flags, 0, size_t(shape.blocks * kFlagStride) * sizeof(unsigned), stream), "memory");
      return timer.seconds([&] { launch("a latency's kernel", kernel, shape, loop, stream); }, stream);
    };
    run(steps);
    std::vector<double> found;
    for (int round = 0; round < kRounds; ++round) {
      const double less = run(steps);
      found.push_back((run(3 * steps) - less) / (2 * steps));
    }
    return quartiles(found);
  }
};

void print(const std::string& name, const char* unit, const std::optional<Quartiles>& found) {
  if (!found) {
    std::printf("{\"name\": \"%s\", \"skipped\": \"this GPU cannot run such a launch\"}\n", name.c_str());
    return;
  }
  std::printf("{\"name\": \"%s\", \"unit\": \"%s\", \"value\": %.6g, \"low\": %.6g, \"high\": %.6g}\n", name.c_str(),
              unit, found->middle, found->low, found->high);
}
void print_ns(const std::string& name, const std::optional<Quartiles>& found, double parts = 1) {
  const double scale = 1e9 / parts;
  print(name, "ns",
        found ? std::optional<Quartiles>({scale * found->low, scale * found->middle, scale * found->high}) : found);
}
void print_rate(const std::string& name, const char* unit, double amount, const std::optional<Quartiles>& found) {
  print(name, unit,
        found ? std::optional<Quartiles>({amount / found->high, amount / found->middle, amount / found->low}) : found);
}

struct Probe {
  std::string name;
  std::function<void(Bench&, const std::string&)> run;
};

void add_cluster_probes(std::vector<Probe>& probes) {
  for (int cluster = 2; cluster <= 16; cluster *= 2) {
    const std::string of = ", " + std::to_string(cluster) + " blocks";
    probes.push_back({"cluster barrier" + of, [=](Bench& bench, const std::string& name) {
                        Loop loop = bench.memory;
                        loop.cluster = cluster;
                        print_ns(name, bench.steps(cluster_barrier, {cluster, kThreads, 0, cluster}, loop, 2000));
                      }});
    for (int kib = 1; kib <= 16; kib *= 2) {
      probes.push_back(
          {"cluster exchange" + of + ", " + std::to_string(kib) + " KiB", [=](Bench& bench, const std::string& name) {
             Loop loop = bench.memory;
             loop.cluster = cluster;
             loop.words = kib * 1024 / int(sizeof(Word));
             loop.own_log2 = log2_of(loop.words / cluster);
             const size_t shared = 2 * size_t(loop.words) * sizeof(Word);
             print_ns(name, bench.steps(cluster_exchange, {cluster, kThreads, shared, cluster}, loop, 1000));
           }});
    }
    probes.push_back({"cluster read" + of + ", all clusters", [=](Bench& bench, const std::string& name) {
                        Loop loop = bench.memory;
                        loop.cluster = cluster;
                        loop.words = int(kShared / sizeof(Word));
                        LaunchShape shape{cluster, kThreads, kShared, cluster};
                        shape.blocks = std::max(cluster, std::min(resident_blocks(read_cluster, shape),
                                                                  bench.facts.multiprocessors / cluster * cluster));
                        const auto found = bench.steps(read_cluster, shape, loop, 2000);
                        print_rate(name, "GB/s", 1e-9 * kReadBytes * shape.blocks, found);
                      }});
  }
}

void add_grid_probes(std::vector<Probe>& probes) {
  probes.push_back({"flag through L2, one way", [](Bench& bench, const std::string& name) {
                      print_ns(name, bench.steps(flag_ping_pong, {2, kThreads, 0, 1, true}, bench.memory, 2000), 2);
                    }});
  for (int blocks = 8; blocks <= 128; blocks *= 2) {
    for (int kib = 2; kib <= 16; kib *= 2) {
      probes.push_back({"grid exchange, " + std::to_string(blocks) + " blocks, " + std::to_string(kib) + " KiB",
                        [=](Bench& bench, const std::string& name) {
                          Loop loop = bench.memory;
                          loop.words = kib * 1024 / int(sizeof(Word));
                          loop.own_log2 = log2_of(loop.words / blocks);
                          print_ns(name, bench.steps(grid_exchange, {blocks, kThreads, 0, 1, true}, loop, 1000));
                        }});
    }
  }
  probes.push_back({"grid barrier, atomics", [](Bench& bench, const std::string& name) {
                      const LaunchShape shape{bench.facts.multiprocessors, kThreads, 0, 1, true};
                      print_ns(name, bench.steps(grid_barrier, shape, bench.memory, 1000));
                    }});
  probes.push_back({"grid barrier, cooperative groups", [](Bench& bench, const std::string& name) {
                      const LaunchShape shape{bench.facts.multiprocessors, kThreads, 0, 1, true};
                      print_ns(name, bench.steps(cooperative_barrier, shape, bench.memory, 1000));
                    }});
}

void launch_empty(const Bench& bench, int count) {
  for (int i = 0; i < count; ++i) launch("empty", empty, {1, kThreads}, bench.memory, bench.stream);
}

class Graph {
 public:
  Graph(const Bench& bench, int kernels) {
    cudaGraph_t graph;
    check(cudaStreamBeginCapture(bench.stream, cudaStreamCaptureModeThreadLocal), "a capture");
    launch_empty(bench, kernels);
    check(cudaStreamEndCapture(bench.stream, &graph), "a capture");
    check(cudaGraphInstantiate(&ready_, graph, 0), "a graph");
    check(cudaGraphDestroy(graph), "a graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(ready_); }
  void launch(const Bench& bench) const { check(cudaGraphLaunch(ready_, bench.stream), "a graph"); }

 private:
  cudaGraphExec_t ready_;
};

template <class Work>
Quartiles rounds(const Work& seconds) {
  seconds();
  std::vector<double> found;
  for (int round = 0; round < kRounds; ++round) found.push_back(seconds());
  return quartiles(found);
}

template <class Work>
double host_seconds(Bench& bench, const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 20; ++i) {
    work();
    check(cudaStreamSynchronize(bench.stream), "what was timed");
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 20;
}

void add_launch_probes(std::vector<Probe>& probes) {
  probes.push_back({"kernel launch, one after another", [](Bench& bench, const std::string& name) {
                      print_ns(name, rounds([&] {
                                 return bench.timer.seconds([&] { launch_empty(bench, kLaunches); }, bench.stream);
                               }),
                               kLaunches);
                    }});
  probes.push_back({"kernel launch and synchronisation, host", [](Bench& bench, const std::string& name) {
                      print_ns(name, rounds([&] { return host_seconds(bench, [&] { launch_empty(bench, 1); }); }));
                    }});
  probes.push_back({"kernel of a graph of 1000", [](Bench& bench, const std::string& name) {
                      const Graph graph(bench, kLaunches);
                      print_ns(name,
                               rounds([&] { return bench.timer.seconds([&] { graph.launch(bench); }, bench.stream); }),
                               kLaunches);
                    }});
  probes.push_back({"graph launch of one kernel, one after another", [](Bench& bench, const std::string& name) {
                      const Graph graph(bench, 1);
                      const auto work = [&] {
                        for (int i = 0; i < kLaunches; ++i) graph.launch(bench);
                      };
                      print_ns(name, rounds([&] { return bench.timer.seconds(work, bench.stream); }), kLaunches);
                    }});
  probes.push_back({"graph launch and synchronisation, host", [](Bench& bench, const std::string& name) {
                      const Graph graph(bench, 1);
                      print_ns(name, rounds([&] { return host_seconds(bench, [&] { graph.launch(bench); }); }));
                    }});
}

template <class T, int kChains>
void add_product_probe(std::vector<Probe>& probes, const std::string& type, int depth) {
  const double flop = 2.0 * 16 * 8 * depth * kChains * (kThreads / 32);
  const std::string of = "mma m16n8k" + std::to_string(depth) + " " + type;
  probes.push_back(
      {kChains == 1 ? of + ", one after another" : of + ", all blocks", [=](Bench& bench, const std::string& name) {
         const int blocks = kChains == 1 ? 1 : 2 * bench.facts.multiprocessors;
         const auto found = bench.steps(multiply_tiles<T, kChains>, {blocks, kThreads}, bench.memory, 5000);
         if (kChains == 1)
           print_ns(name, found);
         else
           print_rate(name, "TFLOP/s", 1e-12 * flop * blocks, found);
       }});
}

void add_rate_probes(std::vector<Probe>& probes) {
  for (const int mib : {1, 16}) {
    probes.push_back(
        {"L2 read, all blocks, " + std::to_string(mib) + " MiB", [=](Bench& bench, const std::string& name) {
           Loop loop = bench.memory;
           loop.words = (mib << 20) / int(sizeof(Word));
           const int blocks = 4 * bench.facts.multiprocessors;
           const auto found = bench.steps(read_l2, {blocks, kThreads}, loop, 500);
           print_rate(name, "GB/s", 1e-9 * kReadBytes * blocks, found);
         }});
  }
  add_product_probe<Bf16, 1>(probes, "bf16", 16);
  add_product_probe<Bf16, kUnroll>(probes, "bf16", 16);
  add_product_probe<F16, kUnroll>(probes, "fp16", 16);
  add_product_probe<float, kUnroll>(probes, "tf32", 8);
  probes.push_back({"exp2 and reciprocal, all blocks", [](Bench& bench, const std::string& name) {
                      const int blocks = 4 * bench.facts.multiprocessors;
                      const auto found = bench.steps(special_functions, {blocks, kThreads}, bench.memory, 2000);
                      print_rate(name, "Gop/s", 1e-9 * 2 * kUnroll * kThreads * blocks, found);
                    }});
}

int run(bool list) {
  std::vector<Probe> probes;
  add_cluster_probes(probes);
  add_grid_probes(probes);
  add_launch_probes(probes);
  add_rate_probes(probes);
  if (list) {
    for (const Probe& probe : probes) std::printf("%s\n", probe.name.c_str());
    return 0;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "no GPU is found\n");
    return 2;
  }
  Bench bench;
  for (const Probe& probe : probes) {
    probe.run(bench, probe.name);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace rnnkern::cuda

int main(int count, char** arguments) {
  try {
    return rnnkern::cuda::run(count > 1 && std::strcmp(arguments[1], "--list") == 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
