// Attention, once per instruction set: see attention.h for the maths and attention_parts.h for the panels.
//
// A unit of work is a block of queries of one batch row, against all of that row's valid keys. For many queries keys
// and values are packed a tile at a time, so that a tile stays in cache; for few they are read where they lie, since a
// copy would cost more than the work. Backward computes the scores and the softmax again, to the same bits: nothing of
// size Tq x Tk is kept. A row's gradients of key and value are summed over its query blocks in order, by one thread.
//
// Scratch, per thread: a block's scores (two of them in backward), at most 64 Tk elements each; panels for a block of
// queries and a tile of keys and values, at most (128 + 256) (D + Dv) elements; a few words per key.
// Only gradients of bfloat16 and float16 rows with several query blocks take more: Tk (D + Dv) floats to sum in.
#include "cpu/attention.h"

#include "cpu/attention_additive.h"
#include "cpu/workspace.h"

namespace rnnkern::RNNKERN_ISA {
namespace {

constexpr int64_t kQueryBlock = 64;  // queries that share a packed tile
constexpr int64_t kLongRow = 4096;   // from so many keys on, fewer queries: their scores fill the cache
constexpr int64_t kLongRowQueries = 8;

// Whether so many queries read keys and values where they lie.
template <bool kAdditive>
constexpr bool reads_in_place(int64_t queries) {
  return queries <= (kAdditive ? 1 : 8);  // more additive queries share the keys' exponentials
}

// Queries of a block: blocks are as equal as can be, since a short last one would pack the keys for few.
int64_t query_block(const AttentionInputs& in) {
  const int64_t most = in.Tk < kLongRow ? kQueryBlock : kLongRowQueries;
  return ceil_div(in.Tq, max_of(int64_t(1), ceil_div(in.Tq, most)));
}

template <class S>
Operand<S> take_operand(Arena& arena, int64_t columns, int64_t rows, int64_t flags) {
  Operand<S> operand;
  operand.columns = columns;
  operand.blocks = ceil_div(columns, kBlock);
  operand.capacity = round_up(rows, kGroup);
  operand.panel = arena.take<Compute<S>>(operand.blocks * operand.block_stride());
  operand.large = arena.take<uint8_t>(flags);
  return operand;
}

template <class S>
struct Scratch {
  using T = Compute<S>;
  int64_t* valid;  // [Tk]
  int64_t row;     // elements of a row of scores: Tk rounded up
  T* vector;       // 4 times the additive score's: so the gradients want it, and to the scores it is all the same
  T *scores, *context;
  Operand<S> query, key, value;
  T* part;  // a tile's part of a sum
  // Backward only.
  T *dscores, *dquery, *dkey, *dvalue;
  Operand<S> dcontext;

