// Token losses over [rows, cols], tile by tile, four consecutive tokens a thread at a time.
//   token_loss_kernel   a block a tile: gradient and LossSums
//   finish_loss_kernel  one block, a few lanes a row: loss, metrics, row_scale
//   scale_rows_kernel   the backward, a block a tile
// Sums are T within a tile and double over tiles, in an order that shapes alone decide; nothing is
// atomic. For float32 a policy loss moves 13 to 18 bytes a token in (three values, masks, a
// weight) and 4 out, its backward 4 in and 4 out.
#pragma once

#include "dtypes.h"
#include "quad.cuh"
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

struct AddSums {
  template <class Sums>
  __device__ Sums operator()(Sums a, const Sums& b) const {
    a += b;
    return a;
  }
  __device__ double operator()(double a, double b) const { return a + b; }
};

// Up to four consecutive tokens of a row; what the caller did not give is 0, a weight 1. A token
// that is out may hold NaN: it is read and not used.
template <class T>
struct TokenQuad {
  T log_prob[kQuad];
  T old_log_prob[kQuad];
  T advantages[kQuad];
  T weights[kQuad];
  uint8_t response_mask[kQuad];
  uint8_t entropy_mask[kQuad];
  uint8_t chosen[kQuad];
  T sequence_log_ratio;

  // Tokens index ... index + count - 1, `count` at most 4.
  __device__ __forceinline__ TokenQuad(const TokenInputs<T>& in, int64_t row, int64_t index,
                                       int count, bool together) {
    load(in.log_prob, index, count, together, T(0), log_prob);
    load(in.old_log_prob, index, count, together, T(0), old_log_prob);
    load(in.advantages, index, count, together, T(0), advantages);
    load(in.weights, index, count, together, T(1), weights);
    load(in.response_mask, index, count, together, uint8_t{0}, response_mask);
    load(in.entropy_mask, index, count, together, uint8_t{1}, entropy_mask);
    load(in.chosen, index, count, together, uint8_t{0}, chosen);
    sequence_log_ratio = in.sequence_log_ratio ? in.sequence_log_ratio[row] : T(0);
  }
  __device__ __forceinline__ bool is_response(int j) const { return response_mask[j] != 0; }
  __device__ __forceinline__ Token<T> token(int j) const {
    return {log_prob[j], old_log_prob[j], advantages[j], sequence_log_ratio, chosen[j] != 0};
  }

 private:
  template <class U>
  __device__ __forceinline__ static void load(const U* from, int64_t index, int count,
                                              bool together, U absent, U (&to)[kQuad]) {
    if (from && together && count == kQuad) return load_quad(from + index, to);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) to[j] = from && j < count ? from[index + j] : absent;
  }
};

// Calls fn(row, flat index of the first, how many) for this thread's quads of a tile.
template <class Fn>
__device__ __forceinline__ void for_each_quad(int64_t cols, int64_t tile, Fn fn) {
  const int64_t tiles_per_row = (cols + kTileTokens - 1) / kTileTokens;
  const int64_t row = tile / tiles_per_row;
  const int64_t begin = tile % tiles_per_row * kTileTokens;
  const int64_t end = begin + kTileTokens < cols ? begin + kTileTokens : cols;
  for (int64_t column = begin + kQuad * threadIdx.x; column < end; column += kQuad * blockDim.x) {
    fn(row, row * cols + column, static_cast<int>(end - column < kQuad ? end - column : kQuad));
  }
}

// Whether the quads of a tile can be read by one access each, whatever is given.
template <class T>
__device__ __forceinline__ bool tile_has_quads(const TokenInputs<T>& in, int64_t tile) {
  const int64_t index = tile / in.tiles_per_row() * in.cols;  // tiles begin at multiples of 4
  const auto fits = [&](auto* values) { return !values || is_quad(values + index); };
  return fits(in.log_prob) && fits(in.old_log_prob) && fits(in.advantages) && fits(in.weights) &&
         fits(in.response_mask) && fits(in.entropy_mask) && fits(in.chosen);
}

template <class T>
__device__ __forceinline__ void store_tokens(const T (&values)[kQuad], int count, T* to) {
  if (count == kQuad && is_quad(to)) return store_quad(values, to);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j < count) to[j] = values[j];
  }
}

