// Streams beside the caller's, for work that may overlap with what the caller's stream does meanwhile. Ordered by
// events alone: nothing waits on the CPU, and a CUDA graph that captures the caller's stream captures these.
//
// Memory that side streams use must have been allocated on the caller's stream before `run`, and be kept until `join`;
// then torch's allocator need not know of them.
#pragma once

#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace rnnkern::cuda {

#ifdef RNNKERN_EMULATED

// Work is kept back until it is joined: the latest that the events allow, so that a join that is missing shows. With
// RNNKERN_EMULATED_STREAMS=early in the environment it runs at once, so that it shows whatever it needs that is only
// made afterwards. A fork that is missing shows in neither: the caller's stream has no work that is still to be done.
class SideStreams {
 public:
  SideStreams(void*, int count) : waiting_(size_t(count)) {
    const char* const schedule = std::getenv("RNNKERN_EMULATED_STREAMS");
    early_ = schedule && std::string(schedule) == "early";
  }

  void run(int which, const std::function<void(void*)>& launch) {
    if (early_)
      launch(nullptr);
    else
      waiting_[size_t(which)].push_back(launch);
  }
  void join(int which) {
    std::vector<std::function<void(void*)>> work;
    work.swap(waiting_[size_t(which)]);
    for (const auto& launch : work) launch(nullptr);
  }
  void join() {
    for (size_t which = 0; which < waiting_.size(); ++which) join(int(which));
  }

 private:
  std::vector<std::vector<std::function<void(void*)>>> waiting_;
  bool early_;
};

#else

class SideStreams {
 public:
  // `main`: the caller's stream, on the current device.
  SideStreams(void* main, int count) : main_(Stream(main)), busy_(size_t(count), false) {
    const Lock lock(mutex());
    sides_ = &sides_of(main_);
    while (int(sides_->size()) < count) sides_->push_back(create(main_));
  }
  SideStreams(const SideStreams&) = delete;
  SideStreams& operator=(const SideStreams&) = delete;
  // Work that an exception left behind: its memory may be used again on the caller's stream.
  ~SideStreams() {
    for (size_t which = 0; which < busy_.size(); ++which) {
      try {
        join(int(which));
      } catch (const std::runtime_error&) {  // the others are joined nevertheless
      }
    }
  }

  // launch(stream) on side stream `which`, after all that the caller's stream has had until now.
  void run(int which, const std::function<void(void*)>& launch) {
    const Side side = at(which);
    let_wait(main_, side.stream, side.event);
    busy_[size_t(which)] = true;
    launch(side.stream);
  }
  // The caller's stream waits for all that side stream `which` has had until now.
  void join(int which) {
    if (!busy_[size_t(which)]) return;
    const Side side = at(which);
    let_wait(side.stream, main_, side.event);
    busy_[size_t(which)] = false;
  }
  void join() {
    for (size_t which = 0; which < busy_.size(); ++which) join(int(which));
  }

 private:
  using Lock = std::lock_guard<std::mutex>;
  struct Side {
    Stream stream;
    cudaEvent_t event;
  };

  // Of the caller's stream's priority.
  static Side create(Stream main) {
    // The caller's stream may be captured, of which a new stream is no part.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "the mode of stream capture");
    Side side{};
    int priority = 0;
    cudaError_t error = cudaStreamGetPriority(main, &priority);
    if (error == cudaSuccess) error = cudaStreamCreateWithPriority(&side.stream, cudaStreamNonBlocking, priority);
    if (error == cudaSuccess) {
      error = cudaEventCreateWithFlags(&side.event, cudaEventDisableTiming);
      if (error != cudaSuccess) cudaStreamDestroy(side.stream);
    }
    check(cudaThreadExchangeStreamCaptureMode(&mode), "the mode of stream capture");
    check(error, "cannot create a stream and its event");
    return side;
  }
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  // Created once and kept, for each of the streams that callers use: two streams of one program do not wait for one
  // another here either, and what is being captured does not meet what is not.
  static std::vector<Side>& sides_of(Stream main) {
    static std::map<std::pair<int, Stream>, std::vector<Side>> sides;
    return sides[{current_device(), main}];
  }
  Side at(int which) const {
    const Lock lock(mutex());  // another thread on the same stream may need more of them
    return (*sides_)[size_t(which)];
  }
  static void let_wait(Stream first, Stream second, cudaEvent_t event) {
    const Lock lock(mutex());  // of two threads on the same stream, neither may record the event in between
    check(cudaEventRecord(event, first), "cannot record an event");
    check(cudaStreamWaitEvent(second, event, 0), "cannot wait for an event");
  }

  const Stream main_;
  std::vector<Side>* sides_;
  std::vector<bool> busy_;
};

#endif

}  // namespace rnnkern::cuda