  Scratch(const AttentionInputs& in, int64_t queries, bool in_place, bool backward, Arena& arena) {
    const bool additive = in.score == Score::additive;
    const int64_t tile = in_place ? 0 : min_of(kTile, in.Tk);
    row = round_up(in.Tk, kBlock);
    valid = arena.take<int64_t>(in.Tk);
    vector = arena.take<T>(additive ? round_up(in.D, kBlock) : 0);
    scores = arena.take<T>(queries * row);
    query = take_operand<S>(arena, in.D, queries, additive ? in.Tq + kGroup : 0);
    key = take_operand<S>(arena, in.D, tile, additive ? round_up(in.Tk, kGroup) : 0);
    value = take_operand<S>(arena, in.Dv, tile, 0);
    const int64_t part_rows = max_of(query.capacity, backward ? key.capacity : 0);
    part = arena.take<T>(max_of(key.blocks, value.blocks) * part_rows * kBlock);
    if (backward) {
      dcontext = take_operand<S>(arena, in.Dv, queries, 0);
      dscores = arena.take<T>(queries * row);
      dquery = arena.take<T>(query.blocks * query.block_stride());
      const int64_t sums = sizeof(S) < sizeof(T) && queries < in.Tq ? in.Tk : 0;
      dkey = arena.take<T>(sums * in.D);
      dvalue = arena.take<T>(sums * in.Dv);
    } else {
      context = arena.take<T>(value.blocks * query.block_stride());
    }
  }
};

template <class S>
Scratch<S> make_scratch(const AttentionInputs& in, int64_t queries, bool in_place, bool backward) {
  Arena measure(nullptr);
  Scratch<S>(in, queries, in_place, backward, measure);
  Arena arena(workspace(kWorkspaceSlot, measure.used()));
  Scratch<S> scratch(in, queries, in_place, backward, arena);
  if (scratch.vector && in.vector) {
    for (int64_t a = 0; a < round_up(in.D, kBlock); ++a) {
      scratch.vector[a] = a < in.D ? 4 * to_compute(static_cast<const S*>(in.vector)[a]) : Compute<S>(0);
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
  using T = Compute<S>;
  load<kAdditive>(x.query, first, count);
  const bool in_place = reads_in_place<kAdditive>(count);
  for (int64_t j = 0; j < n; j += kGroup) {
    if (!in_place && j % kTile == 0) load<kAdditive>(x.key, j, min_of(kTile, n - j));
    if constexpr (kAdditive) {
      if (in_place) {
        direct_scores(x.query, x.key, j, n, x.vector, x.scores + j);
      } else {
        packed_scores(x.query, x.key, j, n, x.vector, x.scores + j, x.row);
      }
    } else if (in_place) {
      products(x.query, x.key.group(j, n), T(in.scale), x.scores + j, x.row);
    } else {
      products(x.query, x.key.packed_group(j), T(in.scale), x.scores + j, x.row);
    }
  }
  for (int64_t i = 0; i < count; ++i) softmax(x.scores + i * x.row, n);
}

// to[i] = sum over n keys of left[i][j] times row j of the operand, for a block of queries.
template <class S>
void multiply(const Compute<S>* left, int64_t count, bool in_place, Operand<S>& right, int64_t n, const Scratch<S>& x,
              Compute<S>* to) {
  const int64_t to_block = x.query.block_stride();
  if (in_place) {
    sum_rows(left, x.row, count, right, n, to, to_block, x.part);
    return;
  }
  for (int64_t j = 0; j < n; j += kTile) {
    const int64_t keys = min_of(kTile, n - j);
    load<false>(right, j, keys);
    gemm<Compute<S>, 1>(count, right.blocks, {left + j, x.row, int(keys)}, {right.panel, right.block_stride()},
                        {to, to_block, kBlock, j == 0 ? Start::zero : Start::add});
  }
}

template <class S, bool kAdditive>
void forward(const AttentionInputs& in, const AttentionOutputs& out, const ParallelFor& parallel) {
  if (in.B == 0 || in.Tq == 0) return;
  int64_t block = query_block(in);
  if (in.B < parallel.threads) block = min_of(block, ceil_div(in.Tq, ceil_div(parallel.threads, in.B)));
  const int64_t units = ceil_div(in.Tq, block);
  run_parallel(parallel, in.B * units, [&](int64_t begin, int64_t end) {
    Scratch<S> x = make_scratch<S>(in, block, reads_in_place<kAdditive>(block), false);
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
      multiply(x.scores, count, reads_in_place<kAdditive>(count), x.value, n, x, x.context);
      put_panel<S>(x.context, x.query.block_stride(), count, nullptr, {context, in.Dv, nullptr, false}, 0);
      for (int64_t i = 0; weights && i < count; ++i) {
        for (int64_t j = 0; j < n; ++j) weights[i * in.Tk + x.valid[j]] = to_storage<S>(x.scores[i * x.row + j]);
      }
    }
  });
}

// Row j of the target: the sum over a block's queries of left[i][j] times row i of the panel of `right`.
template <class S, class E>
void multiply_transposed(const Compute<S>* left, int64_t count, bool in_place, const Operand<S>& right, int64_t n,
                         const Scratch<S>& x, Target<E> target) {
  using T = Compute<S>;
  if (in_place) {
    put_outer<E>(left, x.row, count, right.panel, right.block_stride(), n, target);
    return;
  }
  const int64_t part_block = x.key.block_stride();
  for (int64_t tile = 0; tile < n; tile += kTile) {
    const int64_t keys = min_of(kTile, n - tile);
    for (int64_t j = 0; j < keys; j += kBlock) {
      RowOperand<T> transposed{left + tile + j, 1, int(count)};
      transposed.inner = x.row;
      gemm_transposed<T>(min_of(int64_t(kBlock), keys - j), right.blocks, transposed,
                         {right.panel, right.block_stride()}, {x.part + j * kBlock, part_block, kBlock, Start::zero});
    }
    put_panel<E>(x.part, part_block, keys, nullptr, target, tile);
  }
}

// dL/dscore of a query block, into x.dscores; dL/dvalue. x.scores holds the weights.
template <class S, class E>
void scores_gradient(const AttentionInputs& in, const AttentionGradients& grad, int64_t b, int64_t first, int64_t count,
                     bool in_place, int64_t n, Scratch<S>& x, Target<E> dvalue) {
  using T = Compute<S>;
  if (grad.dcontext.data) {
    load<false>(x.dcontext, first, count);
    for (int64_t j = 0; j < n; j += kGroup) {
      if (in_place) {
        products(x.dcontext, x.value.group(j, n), T(1), x.dscores + j, x.row);
      } else {
        if (j % kTile == 0) load<false>(x.value, j, min_of(kTile, n - j));
        products(x.dcontext, x.value.packed_group(j), T(1), x.dscores + j, x.row);
      }
    }
    multiply_transposed(x.scores, count, in_place, x.dcontext, n, x, dvalue);
  } else {
    zero_rows(x.dscores, count * x.row);
    if (!dvalue.add) {
      for (int64_t j = 0; j < n; ++j) zero_rows(dvalue.row(j), in.Dv);
    }
  }
  const S* dweights = grad.dweights.data ? batch_row<S>(grad.dweights, b) + first * grad.dweights.time : nullptr;
  const T scale = in.score == Score::dot ? T(in.scale) : T(1);
  for (int64_t i = 0; i < count; ++i) {
    T* ds = x.dscores + i * x.row;
    for (int64_t j = 0; dweights && j < n; ++j) ds[j] += to_compute(dweights[i * grad.dweights.time + x.valid[j]]);
    softmax_gradient(x.scores + i * x.row, ds, n, scale);
  }
}

// The gradients of one batch row with n valid keys; those of key and value go to targets of type E.
template <class S, bool kAdditive, class E>
void row_gradients(const AttentionInputs& in, const AttentionGradients& grad, int64_t b, int64_t n, int64_t block,
                   Scratch<S>& x, Target<E> dkey, Target<E> dvalue, Compute<S>* dvector) {
  const bool in_place = reads_in_place<kAdditive>(block);
  S* dquery = static_cast<S*>(grad.dquery) + b * in.Tq * in.D;
  for (int64_t first = 0; first < in.Tq; first += block) {
    const int64_t count = min_of(block, in.Tq - first);
    dkey.add = dvalue.add = first > 0;
    weights_of_block<S, kAdditive>(in, first, count, n, x);
    scores_gradient(in, grad, b, first, count, in_place, n, x, dvalue);
    if constexpr (kAdditive) {
      zero_rows(x.dquery, x.query.blocks * x.query.block_stride());
      additive_gradient(x.query, x.key, n, x.dscores, x.row, x.vector, x.dquery, dkey, dvector);
    } else {
      multiply(x.dscores, count, in_place, x.key, n, x, x.dquery);
      multiply_transposed(x.dscores, count, in_place, x.query, n, x, dkey);
    }
    put_panel<S>(x.dquery, x.query.block_stride(), count, kAdditive ? x.vector : nullptr,
                 {dquery + first * in.D, in.D, nullptr, false}, 0);
  }
}

template <class S, bool kAdditive>
void backward(const AttentionInputs& in, const AttentionGradients& grad, const ParallelFor& parallel) {
  using T = Compute<S>;
  const int64_t block = query_block(in);
  const int64_t padded = round_up(in.D, kBlock);
  // Every batch row's part of dL/dvector, summed in the order of rows at the end.
  T* dvectors = kAdditive ? static_cast<T*>(workspace(kPackedSlot, size_t((in.B + 1) * padded) * sizeof(T))) : nullptr;
  if (kAdditive) zero_rows(dvectors, (in.B + 1) * padded);
  run_parallel(parallel, in.B, [&](int64_t begin, int64_t end) {
    Scratch<S> x = make_scratch<S>(in, block, reads_in_place<kAdditive>(block), true);
    for (int64_t b = begin; b < end; ++b) {
      S* dkey = static_cast<S*>(grad.dkey) + b * in.Tk * in.D;
      S* dvalue = static_cast<S*>(grad.dvalue) + b * in.Tk * in.Dv;
      const int64_t n = find_valid(in, b, x.valid);
      if (n < in.Tk || in.Tq == 0) {
        zero_rows(dkey, in.Tk * in.D);
        zero_rows(dvalue, in.Tk * in.Dv);
      }
      if (n == 0 || in.Tq == 0) {
        zero_rows(static_cast<S*>(grad.dquery) + b * in.Tq * in.D, in.Tq * in.D);
        continue;
      }
      start_row(in, b, x);
      if (grad.dcontext.data) start(x.dcontext, batch_row<S>(grad.dcontext, b), grad.dcontext.time, nullptr);
      const Target<S> to_key{dkey, in.D, x.valid, false}, to_value{dvalue, in.Dv, x.valid, false};
      T* dvector = kAdditive ? dvectors + b * padded : nullptr;
      if constexpr (sizeof(S) < sizeof(T)) {
        if (block < in.Tq) {  // sums over query blocks are kept in float
          row_gradients<S, kAdditive, T>(in, grad, b, n, block, x, {x.dkey, in.D, nullptr, false},
                                         {x.dvalue, in.Dv, nullptr, false}, dvector);
          for (int64_t j = 0; j < n; ++j) {
            convert_row(x.dkey + j * in.D, to_key.row(j), in.D);
            convert_row(x.dvalue + j * in.Dv, to_value.row(j), in.Dv);
          }
          continue;
        }
      }
      row_gradients<S, kAdditive, S>(in, grad, b, n, block, x, to_key, to_value, dvector);
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
