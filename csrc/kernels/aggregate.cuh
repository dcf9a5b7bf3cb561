// Token losses over [rows, cols], tile by tile.
//   token_loss_kernel   a block a tile, a thread every blockDim.x-th token: gradient and LossSums
//   finish_loss_kernel  one block, a thread every blockDim.x-th row: loss, metrics, row_scale
//   scale_rows_kernel   the backward, a block a row at a time
// Sums are T within a tile and double over tiles, always in the same order; nothing is atomic.
// For float32 a policy loss moves 13 to 18 bytes a token in (three values, masks, a weight), 4 out.
#pragma once

#include "aggregate.h"
#include "dtypes.h"
#include "warp.cuh"

namespace entropy_rl {

template <class T>
__device__ __forceinline__ LossSums<T> shuffle_xor(const LossSums<T>& value, int lane_mask) {
  return {shuffle_xor(value.loss, lane_mask),          shuffle_xor(value.selected, lane_mask),
          shuffle_xor(value.response, lane_mask),      shuffle_xor(value.clipped, lane_mask),
          shuffle_xor(value.clipped_lower, lane_mask), shuffle_xor(value.kl, lane_mask),
          shuffle_xor(value.advantage, lane_mask),     shuffle_xor(value.log_weight, lane_mask)};
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
__device__ __forceinline__ Token<T> load_token(const TokenInputs<T>& in, int64_t row,
                                               int64_t index) {
  return {in.log_prob[index], in.old_log_prob ? in.old_log_prob[index] : T(0),
          in.advantages ? in.advantages[index] : T(0),
          in.sequence_log_ratio ? in.sequence_log_ratio[row] : T(0),
          in.chosen && in.chosen[index] != 0};
}

// Calls fn(row, flat index) for this thread's tokens of a tile.
template <class T, class Fn>
__device__ __forceinline__ void for_each_token(const TokenInputs<T>& in, int64_t tile, Fn fn) {
  const int64_t row = tile / in.tiles_per_row();
  const int64_t begin = tile % in.tiles_per_row() * kTileTokens;
  const int64_t end = begin + kTileTokens < in.cols ? begin + kTileTokens : in.cols;
  for (int64_t column = begin + threadIdx.x; column < end; column += blockDim.x) {
    fn(row, row * in.cols + column);
  }
}

template <class T, class TokenLoss>
__global__ void token_loss_kernel(TokenLoss token_loss, TokenInputs<T> in,
                                  T* gradient /*[rows, cols]*/, LossSums<T>* sums /*[tiles]*/) {
  __shared__ LossSums<T> shared[kMaxWarps];
  for (int64_t tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
    LossSums<T> sum{};
    for_each_token(in, tile, [&](int64_t row, int64_t i) {
      T token_gradient = 0;
      // A token that is out may hold NaN: it is not read.
      if (in.response_mask[i] != 0) {
        const TokenResult<T> result = token_loss(load_token(in, row, i));
        sum.response += 1;
        sum.clipped += result.clipped;
        sum.clipped_lower += result.clipped_lower;
        sum.kl += result.kl;
        T weight = in.weights ? in.weights[i] : T(1);
        if constexpr (kIsSequenceLoss<TokenLoss>) {
          sum.advantage += in.advantages[i];
          if (in.weights) sum.log_weight += log_of_weight(weight);
          weight = 1;
        }
        if (!in.entropy_mask || in.entropy_mask[i] != 0) {
          sum.selected += 1;
          sum.loss += result.loss * weight;
          token_gradient = result.gradient * weight;
        }
      }
      gradient[i] = token_gradient;
    });
    sum = block_reduce(sum, LossSums<T>{}, AddSums{}, shared);
    if (threadIdx.x == 0) sums[tile] = sum;
  }
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
__global__ void scale_rows_kernel(const accumulate_t<T>* grad_loss /*[]*/,
                                  const accumulate_t<T>* gradient /*[rows, cols]*/,
                                  const accumulate_t<T>* row_scale /*[rows]*/, int64_t rows,
                                  int64_t cols, T* out /*[rows, cols]*/) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const accumulate_t<T> scale = *grad_loss * row_scale[row];
    for (int64_t i = row * cols + threadIdx.x; i < (row + 1) * cols; i += blockDim.x) {
      store_value(token_gradient(gradient[i], scale), out + i);
    }
  }
}

}  // namespace entropy_rl
