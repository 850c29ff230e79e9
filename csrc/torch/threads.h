// torch's threads as a ParallelFor.
#pragma once

#include "cpu/isa.h"  // RNNKERN_API
#include "cpu/team.h"

namespace rnnkern {

// As many as torch.set_num_threads says. In a forked child the calling thread alone: torch's pool does not survive a
// fork, and OpenMP waits for ever for threads that the child does not have.
RNNKERN_API ParallelFor torch_threads();

}  // namespace rnnkern
