#include "torch/threads.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace rnnkern {
namespace {

bool forked = false;  // written while a child has one thread only
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// A thread's short calls that follow each other without a pause. They run on one thread for longer than others take to
// wake, so that no streak takes much longer than it would alone; then some are divided, and the way that proves faster
// holds for long.
class Streak {
 public:
  static constexpr int64_t kPause = 200000, kAlone = 20000000;  // ns
  static constexpr int kWaking = 8, kTry = 25, kKeep = 4096;    // calls

  // Whether a call that begins now is to be divided.
  bool begin(int64_t now, int threads) {
    const bool same = last_caller_.exchange(this) == this && threads == threads_;
    if (threads != threads_) refused_ = 0;
    threads_ = threads;
    if (!same || now - last_ > kPause) start_over(now);
    divided_ = now - start_ > kAlone && refused_ == 0;
    return divided_;
  }
  void end(int64_t begin, int64_t now, double work) {
    last_ = now;
    if (refused_ > 0) {
      if (--refused_ == 0) start_over(now);
      return;
    }
    const double time = double(now - begin);
    if (!divided_) {
      time_ += time;
      work_ += work;
    } else if (tried_ < kWaking + kTry && ++tried_ > kWaking) {
      faster_ += time * work_ < time_ * work;
      if (tried_ == kWaking + kTry && faster_ * 2 <= kTry) refused_ = kKeep;
    }
  }

 private:
  void start_over(int64_t now) {
    start_ = now;
    tried_ = faster_ = 0;
    time_ = work_ = 0;
  }

  static std::atomic<const void*> last_caller_;
  int64_t start_ = 0, last_ = 0;
  int threads_ = 0;
  bool divided_ = false;
  int tried_ = 0, faster_ = 0;  // divided calls of this streak, and those of them that beat the calls before
  int refused_ = 0;             // calls to be made on one thread yet
  double time_ = 0, work_ = 0;  // of this streak's calls on one thread
};
std::atomic<const void*> Streak::last_caller_{nullptr};
thread_local Streak streak;

}  // namespace

ShortCallThreads::ShortCallThreads(double work) : work_(work), begin_(nanoseconds()), threads_(torch_threads()) {
  if (threads_.threads > 1) threads_.awake = streak.begin(begin_, threads_.threads);
}
ShortCallThreads::~ShortCallThreads() {
  if (threads_.threads > 1) streak.end(begin_, nanoseconds(), work_);
}

ParallelFor torch_threads() {
  return {[](int64_t count, ParallelFor::Body body, void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          forked ? 1 : int(torch::stable::get_num_threads())};
}

}  // namespace rnnkern
