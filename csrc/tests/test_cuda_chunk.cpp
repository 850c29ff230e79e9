// Layers cut into chunks of time, emulated: the bits of the whole, forward and backward, by every engine; lengths that
// end within chunks, packed rows, resets at their edges.
#include "cuda/chunk.h"

#include "cuda_layer.h"
#include "rnnkern_cells.h"
#include "rnnkern_lists.h"

using namespace rnnkern_test;

namespace {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// The chunks of a layer, with the lengths and offsets that a caller sets.
template <class Cell, class S>
struct Cut {
  std::vector<Chunk> chunks;
  std::vector<std::vector<int64_t>> lengths, offsets;
  UnitBytes bytes{sizeof(S), sizeof(float), sizeof(S) * Cell::kGates, sizeof(S) * Cell::kSaved};
  emulator::GlobalMemory memory;

  Cut(const Layer<Cell, S>& l, int count) {
    const Sequence whole = l.sequence();
    const int64_t* const all = whole.lengths;
    const int64_t longest = all ? *std::max_element(all, all + whole.B) : whole.T;
    chunks = cut_steps(whole, all, longest, std::min<int64_t>(count, longest));
    for (Chunk& chunk : chunks) {
      if (!all) continue;
      lengths.push_back(lengths_in(chunk, all));
      memory.add(lengths.back().data(), lengths.back().size() * sizeof(int64_t));
      chunk.sequence.lengths = lengths.back().data();
      if (!whole.offsets) continue;
      std::vector<int64_t> first = {0};
      for (int64_t t = 0; t < chunk.sequence.T; ++t) {
        first.push_back(first.back());
        for (int64_t length : lengths.back()) first.back() += t < length;
      }
      offsets.push_back(first);
      memory.add(offsets.back().data(), offsets.back().size() * sizeof(int64_t));
      chunk.sequence.offsets = offsets.back().data();
    }
  }
};

// run(arguments): forward's or backward's.
template <class Cell, class S, class Run>
void check_chunks(const std::string& where, Layer<Cell, S>& l, const CellLaunchers& launchers, const Run& run) {
  const ForwardResult<Cell, S> f = forward(l, run);
  std::vector<S> h_before = poisoned<S>(f.y.size());
  {
    emulator::GlobalMemory memory;
    allow(memory, l.h0, f.y, h_before, l.p.lengths, l.p.resets, l.offsets);
    launchers.stepwise.previous_h({l.sequence(), l.c.H, l.h0.data(), f.y.data(), h_before.data()}, nullptr);
  }
  const BackwardResult<S> b = backward(l, f, h_before, run);
  for (int count : {2, 3, l.c.T}) {
    const Cut<Cell, S> cut(l, count);
    const std::string what = where + std::to_string(count) + " chunks ";
    const ForwardResult<Cell, S> forth = forward(l, [&](const Forward<void, void>& whole) {
      for (const Chunk& chunk : cut.chunks) run(part_of(whole, chunk, cut.bytes));
    });
    CHECK(same_bits(forth.y, f.y) && same_bits(forth.h_n, f.h_n) && same_bits(forth.saved, f.saved) &&
              same_bits(forth.c_n, f.c_n) && same_bits(forth.c_all, f.c_all) && same_bits(forth.c_before, f.c_before),
          "%sforward", what.c_str());
    const BackwardResult<S> back = backward(l, f, h_before, [&](const Backward<void, void>& whole) {
      for (size_t c = cut.chunks.size(); c-- > 0;) run(part_of(whole, cut.chunks[c], cut.bytes));
    });
    CHECK(same_bits(back.dgx, b.dgx) && same_bits(back.dgh, b.dgh) && same_bits(back.dh0, b.dh0) &&
              same_bits(back.dc0, b.dc0),
          "%sbackward", what.c_str());
  }
}

// One launch of a persistent engine, for either pass.
template <class Cell, class S>
struct Persistently {
  const CellLaunchers& launchers;
  Engine engine;
  Case c;

  PersistentPlan plan(Pass pass) const {
    return launchers.persistent.plan(engine, pass, Product::tf32x3, c.H, c.B, c.D, 1);
  }
  void operator()(const Forward<void, void>& f) const {
    const PersistentPlan p = plan(Pass::forward);
    std::vector<Vec<float, 4>> workspace = poisoned<Vec<float, 4>>(p.workspace_bytes / 16 + 1);
    emulator::GlobalMemory memory;
    memory.add(workspace.data(), p.workspace_bytes);
    launchers.persistent.forward(p, engine, Product::tf32x3, f, workspace.data(), nullptr);
  }
  void operator()(const Backward<void, void>& b) const {
    const PersistentPlan p = plan(Pass::backward);
    std::vector<Vec<float, 4>> workspace = poisoned<Vec<float, 4>>(p.workspace_bytes / 16 + 1);
    emulator::GlobalMemory memory;
    memory.add(workspace.data(), p.workspace_bytes);
    launchers.persistent.backward(p, engine, Product::tf32x3, b, workspace.data(), nullptr);
  }
};

template <class Cell, class S>
void check_cell(int cell, const char* name) {
  const CellLaunchers& launchers = cell_launchers(cell, kDtype<S>);
  for (const Case& c : {Case{7, 3, 9, 1, Case::even, true, 0}, Case{7, 9, 9, 1, Case::ragged, true, 0.05},
                        Case{7, 9, 17, 1, Case::packed, false, 0}}) {
    Layer<Cell, S> l(c);
    const std::string where = name + std::string(" ") + name_of(kDtype<S>) + " " + describe(c) + " ";
    check_chunks(where + "stepwise ", l, launchers,
                 [&](const auto& arguments) { run_stepwise(l, launchers, arguments); });
    check_chunks(where + "cluster ", l, launchers, Persistently<Cell, S>{launchers, Engine::cluster, c});
    check_chunks(where + "grid ", l, launchers, Persistently<Cell, S>{launchers, Engine::grid, c});
  }
}

}  // namespace

int main() {
  for (unsigned seed : {0u, 1u}) {
    emulator::set_seed(seed);
    int cell = 0;
#define RNNKERN_CHECK(name, Struct)       \
  check_cell<Struct, float>(cell, #name); \
  check_cell<Struct, Bf16>(cell++, #name);
    RNNKERN_FOR_EACH_CELL(RNNKERN_CHECK)
#undef RNNKERN_CHECK
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
