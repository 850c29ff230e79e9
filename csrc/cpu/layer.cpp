// Plans a call: rows sorted by length, threads, workspace, the kernels of the current instruction set.
#include "cpu/layer.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "cpu/isa.h"
#include "cpu/layer_kernels.h"
#include "cpu/workspace.h"
#include "rnnkern_cells.h"
#include "rnnkern_lists.h"

#define RNNKERN_DECLARE(isa, cell)                 \
  namespace rnnkern::isa {                         \
  const LayerKernels& cell##_kernels(Dtype dtype); \
  }
RNNKERN_FOR_EACH_ISA_AND_CELL(RNNKERN_DECLARE)
#undef RNNKERN_DECLARE

namespace rnnkern {
namespace {

// Calls of at most so many steps pack weights block by block as they use them: to write and read packs takes as long.
constexpr int64_t kStepsUnpacked = 4;
constexpr int kSamples = 32;                // sampled elements per weight, see stale_pack
constexpr int kFingerprint = 8 * kSamples;  // 64-bit words before the packed weights
// Multiply-adds of the forward pass below which one thread runs alone. An idle thread takes milliseconds to wake, which
// a stream of short calls would meet each time; training steps follow each other closely.
constexpr double kSerialTrainingWork = 5e5;
constexpr double kMemberWork = 1e5;  // the least that a member is worth its share of the exchange for

#define RNNKERN_NUMBER(cell, Struct) number_of_##cell,
enum { RNNKERN_FOR_EACH_CELL(RNNKERN_NUMBER) };  // a cell's index in cell_traits()
#undef RNNKERN_NUMBER

const LayerKernels& kernels_of(int cell, Dtype dtype) {
  const Isa isa = current_isa();
#define RNNKERN_PICK(isa_, cell_) \
  if (isa == Isa::isa_ && cell == number_of_##cell_) return isa_::cell_##_kernels(dtype);
  RNNKERN_FOR_EACH_ISA_AND_CELL(RNNKERN_PICK)
#undef RNNKERN_PICK
  throw std::runtime_error("no kernels for cell '" + cell_traits().at(size_t(cell)).name + "'");
}

// An array whose memory is its own while it is short: a short call asks the allocator for nothing.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) {
    if (size <= kShort) return;
    long_.resize(size_t(size));
    data_ = long_.data();
  }
  Array(const Array&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  static constexpr int64_t kShort = 16;
  T short_[kShort] = {};
  std::vector<T> long_;
  T* data_ = short_;
};

// The plan together with the arrays that it points to.
class Plan {
 public:
  Plan(int cell, const LayerInputs& in, const ParallelFor& parallel, bool training)
      : order_(in.B), length_(in.B), alive_(in.T), first_row_(in.T + 1) {
    std::iota(order_.data(), order_.data() + in.B, 0);
    if (in.lengths) {
      std::stable_sort(order_.data(), order_.data() + in.B,
                       [&](int32_t a, int32_t b) { return in.lengths[a] > in.lengths[b]; });
    }
    for (int64_t m = 0; m < in.B; ++m) length_[m] = in.lengths ? in.lengths[order_[m]] : in.T;
    plan.steps = in.B > 0 ? length_[0] : 0;
    int64_t rows = in.B;
    for (int64_t t = 0; t < plan.steps; ++t) {
      while (length_[rows - 1] <= t) --rows;
      alive_[t] = int32_t(rows);
      first_row_[t + 1] = first_row_[t] + rows;
    }
    const double work = double(in.D) * double(plan.steps) * double(in.B) * double(cell_traits()[cell].gates) *
                        double(in.H) * double(in.I + in.H);
    plan.in = &in;
    plan.pack = plan.steps > kStepsUnpacked;
    plan.order = order_.data();
    plan.length = length_.data();
    plan.alive = alive_.data();
    plan.first_row = first_row_.data();
    const double serial = training ? kSerialTrainingWork : parallel.awake ? kWorthAwakeThreads : kSerialWork;
    plan.members = work < serial ? 1 : int(std::clamp(double(parallel.threads), 1.0, work / kMemberWork));
    if (plan.members > 1) flags_.resize(size_t(plan.members));
    plan.flags = plan.members > 1 ? flags_.data() : &alone_;
  }
  LayerPlan plan{};

