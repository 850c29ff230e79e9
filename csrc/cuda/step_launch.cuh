// Launches a fused step: the kernel for one batch row or for tiles of several, and how many blocks.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/step_attention.cuh"

namespace rnnkern::cuda::step {

template <class Cell, int kRows, class S>
void launch_rows(const CellStep<S>& a, Stream stream) {
  launch("cell_step", cell_step<Cell, kRows, S>,
         {CellTile<Cell, kRows>::jobs(a.H, a.B), kThreads, kCellShared<Cell, kRows>}, a, stream);
}

template <class Cell, int kRows, class S>
void launch_rows(const AttentionStep<S>& a, Stream stream) {
  LaunchShape shape{0, kThreads, kAttentionShared<Cell, kRows, S>};
  shape.cooperative = true;
  const int B = a.cell.B;
  const int64_t jobs = std::max<int64_t>({CellTile<Cell, kRows>::jobs(a.cell.H, B), B * step_splits(a.Tk),
                                          a.w_query ? Tile<1, 0, kRows>::jobs(a.D, B) : 0});
  const int resident = kept_resident_blocks(attention_step<Cell, kRows, S>, shape);
  if (resident == 0) throw std::runtime_error("cannot launch " + describe("attention_step", shape) + ": none fits");
  shape.blocks = int(std::min<int64_t>(jobs, resident));
  launch("attention_step", attention_step<Cell, kRows, S>, shape, a, stream);
}

inline const CellStep<void>& cell_of(const CellStep<void>& a) { return a; }
inline const CellStep<void>& cell_of(const AttentionStep<void>& a) { return a.cell; }

}  // namespace rnnkern::cuda::step

namespace rnnkern::cuda {

template <class Cell, class S, template <class> class Step>
void launch_step(const Step<void>& a, void* stream) {
  const CellStep<void>& cell = step::cell_of(a);
  if (cell.B == 0) return;
  if (cell.h_next == cell.h) throw std::runtime_error("a step cannot write h in place: other blocks still read it");
  const Step<S> arguments = typed<Step<S>>(a);
  if (cell.B == 1)
    step::launch_rows<Cell, 1>(arguments, Stream(stream));
  else
    step::launch_rows<Cell, step::kMostRows>(arguments, Stream(stream));
}

}  // namespace rnnkern::cuda
