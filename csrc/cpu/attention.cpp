// Attention, once per instruction set: see attention.h for the maths and attention_parts.h for the panels.
//
// A unit of work is a block of queries of one batch row, against all of that row's valid keys. Keys and values are
// packed a tile at a time, so that a tile stays in cache and memory does not grow with the number of keys, except for
// the block's scores. Backward computes the scores and the softmax again, to the same bits: nothing of size Tq x Tk is
// kept. A row's gradients of key and value are summed over its query blocks in order, by one thread.
#include "cpu/attention.h"

#include "cpu/attention_parts.h"
#include "cpu/workspace.h"

namespace rnnkern::RNNKERN_ISA {
namespace {

constexpr int64_t kTile = 256;       // keys packed at a time
constexpr int64_t kQueryBlock = 64;  // queries that share a packed tile
constexpr int64_t kLongRow = 4096;   // from so many keys on, fewer queries: their scores fill the cache
constexpr int64_t kLongRowQueries = 8;

template <class S>
Operand<S> take_operand(Arena& arena, int64_t columns, int64_t rows, bool additive) {
  Operand<S> operand;
  operand.columns = columns;
  operand.blocks = ceil_div(columns, kBlock);
  operand.capacity = round_up(rows, kGroup);
  const int64_t size = operand.blocks * operand.block_stride();
  operand.panel = arena.take<Compute<S>>(size);
  operand.raw = additive ? arena.take<Compute<S>>(size) : nullptr;
  operand.large = arena.take<uint8_t>(additive ? operand.capacity : 0);
  return operand;
}

template <class S>
struct Scratch {
  using T = Compute<S>;
  int64_t* valid;  // [Tk]
  int64_t row;     // elements of a row of scores: Tk rounded up
  T *vector, *scores, *context;
  Operand<S> query, key, value;
  // Backward only.
  T *dscores, *dquery, *dkey, *dvalue;
  Operand<S> dcontext;