 private:
  Array<int32_t> order_;
  Array<int64_t> length_;
  Array<int32_t> alive_;
  Array<int64_t> first_row_;
  std::vector<Flag> flags_;
  Flag alone_;
};

template <class Word>
uint64_t word_at(const void* data, uint64_t at) {
  Word word;
  memcpy(&word, static_cast<const Word*>(data) + at, sizeof(word));
  return word;
}

// A few elements of each weight as they lie in memory, spread over rows and columns by the golden ratio: element
// frac((s + 1) * ratio) * count, without a division, which would cost a short call a third of a microsecond. Mixed with
// the instruction set, since packs differ by it.
template <class Matrix, class Word>
void sample_words(const LayerInputs& in, int gates, uint64_t* samples) {
  const uint64_t mark = uint64_t(current_isa()) << 32;
  for (int d = 0; d < 2; ++d) {
    const LayerWeights& w = in.weights[d];
    const void* const data[4] = {w.w_ih, w.w_hh, w.b_ih, w.b_hh};
    const void* const scales[4] = {w.scale_ih, w.scale_hh, nullptr, nullptr};
    const uint64_t rows = uint64_t(gates * in.H),
                   counts[4] = {rows * uint64_t(in.I), rows * uint64_t(in.H), rows, rows};
    for (int i = 0; i < 4; ++i, samples += kSamples) {
      if (d >= in.D || !data[i] || counts[i] == 0) {
        std::fill_n(samples, kSamples, 0);
        continue;
      }
      for (uint64_t s = 0; s < kSamples; ++s) {
        const auto at = [&](uint64_t count) {
          return uint64_t(static_cast<unsigned __int128>((s + 1) * 0x9e3779b97f4a7c15) * count >> 64);
        };
        samples[s] = (i < 2 ? word_at<Matrix>(data[i], at(counts[i])) : word_at<Word>(data[i], at(counts[i]))) ^ mark;
        if (scales[i]) samples[s] ^= word_at<Word>(scales[i], at(rows)) << 8;
      }
    }
  }
}

void sample_weights(const LayerInputs& in, int gates, uint64_t* samples) {
  if (in.dtype == Dtype::f32w8) return sample_words<uint8_t, uint32_t>(in, gates, samples);
  switch (dtype_size(in.dtype)) {
    case 2:
      return sample_words<uint16_t, uint16_t>(in, gates, samples);
    case 4:
      return sample_words<uint32_t, uint32_t>(in, gates, samples);
    default:
      return sample_words<uint64_t, uint64_t>(in, gates, samples);
  }
}

ParallelFor limited(const ParallelFor& parallel, int members) {
  return {parallel.run, std::min(parallel.threads, members), parallel.awake};
}

}  // namespace

const std::vector<CellTraits>& cell_traits() {
#define RNNKERN_TRAITS(cell, Struct) {#cell, Struct::kGates, Struct::kStates, Struct::kSaved, Struct::kSplitGates},
  static const std::vector<CellTraits> traits = {RNNKERN_FOR_EACH_CELL(RNNKERN_TRAITS)};
#undef RNNKERN_TRAITS
  return traits;
}

int find_cell(const std::string& name) {
  const std::vector<CellTraits>& traits = cell_traits();
  for (size_t i = 0; i < traits.size(); ++i) {
    if (traits[i].name == name) return int(i);
  }
  throw std::runtime_error("unknown cell '" + name + "'");
}

int64_t saved_size(int cell, const LayerInputs& in) {
  const CellTraits& traits = cell_traits()[cell];
  int64_t rows = in.T * in.B;
  if (in.packed_rows) rows = std::accumulate(in.lengths, in.lengths + in.B, int64_t(0));
  return in.D * rows * ((in.H + 15) / 16 * 16) * (traits.saved + traits.states - 1);
}

int64_t packed_size(int cell, const LayerInputs& in) {
  const int64_t fingerprint = kFingerprint * int64_t(sizeof(uint64_t)) / compute_size(in.dtype);
  return fingerprint + in.D * kernels_of(cell, in.dtype).packed_size(in);
}

void pack_layer(int cell, const LayerInputs& in, void* packed, const ParallelFor& parallel) {
  const LayerKernels& kernels = kernels_of(cell, in.dtype);
  sample_weights(in, cell_traits()[cell].gates, static_cast<uint64_t*>(packed));
  void* weights = static_cast<uint64_t*>(packed) + kFingerprint;
  const int64_t blocks = (in.H + 15) / 16;
  run_parallel(parallel, in.D * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.pack(in, int(i / blocks), i % blocks, i % blocks + 1, weights);
  });
}

