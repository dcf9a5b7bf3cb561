// What policy_loss does before its pass (token_loss.cuh), where the loss needs it.
//   moments_kernel             a block a tile: Moments
//   sequence_log_ratio_kernel  a few lanes a row: gspo's sequence ratio
//   covariance_moments_kernel  one block: the Moments of the batch
//   covariance_keys_kernel     a block a tile: the keys by which clip_cov and kl_cov choose tokens
// Sums are T within a tile and double over tiles, in an order that shapes alone decide; nothing is
// atomic.
// For float32 a token moves 13 bytes in for the moments, and 13 in and 4 out for the keys.
#pragma once

#include "policy_loss_math.h"
#include "token_loss.cuh"

namespace entropy_rl {

template <class T>
__device__ __forceinline__ Moments<T> shuffle_xor(const Moments<T>& value, int lane_mask) {
  return {shuffle_xor(value.response, lane_mask), shuffle_xor(value.log_ratio, lane_mask),
          shuffle_xor(value.log_prob, lane_mask), shuffle_xor(value.advantage, lane_mask)};
}

template <class T>
__global__ void moments_kernel(TokenInputs<T> in, Moments<T>* moments /*[tiles]*/) {
  __shared__ Moments<T> shared[kMaxWarps];
  for (int64_t tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
    Moments<T> sum{};
    const bool together = tile_has_quads(in, tile);
    for_each_quad(in.cols, tile, [&](int64_t row, int64_t index, int count) {
      const TokenQuad<T> quad(in, row, index, count, together);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (!quad.is_response(j)) continue;
        const Token<T> token = quad.token(j);
        sum +=
            Moments<T>{T(1), token.log_prob - token.old_log_prob, token.log_prob, token.advantage};
      }
    });
    sum = block_reduce(sum, Moments<T>{}, AddSums{}, shared);
    if (threadIdx.x == 0) moments[tile] = sum;
  }
}

template <class T>
__global__ void sequence_log_ratio_kernel(const Moments<T>* moments /*[rows, tiles_per_row]*/,
                                          int64_t rows, int64_t tiles_per_row, T* out /*[rows]*/) {
  const int lanes = lanes_per_row(tiles_per_row);
  const int64_t rows_at_once = blockDim.x / lanes;
  // All threads of a block go around together, for the shuffles.
  for (int64_t first = blockIdx.x * rows_at_once; first < rows; first += gridDim.x * rows_at_once) {
    const int64_t row = first + threadIdx.x / lanes;
    const Moments<double> sums = shared_row_sum(moments, row, rows, tiles_per_row, lanes);
    if (threadIdx.x % lanes == 0 && row < rows) out[row] = static_cast<T>(sequence_log_ratio(sums));
  }
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
  for (int64_t tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
    const bool together = tile_has_quads(in, tile);
    for_each_quad(in.cols, tile, [&](int64_t row, int64_t index, int count) {
      using Key = typename CovarianceKey::Key;
      const TokenQuad<T> quad(in, row, index, count, together);
      Key four[kQuad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        four[j] = quad.is_response(j) ? key(quad.token(j), batch, seed_value, index + j)
                                      : kIneligibleKey<Key>;
      }
      store_tokens(four, count, keys + index);
    });
  }
}

}  // namespace entropy_rl