template <class T, class TokenLoss>
__global__ void token_loss_kernel(TokenLoss token_loss, TokenInputs<T> in,
                                  T* gradient /*[rows, cols]*/, LossSums<T>* sums /*[tiles]*/) {
  __shared__ LossSums<T> shared[kMaxWarps];
  for (int64_t tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
    LossSums<T> sum{};
    const bool together = tile_has_quads(in, tile);
    for_each_quad(in.cols, tile, [&](int64_t row, int64_t index, int count) {
      const TokenQuad<T> quad(in, row, index, count, together);
      T gradients[kQuad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        gradients[j] = 0;
        if (!quad.is_response(j)) continue;
        const TokenResult<T> result = token_loss(quad.token(j));
        sum.response += 1;
        sum.clipped += result.clipped;
        sum.clipped_lower += result.clipped_lower;
        sum.kl += result.kl;
        T weight = quad.weights[j];
        if constexpr (kIsSequenceLoss<TokenLoss>) {
          sum.advantage += quad.advantages[j];
          if (in.weights) sum.log_weight += log_of_weight(weight);
          weight = 1;
        }
        if (quad.entropy_mask[j] != 0) {
          sum.selected += 1;
          sum.loss += result.loss * weight;
          gradients[j] = result.gradient * weight;
        }
      }
      store_tokens(gradients, count, gradient + index);
    });
    sum = block_reduce(sum, LossSums<T>{}, AddSums{}, shared);
    if (threadIdx.x == 0) sums[tile] = sum;
  }
}

// Lanes that share a row of tiles: a power of two, up to a warp.
__device__ __forceinline__ int lanes_per_row(int64_t tiles_per_row) {
  int lanes = 1;
  while (lanes < tiles_per_row && lanes < kWarpSize) lanes *= 2;
  return lanes;
}

// row_sum by `lanes` neighbouring threads, of which each returns it. All threads of a warp call it;
// a row beyond the last is zero.
template <template <class> class Sums, class T>
__device__ __forceinline__ Sums<double> shared_row_sum(const Sums<T>* tile_sums, int64_t row,
                                                       int64_t rows, int64_t tiles_per_row,
                                                       int lanes) {
  Sums<double> sum{};
  if (row < rows) {
    for (int64_t tile = threadIdx.x % lanes; tile < tiles_per_row; tile += lanes) {
      sum += tile_sums[row * tiles_per_row + tile];
    }
  }
  for (int lane_mask = lanes / 2; lane_mask > 0; lane_mask /= 2) {
    sum += shuffle_xor(sum, lane_mask);
  }
  return sum;
}

// Launched with one block.
template <class T, class TokenLoss>
__global__ void finish_loss_kernel(const LossSums<T>* sums /*[tiles]*/, int64_t rows,
                                   int64_t tiles_per_row, Normalization normalization,
                                   T* loss /*[]*/, T* metrics /*[kMetrics]*/,
                                   T* row_scale /*[rows]*/) {
  __shared__ BatchSums shared_batch[kMaxWarps];
  __shared__ double shared_loss[kMaxWarps];
  const int lanes = lanes_per_row(tiles_per_row);
  const int rows_at_once = static_cast<int>(blockDim.x) / lanes;
  const int64_t first_row = threadIdx.x / lanes;
  const bool is_first_lane = threadIdx.x % lanes == 0;
  // All threads go around together, for the shuffles.
  const int64_t rounds = (rows + rows_at_once - 1) / rows_at_once;
  BatchSums batch{};
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t row = first_row + round * rows_at_once;
    const LossSums<double> row_sums = shared_row_sum(sums, row, rows, tiles_per_row, lanes);
    if (is_first_lane) batch.add_row(row_sums, normalization);
  }
  batch = block_reduce(batch, BatchSums{}, AddSums{}, shared_batch);
  double sum = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t row = first_row + round * rows_at_once;
    const LossSums<double> row_sums = shared_row_sum(sums, row, rows, tiles_per_row, lanes);
    if (!is_first_lane || row >= rows) continue;
    const RowLoss result =
        row_loss<TokenLoss>(row_sums, batch, normalization, static_cast<double>(rows));
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
  using Acc = accumulate_t<T>;
  const int64_t tiles = rows * ((cols + kTileTokens - 1) / kTileTokens);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for_each_quad(cols, tile, [&](int64_t row, int64_t index, int count) {
      const Acc scale = *grad_loss * row_scale[row];
      Acc factors[kQuad] = {};
      if (count == kQuad && is_quad(gradient + index)) {
        load_quad(gradient + index, factors);
      } else {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if (j < count) factors[j] = gradient[index + j];
        }
      }
      T scaled[kQuad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) store_value(token_gradient(factors[j], scale), &scaled[j]);
      store_tokens(scaled, count, out + index);
    });
  }
}

}  // namespace entropy_rl