  Scratch(const AttentionInputs& in, int64_t queries, bool backward, Arena& arena) {
    const bool additive = in.score == Score::additive;
    const int64_t tile = min_of(kTile, in.Tk), tiles = ceil_div(in.Tk, kTile);
    row = round_up(in.Tk, kBlock);
    valid = arena.take<int64_t>(in.Tk);
    vector = arena.take<T>(additive ? round_up(in.D, kBlock) : 0);
    scores = arena.take<T>(queries * row);
    query = take_operand<S>(arena, in.D, queries, additive);
    key = take_operand<S>(arena, in.D, tile, additive);
    value = take_operand<S>(arena, in.Dv, tile, false);
    if (backward) {
      dcontext = take_operand<S>(arena, in.Dv, queries, false);
      dscores = arena.take<T>(queries * row);
      dquery = arena.take<T>(query.blocks * query.block_stride());
      dkey = arena.take<T>(tiles * key.blocks * key.block_stride());
      dvalue = arena.take<T>(tiles * value.blocks * value.block_stride());
    } else {
      context = arena.take<T>(value.blocks * query.block_stride());
    }
  }
};

template <class S>
Scratch<S> make_scratch(const AttentionInputs& in, int64_t queries, bool backward) {
  Arena measure(nullptr);
  Scratch<S>(in, queries, backward, measure);
  Arena arena(workspace(0, measure.used()));
  Scratch<S> scratch(in, queries, backward, arena);
  if (scratch.vector && in.vector) {
    for (int64_t a = 0; a < round_up(in.D, kBlock); ++a) {
      scratch.vector[a] = a < in.D ? to_compute(static_cast<const S*>(in.vector)[a]) : Compute<S>(0);
    }
  }
  return scratch;
}

int64_t find_valid(const AttentionInputs& in, int64_t b, int64_t* valid) {
  const int64_t length = in.lengths ? in.lengths[b] : in.Tk;
  const uint8_t* mask = in.mask.data ? static_cast<const uint8_t*>(in.mask.data) + b * in.mask.batch : nullptr;
  int64_t count = 0;
  for (int64_t j = 0; j < length; ++j) {
    if (!mask || !mask[j]) valid[count++] = j;
  }
  return count;
}

template <class S>
const S* batch_row(const Rows& rows, int64_t b) {
  return static_cast<const S*>(rows.data) + b * rows.batch;
}

template <class S>
void zero_rows(S* to, int64_t count) {
  memset(static_cast<void*>(to), 0, size_t(count) * sizeof(S));
}

template <class S>
void start_row(const AttentionInputs& in, int64_t b, Scratch<S>& x) {
  start(x.query, batch_row<S>(in.query, b), in.query.time, nullptr);
  start(x.key, batch_row<S>(in.key, b), in.key.time, x.valid);
  start(x.value, batch_row<S>(in.value, b), in.value.time, x.valid);
}

// The weights of the query block [first, first + count) over n valid keys, into x.scores.
template <class S, bool kAdditive>
void weights_of_block(const AttentionInputs& in, int64_t first, int64_t count, int64_t n, Scratch<S>& x) {
  load<kAdditive>(x.query, first, count);
  for (int64_t j = 0; j < n; j += kTile) {
    load<kAdditive>(x.key, j, min_of(kTile, n - j));
    if constexpr (kAdditive) {
      additive_scores(x.query, x.key, x.vector, x.scores + j, x.row);
    } else {
      products(x.query, x.key, Compute<S>(in.scale), x.scores + j, x.row);
    }
  }
  for (int64_t i = 0; i < count; ++i) softmax(x.scores + i * x.row, n);
}

// Rows of a panel to a tensor's rows at index[i] (null: i), times an optional factor per column.
template <class S>
void store_panel(const Compute<S>* panel, int64_t capacity, int64_t columns, int64_t rows, const int64_t* index, S* to,
                 const Compute<S>* factor) {
  using V = Vec<Compute<S>>;
  for (int64_t i = 0; i < rows; ++i) {
    S* row = to + (index ? index[i] : i) * columns;
    for (int64_t column = 0; column < columns; column += V::kLanes) {
      V x = V::load(panel + column / kBlock * capacity * kBlock + i * kBlock + column % kBlock);
      if (factor) x = x * V::load(factor + column);
      store_lanes(row + column, x, int(min_of(columns - column, int64_t(V::kLanes))));
    }
  }
}

template <class S, bool kAdditive>
void forward(const AttentionInputs& in, const AttentionOutputs& out, const ParallelFor& parallel) {
  using T = Compute<S>;
  int64_t block = min_of(in.Tq, in.Tk < kLongRow ? kQueryBlock : kLongRowQueries);
  if (in.B == 0 || in.Tq == 0) return;
  if (in.B < parallel.threads) block = min_of(block, ceil_div(in.Tq, ceil_div(parallel.threads, in.B)));
  const int64_t units = ceil_div(in.Tq, block);
  run_parallel(parallel, in.B * units, [&](int64_t begin, int64_t end) {
    Scratch<S> x = make_scratch<S>(in, block, false);
    int64_t current = -1, n = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / units, first = unit % units * block, count = min_of(block, in.Tq - first);
      S* context = static_cast<S*>(out.context) + (b * in.Tq + first) * in.Dv;
      S* weights = out.weights ? static_cast<S*>(out.weights) + (b * in.Tq + first) * in.Tk : nullptr;
      if (b != current) {
        n = find_valid(in, b, x.valid);
        start_row(in, b, x);
        current = b;
      }
      if (weights && n < in.Tk) zero_rows(weights, count * in.Tk);
      if (n == 0) {
        zero_rows(context, count * in.Dv);
        continue;
      }
      weights_of_block<S, kAdditive>(in, first, count, n, x);
      for (int64_t j = 0; j < n; j += kTile) {
        const int64_t keys = min_of(kTile, n - j);
        load<false>(x.value, j, keys);
        const RowOperand<T> left{x.scores + j, x.row, int(keys)};
        gemm<T, 1>(count, x.value.blocks, left, {x.value.panel, x.value.block_stride()},
                   {x.context, x.query.block_stride(), kBlock, j == 0 ? Start::zero : Start::add});
      }
      store_panel<S>(x.context, x.query.capacity, in.Dv, count, nullptr, context, nullptr);
      for (int64_t i = 0; weights && i < count; ++i) {
        for (int64_t j = 0; j < n; ++j) weights[i * in.Tk + x.valid[j]] = to_storage<S>(x.scores[i * x.row + j]);
      }
    }
  });
}

// to[key] += sum over queries of left[query][key] right[query], for the keys of a tile.
template <class T>
void add_transposed(const T* left, int64_t left_row, int64_t queries, int64_t keys, const T* right, int64_t right_block,
                    int64_t blocks, T* to, int64_t to_block) {
  for (int64_t j = 0; j < keys; j += kBlock) {
    RowOperand<T> transposed{left + j, 1, int(queries)};
    transposed.inner = left_row;
    gemm_transposed<T>(min_of(int64_t(kBlock), keys - j), blocks, transposed, {right, right_block},
                       {to + j * kBlock, to_block, kBlock, Start::add});
  }
}

// dL/dscore of a query block, into x.dscores; dL/dvalue is added to. x.scores holds the weights.
template <class S>
void scores_gradient(const AttentionInputs& in, const AttentionGradients& grad, int64_t b, int64_t first, int64_t count,
                     int64_t n, Scratch<S>& x) {
  using T = Compute<S>;
  if (grad.dcontext.data) {
    load<false>(x.dcontext, first, count);
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t keys = min_of(kTile, n - j);
      load<false>(x.value, j, keys);
      products(x.dcontext, x.value, T(1), x.dscores + j, x.row);
      add_transposed(x.scores + j, x.row, count, keys, x.dcontext.panel, x.dcontext.block_stride(), x.value.blocks,
                     x.dvalue + j / kTile * x.value.blocks * x.value.block_stride(), x.value.block_stride());
    }
  } else {
    zero_rows(x.dscores, count * x.row);
  }
  const S* dweights = grad.dweights.data ? batch_row<S>(grad.dweights, b) + first * grad.dweights.time : nullptr;
  const T scale = in.score == Score::dot ? T(in.scale) : T(1);
  for (int64_t i = 0; i < count; ++i) {
    T* ds = x.dscores + i * x.row;
    for (int64_t j = 0; dweights && j < n; ++j) ds[j] += to_compute(dweights[i * grad.dweights.time + x.valid[j]]);
    softmax_gradient(x.scores + i * x.row, ds, n, scale);
  }
}

