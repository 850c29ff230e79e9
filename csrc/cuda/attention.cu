// Which kernels run attention, in which order, and where what passes between them lies.
#include "cuda/attention.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/attention_additive.cuh"
#include "cuda/attention_product.cuh"
#include "cuda/attention_single.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/launch.h"

namespace rnnkern::cuda {
namespace {

constexpr double kMostElements = double(int64_t(1) << 58);  // so that bytes can be counted
constexpr int64_t kChunkBytes = int64_t(64) << 20;          // of scores and what is like them: about an L2 cache

// Hands out parts of the scratch memory; without memory, measures.
class Parts {
 public:
  explicit Parts(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
int64_t split_count(const AttentionInputs& in) { return std::max<int64_t>(1, (in.Tk + kSingleKeys - 1) / kSingleKeys); }
int64_t key_tiles(const AttentionInputs& in) { return (in.Tk + kGradientTile - 1) / kGradientTile; }
bool is_additive(const AttentionInputs& in) { return in.score == Score::additive; }

// Scratch of one query's forward.
struct SingleScratch {
  float *stats, *scores, *context_parts;
  SingleScratch(const AttentionInputs& in, bool weights, Parts& parts) {
    const int64_t splits = split_count(in) > 1 ? in.B * split_count(in) : 0;
    stats = parts.take<float>(2 * splits);
    scores = parts.take<float>(weights ? splits * kSingleKeys : 0);
    context_parts = parts.take<float>(splits * in.Dv);
  }
};

// Scratch of everything else: of `rows` batch rows at a time.
template <class S>
struct PairScratch {
  int64_t row, rows;
  float *scores, *dcontext_value = nullptr, *dquery_parts = nullptr, *dvector_parts = nullptr;
  S *probabilities, *dscores = nullptr;

  PairScratch(const AttentionInputs& in, bool backward, Parts& parts) : row(round_up(in.Tk, 8)) {
    const bool additive = is_additive(in);
    if (double(in.Tq) * double(row) * double(std::max<int64_t>(in.D, 64)) > kMostElements)
      throw std::runtime_error("attention: the scores of one row of the batch cannot be counted in 64 bits");
    const int64_t pairs = in.Tq * row, sums = backward && additive ? key_tiles(in) * in.Tq * in.D : 0;
    const int64_t each = pairs * int64_t((backward ? 8 : 4) + sizeof(S) * (backward && !additive ? 2 : 1)) + 4 * sums;
    rows = std::max<int64_t>(1, std::min(in.B, kChunkBytes / std::max<int64_t>(1, each)));
    scores = parts.take<float>(rows * pairs);
    probabilities = parts.take<S>(rows * pairs);
    if (!backward) return;
    dcontext_value = parts.take<float>(rows * pairs);
    if (!additive) dscores = parts.take<S>(rows * pairs);
    if (!additive) return;
    dquery_parts = parts.take<float>(rows * sums);
    dvector_parts = parts.take<float>(in.B * key_tiles(in) * in.D);
  }
};

bool is_multiple(const void* data, int64_t batch, int64_t row, int64_t size) {
  return (reinterpret_cast<uintptr_t>(data) | uintptr_t(batch * size) | uintptr_t(row * size)) % 16 == 0;
}

// Launches for the batch rows [first, first + B) of a call.
template <class S>
class Attention {
 public:
  Attention(const AttentionInputs& in, void* stream) : all_(in), stream_(Stream(stream)) {}

  void choose_rows(int64_t first, int64_t count) {
    in_ = all_;
    in_.B = count;
    first_ = first;
    query_ = rows_from(all_.query, first);
    key_ = rows_from(all_.key, first);
    value_ = rows_from(all_.value, first);
    padding_ = {all_.lengths ? all_.lengths + first : nullptr, nullptr, all_.mask.batch, all_.Tk};
    if (all_.mask.data) padding_.mask = static_cast<const uint8_t*>(all_.mask.data) + first * all_.mask.batch;
  }

  Tensor3<S> rows_from(const Rows& rows, int64_t first) const {
    if (!rows.data) return {nullptr, 0, 0, false};
    const bool aligned = is_multiple(rows.data, rows.batch, rows.time, sizeof(S));
    return {static_cast<const S*>(rows.data) + first * rows.batch, rows.batch, rows.time, aligned};
  }
  Tensor3<S> contiguous(const S* data, int64_t rows, int64_t row) const {
    return {data, rows * row, row, is_multiple(data, rows * row, row, sizeof(S))};
  }

  void single(const AttentionOutputs& out, const SingleScratch& scratch) {
    choose_rows(0, all_.B);
    const int64_t splits = split_count(in_);
    const Single<S> a{query_,
                      key_,
                      value_,
                      vector(),
                      padding_,
                      in_.Tk,
                      in_.D,
                      in_.Dv,
                      splits,
                      float(in_.scale),
                      static_cast<S*>(out.context),
                      static_cast<S*>(out.weights),
                      scratch.stats,
                      scratch.scores,
                      scratch.context_parts};
    const LaunchShape shape{checked_blocks(in_.B * splits, "attention"), kSingleThreads, sizeof(SingleShared)};
    launch("attention_single", is_additive(in_) ? attention_single<S, true> : attention_single<S, false>, shape, a,
           stream_);
    if (splits == 1) return;
    const int64_t parts = blocks(in_.Dv, kSingleThreads) + (out.weights ? blocks(in_.Tk, kSingleThreads) : 0);
    launch("join_single", join_single<S>, {checked_blocks(in_.B * parts, "attention"), kSingleThreads, kJoinShared}, a,
           stream_);
  }

  void forward(const AttentionOutputs& out, const PairScratch<S>& x) {
    for (int64_t first = 0; first < all_.B; first += x.rows) {
      choose_rows(first, std::min(x.rows, all_.B - first));
      scores(x, nullptr);
      launch("attention_softmax", attention_softmax<S>, softmax_shape(), softmax(out.weights, x), stream_);
      const MatrixProduct<S, S> context{contiguous(x.probabilities, in_.Tq, x.row),
                                        value_,
                                        rows_of(out.context, in_.Tq, in_.Dv),
                                        in_.Tq * in_.Dv,
                                        in_.Dv,
                                        in_.Tq,
                                        in_.Dv,
                                        in_.Tk,
                                        1.0f};
      multiply<ProductKind::along, S>("attention context", &context, nullptr);
    }
  }

  void backward(const AttentionGradients& grad, const PairScratch<S>& x) {
    const bool additive = is_additive(all_);
    for (int64_t first = 0; first < all_.B; first += x.rows) {
      choose_rows(first, std::min(x.rows, all_.B - first));
      const Tensor3<S> dcontext = rows_from(grad.dcontext, first);
      scores(x, dcontext.data ? &dcontext : nullptr);
      const SoftmaxGradient<S> a{softmax(nullptr, x),
                                 dcontext.data ? x.dcontext_value : nullptr,
                                 rows_from(grad.dweights, first),
                                 additive ? 1.0f : float(in_.scale),
                                 x.dscores,
                                 additive ? x.dcontext_value : nullptr};
      launch("attention_softmax_gradient", attention_softmax_gradient<S>, softmax_shape(), a, stream_);

      // Without a gradient of the context there is nothing to sum.
      const MatrixProduct<S, S> dvalue =
          back(x.probabilities, x, dcontext, grad.dvalue, in_.Dv, dcontext.data ? in_.Tq : 0);
      if (additive) {
        multiply<ProductKind::back, S>("attention dvalue", &dvalue, nullptr);
        additive_backward(grad, x);
      } else {
        const MatrixProduct<S, S> dkey = back(x.dscores, x, query_, grad.dkey, in_.D, in_.Tq);
        multiply<ProductKind::back, S>("attention dvalue, dkey", &dvalue, &dkey);
        const MatrixProduct<S, S> dquery{contiguous(x.dscores, in_.Tq, x.row),
                                         key_,
                                         rows_of(grad.dquery, in_.Tq, in_.D),
                                         in_.Tq * in_.D,
                                         in_.D,
                                         in_.Tq,
                                         in_.D,
                                         in_.Tk,
                                         1.0f};
        multiply<ProductKind::along, S>("attention dquery", &dquery, nullptr);
      }
    }
    if (!additive) return;
    const DvectorSum<S> sum{all_.B * key_tiles(all_), all_.D, x.dvector_parts, static_cast<S*>(grad.dvector)};
    launch("sum_dvector", sum_dvector<S>,
           {checked_blocks(blocks(all_.D, 32), "attention"), kSumThreads, kSumThreads * sizeof(float)}, sum, stream_);
  }

 private:
  static int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
  const S* vector() const { return static_cast<const S*>(in_.vector); }
  // Of a contiguous result [B, T, C]: the chosen rows.
  S* rows_of(void* to, int64_t T, int64_t C) const { return static_cast<S*>(to) + first_ * T * C; }

  template <ProductKind kKind, class Out>
  void multiply(const char* name, const MatrixProduct<S, Out>* one, const MatrixProduct<S, Out>* other) {
    const auto count = [&](const MatrixProduct<S, Out>* p) {
      return p ? in_.B * blocks(p->M, kTile) * blocks(p->N, kTile) : 0;
    };
    MatrixProducts<S, Out> all{{*one, other ? *other : *one}, count(one), padding_};
    launch(name, attention_products<S, Out, kKind>,
           {checked_blocks(count(one) + count(other), name), kTileThreads, kProductShared}, all, stream_);
  }

  // Scores, and dL/dweights by way of the context if its gradient is given.
  void scores(const PairScratch<S>& x, const Tensor3<S>* dcontext) {
    const int64_t pairs = in_.Tq * x.row;
    const auto across = [&](const Tensor3<S>& a, const Tensor3<S>& b, float* to, int64_t K, double scale) {
      return MatrixProduct<S, float>{a, b, to, pairs, x.row, in_.Tq, in_.Tk, K, float(scale)};
    };
    const MatrixProduct<S, float> dweights =
        dcontext ? across(*dcontext, value_, x.dcontext_value, in_.Dv, 1.0) : MatrixProduct<S, float>{};
    if (!is_additive(in_)) {
      const MatrixProduct<S, float> dot = across(query_, key_, x.scores, in_.D, in_.scale);
      multiply<ProductKind::across, float>("attention scores", &dot, dcontext ? &dweights : nullptr);
      return;
    }
    const AdditiveScores<S> a{query_, key_, vector(), padding_, in_.Tq, in_.Tk, in_.D, x.row, x.scores};
    const int64_t tiles = blocks(in_.Tq, kScoreTile) * blocks(in_.Tk, kScoreTile);
    // Few queries take fewer warps, but the tile still wants loading.
    const int64_t warps = std::max<int64_t>(4, blocks(std::min<int64_t>(in_.Tq, kScoreTile), kScoreQueries));
    launch("additive_scores", additive_scores<S>,
           {checked_blocks(in_.B * tiles, "attention"), int(32 * warps), sizeof(ScoreShared)}, a, stream_);
    if (dcontext) multiply<ProductKind::across, float>("attention dweights", &dweights, nullptr);
  }

  LaunchShape softmax_shape() const {
    return {checked_blocks(in_.B * in_.Tq, "attention"), kSoftmaxThreads, kSoftmaxShared};
  }
  Softmax<S> softmax(void* weights, const PairScratch<S>& x) const {
    return {padding_,
            in_.Tq,
            in_.Tk,
            x.row,
            x.scores,
            x.probabilities,
            weights ? rows_of(weights, in_.Tq, in_.Tk) : nullptr};
  }

  // to[b, j] = sum over queries of left[b, i, j] right[b, i]
  MatrixProduct<S, S> back(const S* left, const PairScratch<S>& x, const Tensor3<S>& right, void* to, int64_t columns,
                           int64_t queries) const {
    return {contiguous(left, in_.Tq, x.row),
            right,
            rows_of(to, in_.Tk, columns),
            in_.Tk * columns,
            columns,
            in_.Tk,
            columns,
            queries,
            1.0f};
  }

  void additive_backward(const AttentionGradients& grad, const PairScratch<S>& x) {
    const int64_t tiles = key_tiles(in_);
    const AdditiveGradients<S> a{query_,
                                 key_,
                                 vector(),
                                 padding_,
                                 in_.Tq,
                                 in_.Tk,
                                 in_.D,
                                 x.row,
                                 tiles,
                                 x.dcontext_value,
                                 x.dquery_parts,
                                 x.dvector_parts + first_ * tiles * in_.D,
                                 rows_of(grad.dkey, in_.Tk, in_.D)};
    launch("additive_gradients", additive_gradients<S>,
           {checked_blocks(in_.B * tiles * blocks(in_.D, kColumns), "attention"), kGradientThreads,
            sizeof(GradientShared)},
           a, stream_);
    const DquerySum<S> sum{vector(), padding_, in_.B,          in_.Tq,
                           in_.D,    tiles,    x.dquery_parts, rows_of(grad.dquery, in_.Tq, in_.D)};
    launch("sum_dquery", sum_dquery<S>,
           {checked_blocks(blocks(in_.B * in_.Tq * in_.D, kSumThreads), "attention"), kSumThreads}, sum, stream_);
  }

  const AttentionInputs& all_;
  AttentionInputs in_{};  // with the chosen rows' count
  int64_t first_ = 0;
  Tensor3<S> query_{}, key_{}, value_{};
  Padding padding_{};
  Stream stream_;
};

template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float());
    case Dtype::bf16:
      return body(Bf16());
    case Dtype::f16:
      return body(F16());
    default:
      throw std::runtime_error("attention on a GPU takes float32, bfloat16 or float16");
  }
}

}  // namespace

