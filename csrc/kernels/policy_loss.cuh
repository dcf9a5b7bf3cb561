// The losses of policy_loss.h over [rows, cols] tokens, tile by tile.
//   policy_loss_kernel      a block a tile, a thread every blockDim.x-th token: gradient and LossSums
//   finish_loss_kernel      one block, a thread every blockDim.x-th row: loss, metrics, row_scale
//   moments_kernel          a block a tile: Moments, for the losses that need sums before their pass
//   covariance_moments_kernel  one block: their sum over the batch
//   covariance_keys_kernel  a block a tile: the keys by which clip_cov and kl_cov choose tokens
// Sums are T within a tile and double over tiles, always in the same order; nothing is atomic.
// For float32 a token moves 13 to 18 bytes in (three values, masks, a weight) and 4 out.
#pragma once

#include "policy_loss.h"
#include "warp.cuh"

namespace entropy_rl {

template <class T>
__device__ __forceinline__ LossSums<T> shuffle_xor(const LossSums<T>& value, int lane_mask) {
  return {shuffle_xor(value.loss, lane_mask),          shuffle_xor(value.selected, lane_mask),
          shuffle_xor(value.response, lane_mask),      shuffle_xor(value.clipped, lane_mask),
          shuffle_xor(value.clipped_lower, lane_mask), shuffle_xor(value.kl, lane_mask),
          shuffle_xor(value.advantage, lane_mask),     shuffle_xor(value.log_weight, lane_mask)};
}

template <class T>
__device__ __forceinline__ Moments<T> shuffle_xor(const Moments<T>& value, int lane_mask) {
  return {shuffle_xor(value.response, lane_mask), shuffle_xor(value.log_ratio, lane_mask),
          shuffle_xor(value.log_prob, lane_mask), shuffle_xor(value.advantage, lane_mask)};
}

__device__ __forceinline__ BatchSums shuffle_xor(const BatchSums& value, int lane_mask) {
  return {shuffle_xor(value.tokens, lane_mask), shuffle_xor(value.counted_rows, lane_mask)};
}

struct AddSums {
  template <class Sums>
  __device__ Sums operator()(Sums a, const Sums& b) const {
    a += b;
    return a;
  }
  __device__ double operator()(double a, double b) const { return a + b; }
};

// The token at a flat index; absent inputs read as 0.
template <class T>
__device__ __forceinline__ Token<T> load_token(const TokenInputs<T>& in, int64_t index,
                                               T sequence_log_ratio) {
  return {in.log_prob[index], in.old_log_prob ? in.old_log_prob[index] : T(0),
          in.advantages ? in.advantages[index] : T(0), sequence_log_ratio,
          in.chosen && in.chosen[index] != 0};
}

// Calls fn(tile, row) for the tiles of this block, and each_token(index) for the tokens of a tile.
template <class T>
struct BlockTiles {
  const TokenInputs<T>& in;

