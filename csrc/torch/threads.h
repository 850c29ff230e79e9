// torch's threads as a ParallelFor.
#pragma once

#include "cpu/isa.h"  // RNNKERN_API
#include "cpu/team.h"

namespace rnnkern {

// As many as torch.set_num_threads says. In a forked child the calling thread alone: torch's pool does not survive a
// fork, and OpenMP waits for ever for threads that the child does not have.
RNNKERN_API ParallelFor torch_threads();

// For a short call of so many multiply-adds, from here to the object's end. torch's threads spin for some milliseconds
// after a parallel call, and take as long to wake after that: calls are divided only once a thread has made them
// without a pause for 20 ms, and if that proves faster. Where threads outnumber the cores, it is several times slower.
class RNNKERN_API ShortCallThreads {
 public:
  explicit ShortCallThreads(double work);
  ShortCallThreads(const ShortCallThreads&) = delete;
  ~ShortCallThreads();
  const ParallelFor& get() const { return threads_; }

 private:
  const double work_;
  const int64_t begin_;
  ParallelFor threads_;
};

}  // namespace rnnkern
