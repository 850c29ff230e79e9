// The matrix products of attention, batched over rows b, two of one kind in a launch:
//
//   across   [M, K] [N, K]^T -> float   scores = scale query key^T, dweights = dcontext value^T        N: keys
//   along    [M, K] [K, N]   -> S       context = weights value, dquery = dscores key                  K: keys
//   back     [K, M]^T [K, N] -> S       dvalue = weights^T dcontext, dkey = dscores^T query            M: keys
//
// A block makes 64 x 64 outputs, through three stages of asynchronous copies of 128 bytes per row (55 KB of shared
// memory, four blocks per multiprocessor). Keys that are padding are never read, tiles of them never computed; rows of
// dvalue and dkey that belong to padding are zero. Each output is one chain over K in order, whatever the batch.
#pragma once

#include "cuda/tile_product.cuh"

namespace rnnkern::cuda {

enum class ProductKind { across, along, back };

template <class S, class Out>
struct MatrixProduct {
  Tensor3<S> a, b;
  Out* to;  // [B, M, N]
  int64_t to_batch, to_row;
  int64_t M, N, K;
  float scale;
};

template <class S, class Out>
struct MatrixProducts {
  MatrixProduct<S, Out> of[2];
  int64_t first_blocks;  // of of[0]; the rest are of[1]'s
  Padding padding;
};

constexpr int kStages = 3;
constexpr size_t kProductShared = size_t(kStages) * 2 * kTileBytes;

template <class Out>
RNNKERN_DEVICE void store_pair(Out* to, int64_t left, int distance, float first, float second, bool aligned) {
  if (distance == 1 && aligned && left > 1) {
    store(reinterpret_cast<Vec<Out, 2>*>(to), Vec<Out, 2>{{from_float<Out>(first), from_float<Out>(second)}});
    return;
  }
  if (left > 0) store(to, from_float<Out>(first));
  if (left > distance) store(to + distance, from_float<Out>(second));
}

template <class S, class Out, ProductKind kKind>
RNNKERN_KERNEL(kTileThreads, 4)
attention_products(RNNKERN_ARGUMENT MatrixProducts<S, Out> all) {
  constexpr bool kTallA = kKind == ProductKind::back, kTallB = kKind != ProductKind::across;
  constexpr int kInner = kTileInner<S>;
  const bool second = block_index() >= all.first_blocks;
  const MatrixProduct<S, Out>& p = all.of[second];
  const int64_t block = second ? block_index() - all.first_blocks : block_index();
  const int64_t columns = parts_of(p.N, kTile), rows = parts_of(p.M, kTile);
  const int64_t n = block % columns * kTile, m = block / columns % rows * kTile, b = block / columns / rows;
  const Keys keys(all.padding, b);
  if (kKind == ProductKind::across && n >= keys.length) return;
  int64_t K = p.K;
  if (kKind == ProductKind::along) K = keys.length;
  if (kKind == ProductKind::back && m >= keys.length) K = 0;

  S* const tiles = reinterpret_cast<S*>(shared_memory());
  constexpr int kTileElements = kTileBytes / int(sizeof(S));
  const S *a = p.a.data + b * p.a.batch, *from_b = p.b.data + b * p.b.batch;
  const auto load_stage = [&](int64_t chunk) {
    if (chunk * kInner < K) {
      S *a_tile = tiles + int(chunk % kStages) * 2 * kTileElements, *b_tile = a_tile + kTileElements;
      const int64_t k = chunk * kInner;
      if constexpr (kTallA)
        load_tile<kInner, kTile, kTileRow<S, true>>(a_tile, a, p.a.row, p.a.aligned, AllRows(), k, K, m, p.M);
      else
        load_tile<kTile, kInner, kTileRow<S, false>>(a_tile, a, p.a.row, p.a.aligned, AllRows(), m, p.M, k, K);
      if constexpr (kKind == ProductKind::across)
        load_tile<kTile, kInner, kTileRow<S, false>>(b_tile, from_b, p.b.row, p.b.aligned, keys, n, p.N, k, K);
      else if constexpr (kKind == ProductKind::along)
        load_tile<kInner, kTile, kTileRow<S, true>>(b_tile, from_b, p.b.row, p.b.aligned, keys, k, K, n, p.N);
      else
        load_tile<kInner, kTile, kTileRow<S, true>>(b_tile, from_b, p.b.row, p.b.aligned, AllRows(), k, K, n, p.N);
    }
    commit_copies();
  };

  TileProduct<S, kTallA, kTallB> product;
  for (int64_t chunk = 0; chunk < kStages - 1; ++chunk) load_stage(chunk);
  for (int64_t chunk = 0; chunk * kInner < K; ++chunk) {
    wait_copies<kStages - 2>();
    sync_block();  // this chunk is there, and the one before is no longer read
    load_stage(chunk + kStages - 1);
    const S* a_tile = tiles + int(chunk % kStages) * 2 * kTileElements;
    product.add(a_tile, a_tile + kTileElements);
  }
  wait_copies<0>();

  Out* const to = p.to + b * p.to_batch;
  const bool pairs = p.to_row % 2 == 0 && p.to_batch % 2 == 0;
  product.for_each_pair([&](int row, int column, int distance, float first_value, float second_value) {
    if (m + row >= p.M) return;
    const bool kept = kKind != ProductKind::back || keys.valid(m + row);
    store_pair(to + (m + row) * p.to_row + n + column, p.N - n - column, distance, kept ? p.scale * first_value : 0.0f,
               kept ? p.scale * second_value : 0.0f, pairs);
  });
}

}  // namespace rnnkern::cuda