  template <class Fn>
  __device__ __forceinline__ void for_each(Fn fn) const {
    for (int64_t tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
      fn(tile, tile / in.tiles_per_row());
    }
  }
  template <class Fn>
  __device__ __forceinline__ void for_each_token(int64_t tile, Fn fn) const {
    const int64_t row = tile / in.tiles_per_row();
    const int64_t begin = tile % in.tiles_per_row() * kTileTokens;
    const int64_t end = begin + kTileTokens < in.cols ? begin + kTileTokens : in.cols;
    for (int64_t column = begin + threadIdx.x; column < end; column += blockDim.x) {
      fn(row * in.cols + column);
    }
  }
};

// `moments` is null but for the losses that need the sequence ratio.
template <class T, class TokenLoss>
__global__ void policy_loss_kernel(TokenLoss token_loss, TokenInputs<T> in,
                                   const Moments<T>* moments /*[tiles] or null*/,
                                   T* gradient /*[rows, cols]*/, LossSums<T>* sums /*[tiles]*/) {
  __shared__ LossSums<T> shared[kMaxWarps];
  const BlockTiles<T> tiles{in};
  tiles.for_each([&](int64_t tile, int64_t row) {
    T sequence = 0;
    if constexpr (kNeedsSequenceRatio<TokenLoss>) {
      sequence = static_cast<T>(sequence_log_ratio(row_sum(moments, row, in.tiles_per_row())));
    }
    LossSums<T> sum{};
    tiles.for_each_token(tile, [&](int64_t i) {
      gradient[i] = 0;
      // A token that is out may hold NaN: it is not read.
      if (in.response_mask[i] == 0) return;
      const TokenResult<T> result = token_loss(load_token(in, i, sequence));
      sum.response += 1;
      sum.clipped += result.clipped;
      sum.clipped_lower += result.clipped_lower;
      sum.kl += result.kl;
      T weight = in.weights ? in.weights[i] : T(1);
      if constexpr (kIsSequenceLoss<TokenLoss>) {
        sum.advantage += in.advantages[i];
        sum.log_weight += log_of_weight(weight);
        weight = 1;
      }
      if (in.entropy_mask && in.entropy_mask[i] == 0) return;
      sum.selected += 1;
      sum.loss += result.loss * weight;
      gradient[i] = result.gradient * weight;
    });
    sum = block_reduce(sum, LossSums<T>{}, AddSums{}, shared);
    if (threadIdx.x == 0) sums[tile] = sum;
  });
}

// Launched with one block.
template <class T, class TokenLoss>
__global__ void finish_loss_kernel(const LossSums<T>* sums /*[tiles]*/, int64_t rows,
                                   int64_t tiles_per_row, Normalization normalization,
                                   T* loss /*[]*/, T* metrics /*[kMetrics]*/,
                                   T* row_scale /*[rows]*/) {
  __shared__ BatchSums shared_batch[kMaxWarps];
  __shared__ double shared_loss[kMaxWarps];
  BatchSums batch{};
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    batch.add_row(row_sum(sums, row, tiles_per_row), normalization);
  }
  batch = block_reduce(batch, BatchSums{}, AddSums{}, shared_batch);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    const RowLoss result = row_loss<TokenLoss>(row_sum(sums, row, tiles_per_row), batch,
                                               normalization, static_cast<double>(rows));
    sum += result.loss;
    row_scale[row] = static_cast<T>(result.scale);
  }
  sum = block_reduce(sum, 0.0, AddSums{}, shared_loss);
  if (threadIdx.x == 0) {
    *loss = static_cast<T>(sum);
    write_metrics(batch, metrics);
  }
}

template <class T>
__global__ void moments_kernel(TokenInputs<T> in, Moments<T>* moments /*[tiles]*/) {
  __shared__ Moments<T> shared[kMaxWarps];
  const BlockTiles<T> tiles{in};
  tiles.for_each([&](int64_t tile, int64_t) {
    Moments<T> sum{};
    tiles.for_each_token(tile, [&](int64_t i) {
      if (in.response_mask[i] == 0) return;
      const Token<T> token = load_token(in, i, T(0));
      sum += Moments<T>{T(1), token.log_prob - token.old_log_prob, token.log_prob, token.advantage};
    });
    sum = block_reduce(sum, Moments<T>{}, AddSums{}, shared);
    if (threadIdx.x == 0) moments[tile] = sum;
  });
}

// Launched with one block.
template <class T, class CovarianceKey>
__global__ void covariance_moments_kernel(CovarianceKey key, const Moments<T>* moments /*[tiles]*/,
                                          int64_t tiles, CovarianceMoments* out /*[]*/) {
  __shared__ Moments<double> shared[kMaxWarps];
  Moments<double> sum{};
  for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) sum += moments[tile];
  sum = block_reduce(sum, Moments<double>{}, AddSums{}, shared);
  if (threadIdx.x == 0) *out = CovarianceMoments(sum, key.ratio, CovarianceKey::kEpsilon);
}

template <class T, class CovarianceKey>
__global__ void covariance_keys_kernel(CovarianceKey key, TokenInputs<T> in,
                                       const CovarianceMoments* moments /*[]*/,
                                       const int64_t* seed /*[]*/,
                                       typename CovarianceKey::Key* keys /*[rows, cols]*/) {
  const CovarianceMoments batch = *moments;
  const uint64_t seed_value = static_cast<uint64_t>(*seed);
  const BlockTiles<T> tiles{in};
  tiles.for_each([&](int64_t tile, int64_t) {
    tiles.for_each_token(tile, [&](int64_t i) {
      keys[i] = in.response_mask[i] != 0 ? key(load_token(in, i, T(0)), batch, seed_value, i)
                                         : kIneligibleKey<typename CovarianceKey::Key>;
    });
  });
}

}  // namespace entropy_rl
