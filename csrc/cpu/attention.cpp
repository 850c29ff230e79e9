// Attention, once per instruction set: see attention.h for the maths and attention_parts.h for the panels.
//
// A unit of work is a block of queries of one batch row, against all of that row's valid keys. What many queries are
// multiplied by is packed a tile of keys at a time, so that a tile stays in cache; for few it is read where it lies,
// since a copy would cost more than the work. Backward computes the scores and the softmax again, to the same bits:
// nothing of size Tq x Tk is kept. A row's gradients of key and value are summed over its query blocks in order.
//
// Backward gives each thread rows of the batch; where these are fewer than threads, all threads share a row, block by
// block: scores by keys, the softmax by queries, sums by columns. No sum is cut, so the bits are the same.
//
// Scratch, per thread: a block's scores (two of them in backward), at most 64 Tk elements each; panels for a block of
// queries and a tile of keys, at most (128 + 512) max(D, Dv) elements; a few words per key. In all: 65 sums of
// dL/dvector. Gradients of bfloat16 and float16 rows with several query blocks are summed in float, sum_rows keys at a
// time, and scores are computed anew for each such chunk.
#include "cpu/attention.h"

#include "cpu/attention_additive.h"
#include "cpu/workspace.h"

namespace rnnkern::RNNKERN_ISA {
namespace {

constexpr int64_t kQueryBlock = 64;  // queries that share a packed tile
constexpr int64_t kLongRow = 4096;   // from so many keys on, fewer queries: their scores fill the cache
constexpr int64_t kLongRowQueries = 8;
constexpr int64_t kVectorSums = 64;  // partial sums of dL/dvector, each over consecutive batch rows

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

// Keys whose 16-bit gradients are summed in float at a time: 4 MiB of sums, so that scores are seldom computed anew.
int64_t sum_rows(const AttentionInputs& in) {
  return min_of(in.Tk, max_of(int64_t(1024), (int64_t(1) << 20) / max_of(int64_t(1), in.D + in.Dv)));
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

// What one member of the team that shares a batch row has for itself.
template <class S>
struct Part {
  Columns key, value;       // whose gradients it sums
  Operand<S> exponentials;  // a tile of keys; additive score only
  Operand<S> right;         // a tile of what multiplies scores: of values, or in backward of its columns of keys
  Compute<S>* sums;         // a tile's part of a sum
};

template <class S>
struct Scratch {
  using T = Compute<S>;
  int64_t* valid;  // [Tk]
  int64_t row;     // elements of a row of scores: Tk rounded up
  T* vector;       // 4 times the additive score's: so the gradients want it, and to the scores it is all the same
  T *scores, *context;
  Operand<S> query, key, value;  // key and value have no panels of their own
  int64_t members;
  Part<S>* parts;  // [members]
  // Backward only.
  T *dscores, *dquery, *dkey, *dvalue, *unwanted;
  Operand<S> dcontext;

  Scratch(const AttentionInputs& in, int64_t queries, bool in_place, int64_t members, bool backward, Arena& arena)
      : members(members) {
    const bool additive = in.score == Score::additive;
    const int64_t tile = in_place ? 0 : min_of(kTile, in.Tk);
    row = round_up(in.Tk, kBlock);
    valid = arena.take<int64_t>(in.Tk);
    vector = arena.take<T>(additive ? round_up(in.D, kBlock) : 0);
    scores = arena.take<T>(queries * row);
    query = take_operand<S>(arena, in.D, queries, additive ? in.Tq + kGroup : 0);
    key = take_operand<S>(arena, in.D, 0, additive ? round_up(in.Tk, kGroup) : 0);
    value = take_operand<S>(arena, in.Dv, 0, 0);
    if (backward) {
      dcontext = take_operand<S>(arena, in.Dv, queries, 0);
      dscores = arena.take<T>(queries * row);
      dquery = arena.take<T>(query.blocks * query.block_stride());
      const int64_t sums = sizeof(S) < sizeof(T) && queries < in.Tq ? sum_rows(in) : 0;
      dkey = arena.take<T>(sums * in.D);
      dvalue = arena.take<T>(sums * in.Dv);
      unwanted = arena.take<T>(additive ? round_up(in.D, kBlock) : 0);
    } else {
      context = arena.take<T>(value.blocks * query.block_stride());
    }
    parts = arena.take<Part<S>>(members);
    for (int64_t m = 0; m < members; ++m) {
      Part<S> part;
      part.key = {key.blocks * m / members, key.blocks * (m + 1) / members};
      part.value = {value.blocks * m / members, value.blocks * (m + 1) / members};
      part.exponentials = take_operand<S>(arena, in.D, additive ? tile : 0, 0);
      part.exponentials.large = key.large;
      part.right = take_operand<S>(arena, backward ? part.key.of(in.D) : in.Dv, backward && additive ? 0 : tile, 0);
      const int64_t blocks = max_of(part.right.blocks, part.value.end - part.value.begin);
      part.sums = arena.take<T>(blocks * max_of(query.capacity, backward ? round_up(tile, kGroup) : 0) * kBlock);
      if (parts) parts[m] = part;
    }
  }
};

template <class S>
Scratch<S> make_scratch(const AttentionInputs& in, int64_t queries, bool in_place, int64_t members, bool backward) {
  Arena measure(nullptr);
  Scratch<S>(in, queries, in_place, members, backward, measure);
  Arena arena(workspace(kWorkspaceSlot, measure.used()));
  Scratch<S> scratch(in, queries, in_place, members, backward, arena);
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
  if (count > 0) memset(static_cast<void*>(to), 0, size_t(count) * sizeof(S));  // no elements may have no address
}

template <class S>
void start_row(const AttentionInputs& in, int64_t b, bool backward, Scratch<S>& x) {
  const S *key = batch_row<S>(in.key, b), *value = batch_row<S>(in.value, b);
  start(x.query, batch_row<S>(in.query, b), in.query.time, nullptr);
  start(x.key, key, in.key.time, x.valid);
  start(x.value, value, in.value.time, x.valid);
  for (int64_t m = 0; m < x.members; ++m) {
    Part<S>& part = x.parts[m];
    start(part.exponentials, key, in.key.time, x.valid);
    if (backward) {
      start(part.right, key + part.key.begin * kBlock, in.key.time, x.valid);
    } else {
      start(part.right, value, in.value.time, x.valid);
    }
  }
}

// The scores of the packed queries and the keys [begin, end) of n, begin a multiple of kGroup, into x.scores.
template <class S, bool kAdditive>
void scores_of_keys(const AttentionInputs& in, int64_t begin, int64_t end, int64_t n, Scratch<S>& x, Part<S>& part) {
  for (int64_t j = begin; j < end; j += kGroup) {
    if constexpr (!kAdditive) {
      products(x.query, x.key.group(j, n), Compute<S>(in.scale), x.scores + j, x.row);
    } else if (reads_in_place<kAdditive>(x.query.rows)) {
      direct_scores(x.query, x.key, j, n, x.vector, x.scores + j);
    } else {
      if ((j - begin) % kTile == 0) load<true>(part.exponentials, j, min_of(kTile, end - j));
      packed_scores(x.query, part.exponentials, j, n, x.vector, x.scores + j, x.row);
    }
  }
}

// to[i] = sum over n keys of left[i][j] times row j of part.right, for a block of queries.
template <class S>
void multiply(const Compute<S>* left, int64_t count, bool in_place, int64_t n, const Scratch<S>& x, Part<S>& part,
              Compute<S>* to) {
  const int64_t to_block = x.query.block_stride();
  Operand<S>& right = part.right;
  if (in_place) {
    sum_rows(left, x.row, count, right, n, to, to_block, part.sums);
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
    Scratch<S> x = make_scratch<S>(in, block, reads_in_place<kAdditive>(block), 1, false);
    int64_t current = -1, n = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / units, first = unit % units * block, count = min_of(block, in.Tq - first);
      S* context = static_cast<S*>(out.context) + (b * in.Tq + first) * in.Dv;
      S* weights = out.weights ? static_cast<S*>(out.weights) + (b * in.Tq + first) * in.Tk : nullptr;
      if (b != current) {
        n = find_valid(in, b, x.valid);
        start_row(in, b, false, x);
        current = b;
      }
      if (weights && n < in.Tk) zero_rows(weights, count * in.Tk);
      if (n == 0) {
        zero_rows(context, count * in.Dv);
        continue;
      }
      load<kAdditive>(x.query, first, count);
      scores_of_keys<S, kAdditive>(in, 0, n, n, x, x.parts[0]);
      for (int64_t i = 0; i < count; ++i) softmax(x.scores + i * x.row, n);
      multiply(x.scores, count, reads_in_place<kAdditive>(count), n, x, x.parts[0], x.context);
      put_panel<S>(x.context, x.query.block_stride(), count, nullptr, Target<S>{context, in.Dv, in.Dv}, 0);
      for (int64_t i = 0; weights && i < count; ++i) {
        const Compute<S>* row = x.scores + i * x.row;
        if (x.valid[n - 1] == n - 1) {  // all that is padding comes last
          convert_row(row, weights + i * in.Tk, n);
        } else {
          for (int64_t j = 0; j < n; ++j) weights[i * in.Tk + x.valid[j]] = to_storage<S>(row[j]);
        }
      }
    }
  });
}

// Row j of the target: the sum over a block's queries of left[i][j] times row i of the panel of `right`, for n keys.
template <class S, class E>
void multiply_transposed(const Compute<S>* left, int64_t left_row, bool in_place, const Operand<S>& right, int64_t n,
                         const Part<S>& part, Target<E> target) {
  using T = Compute<S>;
  if (in_place) {
    put_outer<E>(left, left_row, right.rows, right.panel, right.block_stride(), n, target);
    return;
  }
  const int64_t part_block = round_up(min_of(kTile, n), kGroup) * kBlock;
  for (int64_t tile = 0; tile < n; tile += kTile) {
    const int64_t keys = min_of(kTile, n - tile);
    for (int64_t j = 0; j < keys; j += kBlock) {
      RowOperand<T> transposed{left + tile + j, 1, int(right.rows)};
      transposed.inner = left_row;
      gemm_transposed<T>(min_of(int64_t(kBlock), keys - j), right.blocks, transposed,
                         {right.panel, right.block_stride()},
                         {part.sums + j * kBlock, part_block, kBlock, Start::zero});
    }
    put_panel<E>(part.sums, part_block, keys, nullptr, target, tile);
  }
}

// dL/dscore of the query i of a block that begins at `first`, into x.dscores, where dL/dweights by way of the context
// stands; the weights take the place of the scores.
template <class S>
void score_gradients(const AttentionInputs& in, const AttentionGradients& grad, int64_t b, int64_t first, int64_t i,
                     int64_t n, Scratch<S>& x) {
  using T = Compute<S>;
  T *p = x.scores + i * x.row, *ds = x.dscores + i * x.row;
  softmax(p, n);
  if (!grad.dcontext.data) zero_rows(ds, x.row);
  if (grad.dweights.data) {
    const S* dweights = batch_row<S>(grad.dweights, b) + (first + i) * grad.dweights.time;
    for (int64_t j = 0; j < n; ++j) ds[j] += to_compute(dweights[x.valid[j]]);
  }
  softmax_gradient(p, ds, n, in.score == Score::dot ? T(in.scale) : T(1));
}

// The gradients of one batch row with n valid keys: of its keys and values from `begin` on, before `end`, to targets
// that begin with the former; those of the queries and the vector along with the first key's.
template <class S, bool kAdditive, class E>
void row_gradients(const AttentionInputs& in, const AttentionGradients& grad, int64_t b, int64_t n, int64_t begin,
                   int64_t end, int64_t block, const ParallelFor& parallel, Scratch<S>& x, Target<E> dkey,
                   Target<E> dvalue, Compute<S>* dvector) {
  const bool in_place = reads_in_place<kAdditive>(block);
  const int64_t groups = ceil_div(n, kGroup), M = x.members;
  S* dquery = static_cast<S*>(grad.dquery) + b * in.Tq * in.D;
  for (int64_t first = 0; first < in.Tq; first += block) {
    const int64_t count = min_of(block, in.Tq - first);
    dkey.add = dvalue.add = first > 0;
    load<kAdditive>(x.query, first, count);
    if (grad.dcontext.data) load<false>(x.dcontext, first, count);
    run_parallel(parallel, M, [&](int64_t m, int64_t last) {
      for (; m < last; ++m) {
        const int64_t from = groups * m / M * kGroup, to = min_of(n, groups * (m + 1) / M * kGroup);
        scores_of_keys<S, kAdditive>(in, from, to, n, x, x.parts[m]);
        for (int64_t j = from; grad.dcontext.data && j < to; j += kGroup) {
          products(x.dcontext, x.value.group(j, n), Compute<S>(1), x.dscores + j, x.row);
        }
      }
    });
    run_parallel(parallel, M, [&](int64_t m, int64_t last) {
      for (int64_t i = count * m / M; i < count * last / M; ++i) score_gradients(in, grad, b, first, i, n, x);
    });
    if (kAdditive) zero_rows(x.dquery, x.query.blocks * x.query.block_stride());
    run_parallel(parallel, M, [&](int64_t m, int64_t last) {
      for (; m < last; ++m) {
        Part<S>& part = x.parts[m];
        const Target<E> key_columns = slice(dkey, part.key), value_columns = slice(dvalue, part.value);
        if (grad.dcontext.data) {
          multiply_transposed(x.scores + begin, x.row, in_place, slice(x.dcontext, part.value), end - begin, part,
                              value_columns);
        } else if (!dvalue.add) {
          for (int64_t j = 0; j < end - begin; ++j) zero_rows(value_columns.row(j), value_columns.columns);
        }
        const Operand<S> query = slice(x.query, part.key);
        Compute<S>* const sums = x.dquery + part.key.begin * x.query.block_stride();
        if constexpr (kAdditive) {
          const int64_t column = part.key.begin * kBlock;
          additive_gradient(query, slice(x.key, part.key), begin, end, begin == 0 ? n : end, x.dscores, x.row,
                            x.vector + column, sums, key_columns, (begin == 0 ? dvector : x.unwanted) + column);
        } else {
          if (begin == 0) multiply(x.dscores, count, in_place, n, x, part, sums);
          multiply_transposed(x.dscores + begin, x.row, in_place, query, end - begin, part, key_columns);
        }
      }
    });
    if (begin == 0) {
      put_panel<S>(x.dquery, x.query.block_stride(), count, kAdditive ? x.vector : nullptr,
                   Target<S>{dquery + first * in.D, in.D, in.D}, 0);
    }
  }
}

// The gradients of batch row b.
template <class S, bool kAdditive>
void row_gradients(const AttentionInputs& in, const AttentionGradients& grad, int64_t b, int64_t block,
                   const ParallelFor& parallel, Scratch<S>& x, Compute<S>* dvector) {
  using T = Compute<S>;
  S* dkey = static_cast<S*>(grad.dkey) + b * in.Tk * in.D;
  S* dvalue = static_cast<S*>(grad.dvalue) + b * in.Tk * in.Dv;
  const int64_t n = find_valid(in, b, x.valid);
  if (n < in.Tk || in.Tq == 0) {
    zero_rows(dkey, in.Tk * in.D);
    zero_rows(dvalue, in.Tk * in.Dv);
  }
  if (n == 0 || in.Tq == 0) {
    zero_rows(static_cast<S*>(grad.dquery) + b * in.Tq * in.D, in.Tq * in.D);
    return;
  }
  start_row(in, b, true, x);
  if (grad.dcontext.data) start(x.dcontext, batch_row<S>(grad.dcontext, b), grad.dcontext.time, nullptr);
  const Target<S> to_key{dkey, in.D, in.D, x.valid}, to_value{dvalue, in.Dv, in.Dv, x.valid};
  if constexpr (sizeof(S) < sizeof(T)) {
    if (block < in.Tq) {  // sums over query blocks are kept in float
      const int64_t rows = sum_rows(in);
      for (int64_t begin = 0; begin < n; begin += rows) {
        const int64_t end = min_of(n, begin + rows);
        row_gradients<S, kAdditive, T>(in, grad, b, n, begin, end, block, parallel, x, {x.dkey, in.D, in.D},
                                       {x.dvalue, in.Dv, in.Dv}, dvector);
        for (int64_t j = begin; j < end; ++j) {
          convert_row(x.dkey + (j - begin) * in.D, to_key.row(j), in.D);
          convert_row(x.dvalue + (j - begin) * in.Dv, to_value.row(j), in.Dv);
        }
      }
      return;
    }
  }
  row_gradients<S, kAdditive, S>(in, grad, b, n, 0, n, block, parallel, x, to_key, to_value, dvector);
}

template <class S, bool kAdditive>
void backward(const AttentionInputs& in, const AttentionGradients& grad, const ParallelFor& parallel) {
  using T = Compute<S>;
  const int64_t block = query_block(in), padded = round_up(in.D, kBlock), groups = min_of(in.B, kVectorSums);
  // The parts of dL/dvector, of groups of batch rows, summed in order at the end.
  T* dvectors =
      kAdditive ? static_cast<T*>(workspace(kPackedSlot, size_t((groups + 1) * padded) * sizeof(T))) : nullptr;
  if (kAdditive) zero_rows(dvectors, (groups + 1) * padded);
  const bool share_rows = in.B < parallel.threads;
  const ParallelFor by_groups{parallel.run, share_rows ? 1 : parallel.threads},
      within_row{parallel.run, share_rows ? parallel.threads : 1};
  run_parallel(by_groups, groups, [&](int64_t begin, int64_t end) {
    Scratch<S> x = make_scratch<S>(in, block, reads_in_place<kAdditive>(block), within_row.threads, true);
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t b = in.B * group / groups; b < in.B * (group + 1) / groups; ++b) {
        row_gradients<S, kAdditive>(in, grad, b, block, within_row, x, kAdditive ? dvectors + group * padded : nullptr);
      }
    }
  });
  if constexpr (kAdditive) {
    T* total = dvectors + groups * padded;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t a = 0; a < in.D; ++a) total[a] += dvectors[group * padded + a];
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
    case Dtype::f32w8:  // a recurrent layer alone has int8 weights
      break;
  }
  return kernels_for<float>(score);
}

}  // namespace rnnkern::RNNKERN_ISA
