// Launches kernels of one argument, and tells what the device is. Emulated like device.h; never synchronises.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#ifdef RNNKERN_EMULATED
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace rnnkern::cuda {

struct LaunchShape {
  int blocks, threads;
  size_t shared_bytes = 0;
  int cluster = 1;           // blocks of a cluster
  bool cooperative = false;  // all blocks run at once
};

struct DeviceFacts {
  int capability;  // 90: 9.0
  int multiprocessors;
  size_t shared_bytes;  // that a block may ask for
  int largest_cluster;  // 1: none
};

// Blocks of a launch, which counts them in 31 bits.
inline int checked_blocks(int64_t blocks, const char* name) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(name) + " needs " + std::to_string(blocks) +
                             " blocks, more than a launch may have: the sizes are too large");
  return int(blocks);
}

inline std::string describe(const char* name, const LaunchShape& shape) {
  return std::string(name) + " with " + std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
         " threads, " + std::to_string(shape.shared_bytes) + " bytes of shared memory, clusters of " +
         std::to_string(shape.cluster);
}

#ifdef RNNKERN_EMULATED

using Stream = void*;

// An H100's, which the engines are built for.
inline DeviceFacts device_facts() { return {90, 132, 227 << 10, 16}; }

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), const LaunchShape& shape, const Arguments& arguments, Stream) {
  if (shape.blocks == 0) return;
  if (shape.shared_bytes > device_facts().shared_bytes || shape.cluster > device_facts().largest_cluster)
    throw std::runtime_error("cannot launch " + describe(name, shape));
  emulator::launch({shape.blocks, shape.threads, shape.shared_bytes, shape.cluster, shape.cooperative},
                   [&] { kernel(arguments); });
}

inline void clear(void* memory, size_t bytes, Stream) { std::memset(memory, 0, bytes); }

inline int current_device() { return 0; }
template <class Arguments>
int registers_of(void (*)(Arguments)) {
  return 0;  // has none
}

// How many blocks of such a launch, whole clusters, can run at once.
template <class Arguments>
int resident_blocks(void (*)(Arguments), const LaunchShape& shape) {
  return device_facts().multiprocessors / shape.cluster * shape.cluster;
}

#else

using Stream = cudaStream_t;

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not find it
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  return device;
}

inline DeviceFacts device_facts() {
  const int device = current_device();
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "the device's attributes");
    return value;
  };
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return {capability, attribute(cudaDevAttrMultiProcessorCount),
          size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)), capability >= 90 ? 16 : 1};
}

template <class Arguments>
cudaFuncAttributes attributes_of(void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "a kernel's attributes");
  return attributes;
}

// Lets the kernel have all the shared memory, and the clusters, that the device has: once, since the attributes are the
// kernel's and not the launch's, and other threads may launch it at the same time.
template <class Arguments>
void prepare(void (*kernel)(Arguments)) {
  static std::mutex mutex;
  static std::set<std::pair<void (*)(Arguments), int> > prepared;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<void (*)(Arguments), int> key(kernel, current_device());
  if (prepared.count(key)) return;
  const DeviceFacts facts = device_facts();
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(facts.shared_bytes - attributes_of(kernel).sharedSizeBytes)),
        "a kernel's shared memory");
  if (facts.largest_cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "a kernel's clusters");
  prepared.insert(key);
}

inline cudaLaunchConfig_t configuration(const LaunchShape& shape, cudaLaunchAttribute (&attributes)[2], Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {unsigned(shape.cluster), 1, 1};
    config.numAttrs++;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    config.numAttrs++;
  }
  return config;
}

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), const LaunchShape& shape, const Arguments& arguments,
            Stream stream) {
  if (shape.blocks == 0) return;
  prepare(kernel);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(shape, attributes, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  if (error != cudaSuccess) check(error, "cannot launch " + describe(name, shape));
}

// Of a thread.
template <class Arguments>
int registers_of(void (*kernel)(Arguments)) {
  return attributes_of(kernel).numRegs;
}

// Zeros, on the stream.
inline void clear(void* memory, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "cannot clear " + std::to_string(bytes) + " bytes");
}

template <class Arguments>
int resident_blocks(void (*kernel)(Arguments), const LaunchShape& shape) {
  // Of an older GPU's code, that the driver compiled for this one, cluster instructions are traps (device.h).
  if (shape.cluster > 1 && attributes_of(kernel).ptxVersion < 90) return 0;
  prepare(kernel);
  int count = 0;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(shape, attributes, nullptr);
  const cudaError_t error = shape.cluster > 1 ? cudaOccupancyMaxActiveClusters(&count, kernel, &config)
                                              : cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                                                    &count, kernel, shape.threads, shape.shared_bytes);
  if (error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ||
      error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();
    return 0;  // such a launch cannot be
  }
  check(error, "the occupancy of a kernel");
  return count * (shape.cluster > 1 ? shape.cluster : device_facts().multiprocessors);
}

#endif

// The same, kept for each kernel, device and shape: to ask takes longer than a step. For kernels of few shapes.
template <class Arguments>
int kept_resident_blocks(void (*kernel)(Arguments), const LaunchShape& shape) {
  using Key = std::tuple<void (*)(Arguments), int, int, size_t, int>;
  static std::mutex mutex;
  static std::map<Key, int> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key(kernel, current_device(), shape.threads, shape.shared_bytes, shape.cluster);
  auto found = kept.find(key);
  if (found == kept.end()) found = kept.emplace(key, resident_blocks(kernel, shape)).first;
  return found->second;
}

}  // namespace rnnkern::cuda
