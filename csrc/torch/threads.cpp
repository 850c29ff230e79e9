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

// A thread's short calls in a row. Some run on one thread, and the later ones of them are timed; then some are divided
// and timed likewise; then the better way holds for long.
class Row {
 public:
  static constexpr int64_t kPause = 200000;  // ns
  static constexpr int kTry = 16, kTimed = 8, kKeep = 4096;

  // Whether a call that begins now is to be divided.
  bool begin(int64_t now) {
    if (last_caller_.exchange(this) != this || now - last_ > kPause) start_over();
    return calls_ >= kTry && alone_ == 0;
  }
  void end(int64_t begin, int64_t now, double work) {
    last_ = now;
    if (alone_ > 0) {
      if (--alone_ == 0) start_over();
      return;
    }
    const int phase = calls_ / kTry;
    if (phase < 2 && calls_ % kTry >= kTry - kTimed) {
      time_[phase] += double(now - begin);
      work_[phase] += work;
    }
    if (++calls_ == 2 * kTry && time_[1] * work_[0] > time_[0] * work_[1]) alone_ = kKeep;
    if (calls_ == kKeep) start_over();
  }

 private:
  void start_over() {
    calls_ = 0;
    time_[0] = time_[1] = work_[0] = work_[1] = 0;
  }

  static std::atomic<const void*> last_caller_;
  int64_t last_ = 0;
  int calls_ = 0, alone_ = 0;  // in this row; still to be made on one thread
  double time_[2] = {}, work_[2] = {};
};
std::atomic<const void*> Row::last_caller_{nullptr};
thread_local Row row;

}  // namespace

ShortCallThreads::ShortCallThreads(double work) : work_(work), begin_(nanoseconds()), awake_(row.begin(begin_)) {}
ShortCallThreads::~ShortCallThreads() { row.end(begin_, nanoseconds(), work_); }
ParallelFor ShortCallThreads::get() const {
  ParallelFor threads = torch_threads();
  threads.awake = awake_;
  return threads;
}

ParallelFor torch_threads() {
  return {[](int64_t count, ParallelFor::Body body, void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          forked ? 1 : int(torch::stable::get_num_threads())};
}

}  // namespace rnnkern
