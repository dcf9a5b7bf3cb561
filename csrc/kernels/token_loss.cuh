// Token losses over [rows, cols], tile by tile; a thread takes four consecutive tokens at a time.
//   token_loss_kernel   a block a tile: gradient and LossSums
//   finish_loss_kernel  one block, a few lanes a row: loss, metrics, row_scale
//   scale_rows_kernel   the backward, a block a tile
// Sums are T within a tile and double over tiles, in an order that depends on shapes alone, without
// atomics. For float32 a policy loss reads 13 to 18 bytes a token (three values, masks, a weight)
// and writes 4; its backward reads 4 and writes 4.
#pragma once

#include <type_traits>

#include "dtypes.h"
#include "packs.cuh"
#include "token_loss_math.h"
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

// Up to four consecutive tokens of a row, tokens index ... index + count - 1. What the caller did
// not give is 0, a weight 1. Values of tokens that the mask leaves out may be NaN, and are not
// used. Without `clips` the clip ratios are not loaded, so that a loss that has numbers in their
// place pays nothing for them.
template <class T, bool clips = false>
struct PackedTokens {
  TokenPack<T> log_prob;
  TokenPack<T> old_log_prob;
  TokenPack<T> advantages;
  TokenPack<T> weights;
  TokenPack<uint8_t> response_mask;
  TokenPack<uint8_t> entropy_mask;
  TokenPack<uint8_t> chosen;
  TokenPack<T> clip_low;
  TokenPack<T> clip_high;
  T sequence_log_ratio;

  __device__ __forceinline__ PackedTokens(const TokenInputs<T>& in, int64_t row, int64_t index,
                                          int count, bool aligned) {
    const auto load = [&](const auto* values, auto absent) {
      return load_tokens(values, index, count, aligned, absent);
    };
    log_prob = load(in.log_prob, T(0));
    old_log_prob = load(in.old_log_prob, T(0));
    advantages = load(in.advantages, T(0));
    weights = load(in.weights, T(1));
    response_mask = load(in.response_mask, uint8_t{0});
    entropy_mask = load(in.entropy_mask, uint8_t{1});
    chosen = load(in.chosen, uint8_t{0});
    if constexpr (clips) {
      clip_low = load(in.clip_low, T(0));
      clip_high = load(in.clip_high, T(0));
    }
    sequence_log_ratio = in.sequence_log_ratio ? in.sequence_log_ratio[row] : T(0);
  }
  __device__ __forceinline__ bool is_response(int j) const { return response_mask.values[j] != 0; }
  __device__ __forceinline__ Token<T> token(int j) const {
    Token<T> token{log_prob.values[j],
                   old_log_prob.values[j],
                   advantages.values[j],
                   sequence_log_ratio,
                   chosen.values[j] != 0,
                   T(0),
                   T(0)};
    if constexpr (clips) {
      token.clip_low = clip_low.values[j];
      token.clip_high = clip_high.values[j];
    }
    return token;
  }
};

// Calls fn(row, flat index of the first token, how many) for this thread's packs of a tile.
template <class Fn>
__device__ __forceinline__ void for_each_pack(int64_t cols, int64_t tile, Fn fn) {
  const int64_t tiles_per_row = (cols + kTileTokens - 1) / kTileTokens;
  const int64_t row = tile / tiles_per_row;
  const int64_t begin = tile % tiles_per_row * kTileTokens;
  const int64_t end = begin + kTileTokens < cols ? begin + kTileTokens : cols;
  for (int64_t column = begin + kPackTokens * threadIdx.x; column < end;
       column += kPackTokens * blockDim.x) {
    fn(row, row * cols + column,
       static_cast<int>(end - column < kPackTokens ? end - column : kPackTokens));
  }
}

// Whether the packs of a tile are aligned in every array that PackedTokens loads.
template <bool clips = false, class T>
__device__ __forceinline__ bool tile_is_aligned(const TokenInputs<T>& in, int64_t tile) {
  const int64_t index = tile / in.tiles_per_row() * in.cols;  // tiles begin at multiples of 4
  const auto fits = [&](const auto* values) {
    using Element = std::decay_t<decltype(*values)>;
    return !values || TokenPack<Element>::is_aligned(values + index);
  };
  if (clips && !(fits(in.clip_low) && fits(in.clip_high))) return false;
  return fits(in.log_prob) && fits(in.old_log_prob) && fits(in.advantages) && fits(in.weights) &&
         fits(in.response_mask) && fits(in.entropy_mask) && fits(in.chosen);
}

template <class T, class TokenLoss>
__global__ void token_loss_kernel(TokenLoss token_loss, TokenInputs<T> in,
                                  T* gradient /*[rows, cols]*/, LossSums<T>* sums /*[tiles]*/) {
  constexpr bool clips = kReadsClipRatios<TokenLoss>;
  __shared__ LossSums<T> shared[kMaxWarps];
  for (int64_t tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
    LossSums<T> sum{};
    const bool aligned = tile_is_aligned<clips>(in, tile);
    for_each_pack(in.cols, tile, [&](int64_t row, int64_t index, int count) {
      const PackedTokens<T, clips> tokens(in, row, index, count, aligned);
      TokenPack<T> gradients;
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        gradients.values[j] = 0;
        if (!tokens.is_response(j)) continue;
        const TokenResult<T> result = token_loss(tokens.token(j));
        sum.response += 1;
        sum.clipped += result.clipped;
        sum.clipped_lower += result.clipped_lower;
        sum.kl += result.kl;
        T weight = tokens.weights.values[j];
        if constexpr (kIsSequenceLoss<TokenLoss>) {
          sum.advantage += tokens.advantages.values[j];
          if (in.weights) sum.log_weight += log_of_weight(weight);
          weight = 1;
        }
        if (tokens.entropy_mask.values[j] != 0) {
          sum.selected += 1;
          sum.loss += result.loss * weight;
          gradients.values[j] = result.gradient * weight;
        }
      }
      store_tokens(gradients, count, gradient + index);
    });
    sum = block_reduce(sum, LossSums<T>{}, Plus{}, shared);
    if (threadIdx.x == 0) sums[tile] = sum;
  }
}