template <class S, bool kAdditive>
void backward(const AttentionInputs& in, const AttentionGradients& grad, const ParallelFor& parallel) {
  using T = Compute<S>;
  const int64_t block = min_of(in.Tq, in.Tk < kLongRow ? kQueryBlock : kLongRowQueries);
  const int64_t padded = round_up(in.D, kBlock);
  // Every batch row's part of dL/dvector, summed in the order of rows at the end.
  T* dvectors = kAdditive ? static_cast<T*>(workspace(1, size_t((in.B + 1) * padded) * sizeof(T))) : nullptr;
  if (kAdditive) zero_rows(dvectors, (in.B + 1) * padded);
  run_parallel(parallel, in.B, [&](int64_t begin, int64_t end) {
    Scratch<S> x = make_scratch<S>(in, block, true);
    const T* factor = kAdditive ? x.vector : nullptr;  // left out by additive_gradient
    for (int64_t b = begin; b < end; ++b) {
      S* dquery = static_cast<S*>(grad.dquery) + b * in.Tq * in.D;
      S* dkey = static_cast<S*>(grad.dkey) + b * in.Tk * in.D;
      S* dvalue = static_cast<S*>(grad.dvalue) + b * in.Tk * in.Dv;
      const int64_t n = find_valid(in, b, x.valid), tiles = ceil_div(n, kTile);
      if (n < in.Tk || in.Tq == 0) {
        zero_rows(dkey, in.Tk * in.D);
        zero_rows(dvalue, in.Tk * in.Dv);
      }
      if (n == 0 || in.Tq == 0) {
        zero_rows(dquery, in.Tq * in.D);
        continue;
      }
      start_row(in, b, x);
      if (grad.dcontext.data) start(x.dcontext, batch_row<S>(grad.dcontext, b), grad.dcontext.time, nullptr);
      zero_rows(x.dkey, tiles * x.key.blocks * x.key.block_stride());
      zero_rows(x.dvalue, tiles * x.value.blocks * x.value.block_stride());
      for (int64_t first = 0; first < in.Tq; first += block) {
        const int64_t count = min_of(block, in.Tq - first);
        weights_of_block<S, kAdditive>(in, first, count, n, x);
        scores_gradient(in, grad, b, first, count, n, x);
        zero_rows(x.dquery, x.query.blocks * x.query.block_stride());
        for (int64_t j = 0; j < n; j += kTile) {
          const int64_t keys = min_of(kTile, n - j);
          load<kAdditive>(x.key, j, keys);
          T* tile_dkey = x.dkey + j / kTile * x.key.blocks * x.key.block_stride();
          if constexpr (kAdditive) {
            additive_gradient(x.query, x.key, x.dscores + j, x.row, x.dquery, tile_dkey, dvectors + b * padded);
          } else {
            const RowOperand<T> left{x.dscores + j, x.row, int(keys)};
            gemm<T, 1>(count, x.key.blocks, left, {x.key.panel, x.key.block_stride()},
                       {x.dquery, x.query.block_stride(), kBlock, Start::add});
            add_transposed(x.dscores + j, x.row, count, keys, x.query.panel, x.query.block_stride(), x.key.blocks,
                           tile_dkey, x.key.block_stride());
          }
        }
        store_panel<S>(x.dquery, x.query.capacity, in.D, count, nullptr, dquery + first * in.D, factor);
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t keys = min_of(kTile, n - tile * kTile);
        const int64_t* index = x.valid + tile * kTile;
        store_panel<S>(x.dkey + tile * x.key.blocks * x.key.block_stride(), x.key.capacity, in.D, keys, index, dkey,
                       factor);
        store_panel<S>(x.dvalue + tile * x.value.blocks * x.value.block_stride(), x.value.capacity, in.Dv, keys, index,
                       dvalue, nullptr);
      }
    }
  });
  if constexpr (kAdditive) {
    T* total = dvectors + in.B * padded;
    for (int64_t b = 0; b < in.B; ++b) {
      for (int64_t a = 0; a < in.D; ++a) total[a] += dvectors[b * padded + a];
    }
    convert_row(total, static_cast<S*>(grad.dvector), in.D);
  }
}

template <class S>
const AttentionKernels& kernels_for(Score score) {
  static constexpr AttentionKernels dot{forward<S, false>, backward<S, false>};
  static constexpr AttentionKernels additive{forward<S, true>, backward<S, true>};
  return score == Score::dot ? dot : additive;
}

}  // namespace

const AttentionKernels& attention_kernels(Score score, Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return kernels_for<double>(score);
    case Dtype::bf16:
      return kernels_for<Bfloat16>(score);
    case Dtype::f16:
      return kernels_for<Float16>(score);
    case Dtype::f32:
      break;
  }
  return kernels_for<float>(score);
}

}  // namespace rnnkern::RNNKERN_ISA