bool stale_pack(int cell, const LayerInputs& in) {
  uint64_t samples[kFingerprint];
  sample_weights(in, cell_traits()[cell].gates, samples);
  return memcmp(samples, in.packed, sizeof(samples)) != 0;
}

void layer_forward(int cell, const LayerInputs& in, const LayerOutputs& out, const ParallelFor& parallel) {
  layer_forward(cell, in, out, parallel, in.packed && !stale_pack(cell, in));
}

void layer_forward(int cell, const LayerInputs& in, const LayerOutputs& out, const ParallelFor& parallel,
                   bool packed_is_valid) {
  if (in.B == 0) return;
  const LayerKernels& kernels = kernels_of(cell, in.dtype);
  Plan owner(cell, in, parallel, out.saved != nullptr);
  LayerPlan& plan = owner.plan;
  const ParallelFor threads = limited(parallel, plan.members);
  if (packed_is_valid) {
    plan.packed = const_cast<uint64_t*>(static_cast<const uint64_t*>(in.packed)) + kFingerprint;
  } else if (plan.pack || in.dtype == Dtype::f32w8) {
    void* packed = workspace(kPackedSlot, size_t(packed_size(cell, in) * compute_size(in.dtype)));
    pack_layer(cell, in, packed, threads);
    plan.packed = static_cast<uint64_t*>(packed) + kFingerprint;
  }
  plan.workspace = workspace(kWorkspaceSlot, kernels.forward_bytes(plan));
  run_team(threads, plan.members, [&](const Member& member) { kernels.forward(plan, out, member); });
}

void layer_backward(int cell, const LayerInputs& in, const LayerGradients& grad, const ParallelFor& parallel) {
  if (in.B == 0) return;
  const LayerKernels& kernels = kernels_of(cell, in.dtype);
  Plan owner(cell, in, parallel, true);
  LayerPlan& plan = owner.plan;
  const ParallelFor threads = limited(parallel, plan.members);
  plan.workspace = workspace(kWorkspaceSlot, kernels.backward_bytes(plan));
  const int64_t panels = kernels.backward_panels(in);
  if (plan.pack) plan.packed = workspace(kPackedSlot, size_t(in.D * panels * kernels.backward_panel_bytes(in)));
  run_parallel(threads, plan.pack ? in.D * panels : 0, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.pack_transposed(plan, int(i / panels), i % panels, i % panels + 1);
  });
  run_team(threads, plan.members, [&](const Member& member) { kernels.backward(plan, grad, member); });
  if (in.T == 0) {
    kernels.finish_backward(plan, grad, 0, 0);
  } else if (in.D == 2 || (in.lengths && !in.packed_rows) || in.dtype == Dtype::bf16 || in.dtype == Dtype::f16) {
    run_parallel(threads, in.T, [&](int64_t begin, int64_t end) { kernels.finish_backward(plan, grad, begin, end); });
  }
}

}  // namespace rnnkern