// Lanes that share a row of tiles: a power of two, up to a warp.
ENTROPY_RL_HD inline int lanes_per_row(int64_t tiles_per_row) {
  int lanes = 1;
  while (lanes < tiles_per_row && lanes < kWarpSize) lanes *= 2;
  return lanes;
}

constexpr int kMaxFinishThreads = 512;

// This lane's first tile of a row; zero where it has none, and after the last row.
template <template <class> class Sums, class T>
__device__ __forceinline__ Sums<T> first_tile(const Sums<T>* tile_sums, int64_t row, int64_t rows,
                                              int64_t tiles_per_row, int lanes) {
  const int64_t tile = threadIdx.x % lanes;
  return row < rows && tile < tiles_per_row ? tile_sums[row * tiles_per_row + tile] : Sums<T>{};
}

// row_sum by `lanes` neighbouring threads, each of which returns it; `first` is first_tile. All
// threads of a warp call it.
template <template <class> class Sums, class T>
__device__ __forceinline__ Sums<double> shared_row_sum(const Sums<T>& first,
                                                       const Sums<T>* tile_sums, int64_t row,
                                                       int64_t rows, int64_t tiles_per_row,
                                                       int lanes) {
  Sums<double> sum{};
  sum += first;
  if (row < rows) {
    for (int64_t tile = threadIdx.x % lanes + lanes; tile < tiles_per_row; tile += lanes) {
      sum += tile_sums[row * tiles_per_row + tile];
    }
  }
  for (int lane_mask = lanes / 2; lane_mask > 0; lane_mask /= 2) {
    sum += shuffle_xor(sum, lane_mask);
  }
  return sum;
}

// Calls f(row, sum of the row) for every row, by one thread. All threads of the block call it.
template <class T, class F>
__device__ __forceinline__ void for_each_row(const LossSums<T>* sums /*[rows, tiles_per_row]*/,
                                             int64_t rows, int64_t tiles_per_row, F f) {
  // Rows whose loads a thread has in flight together, since nothing else hides their latency.
  constexpr int kAhead = 4;
  const int lanes = lanes_per_row(tiles_per_row);
  const int rows_at_once = static_cast<int>(blockDim.x) / lanes;
  // Every thread makes all rounds, because the shuffles need all lanes.
  for (int64_t begin = 0; begin < rows; begin += kAhead * rows_at_once) {
    const int64_t first_row = begin + threadIdx.x / lanes;
    LossSums<T> first[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      first[i] = first_tile(sums, first_row + i * rows_at_once, rows, tiles_per_row, lanes);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i * rows_at_once >= rows) break;
      const int64_t row = first_row + i * rows_at_once;
      const LossSums<double> sum = shared_row_sum(first[i], sums, row, rows, tiles_per_row, lanes);
      if (threadIdx.x % lanes == 0 && row < rows) f(row, sum);
    }
  }
}

// Launched with one block. The last block of token_loss_kernel to end could do its work instead,
// but would have to be told by a counter; clearing that takes a launch, too. Without the bound the
// compiler might give a thread more registers than a block of kMaxFinishThreads has for it, and the
// launch would fail.
template <class T, bool is_sequence_loss>
__global__ void __launch_bounds__(kMaxFinishThreads)
    finish_loss_kernel(const LossSums<T>* sums /*[tiles]*/, int64_t rows, int64_t tiles_per_row,
                       Normalization normalization, T* loss /*[]*/, T* metrics /*[kMetrics]*/,
                       T* row_scale /*[rows]*/) {
  __shared__ BatchSums shared_batch[kMaxWarps];
  __shared__ double shared_loss[kMaxWarps];
  BatchSums batch{};
  for_each_row(sums, rows, tiles_per_row, [&](int64_t, const LossSums<double>& row_sums) {
    batch.add_row(row_sums, normalization);
  });
  batch = block_reduce(batch, BatchSums{}, Plus{}, shared_batch);
  double sum = 0;
  for_each_row(sums, rows, tiles_per_row, [&](int64_t row, const LossSums<double>& row_sums) {
    const RowLoss result =
        row_loss<is_sequence_loss>(row_sums, batch, normalization, static_cast<double>(rows));
    sum += result.loss;
    row_scale[row] = static_cast<T>(result.scale);
  });
  sum = block_reduce(sum, 0.0, Plus{}, shared_loss);
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
  using Acc = accumulate_t<T>;
  const int64_t tiles = rows * ((cols + kTileTokens - 1) / kTileTokens);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for_each_pack(cols, tile, [&](int64_t row, int64_t index, int count) {
      const Acc scale = *grad_loss * row_scale[row];
      const bool aligned = TokenPack<Acc>::is_aligned(gradient + index);
      const TokenPack<Acc> factors = load_tokens(gradient, index, count, aligned, Acc(0));
      TokenPack<T> scaled;
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        store_value(token_gradient(factors.values[j], scale), &scaled.values[j]);
      }
      store_tokens(scaled, count, out + index);
    });
  }
}

}  // namespace entropy_rl