int64_t attention_forward_scratch(const AttentionInputs& in) {
  Parts parts(nullptr);
  if (in.Tq == 1)
    SingleScratch(in, true, parts);
  else
    with_type(in.dtype, [&](auto type) { PairScratch<decltype(type)>(in, false, parts); });
  return parts.used();
}

int64_t attention_backward_scratch(const AttentionInputs& in) {
  Parts parts(nullptr);
  with_type(in.dtype, [&](auto type) { PairScratch<decltype(type)>(in, true, parts); });
  return parts.used();
}

void attention_forward(const AttentionInputs& in, const AttentionOutputs& out, void* scratch, void* stream) {
  with_type(in.dtype, [&](auto type) {
    using S = decltype(type);
    Parts parts(scratch);
    Attention<S> attention(in, stream);
    if (in.Tq == 1)
      attention.single(out, SingleScratch(in, out.weights != nullptr, parts));
    else
      attention.forward(out, PairScratch<S>(in, false, parts));
  });
}

void attention_backward(const AttentionInputs& in, const AttentionGradients& grad, void* scratch, void* stream) {
  with_type(in.dtype, [&](auto type) {
    using S = decltype(type);
    Parts parts(scratch);
    Attention<S>(in, stream).backward(grad, PairScratch<S>(in, true, parts));
  });
}

}  // namespace rnnkern::cuda
