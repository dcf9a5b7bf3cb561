// What policy_loss does before its pass (aggregate.cuh), where the loss needs it.
//   moments_kernel             a block a tile: Moments
//   sequence_log_ratio_kernel  a thread a row: gspo's sequence ratio
//   covariance_moments_kernel  one block: the Moments of the batch
//   covariance_keys_kernel     a block a tile: the keys by which clip_cov and kl_cov choose tokens
// Sums are T within a tile and double over tiles, always in the same order; nothing is atomic.
// For float32 a token moves 13 bytes in for the moments, and 13 in and 4 out for the keys.
#pragma once

#include "aggregate.cuh"
#include "policy_loss.h"

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
    for_each_token(in, tile, [&](int64_t row, int64_t i) {
      if (in.response_mask[i] == 0) return;
      const Token<T> token = load_token(in, row, i);
      sum += Moments<T>{T(1), token.log_prob - token.old_log_prob, token.log_prob, token.advantage};
    });
    sum = block_reduce(sum, Moments<T>{}, AddSums{}, shared);
    if (threadIdx.x == 0) moments[tile] = sum;
  }
}

template <class T>
__global__ void sequence_log_ratio_kernel(const Moments<T>* moments /*[rows, tiles_per_row]*/,
                                          int64_t rows, int64_t tiles_per_row, T* out /*[rows]*/) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < rows;
       row += stride) {
    out[row] = static_cast<T>(sequence_log_ratio(row_sum(moments, row, tiles_per_row)));
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
    for_each_token(in, tile, [&](int64_t row, int64_t i) {
      keys[i] = in.response_mask[i] != 0 ? key(load_token(in, row, i), batch, seed_value, i)
                                         : kIneligibleKey<typename CovarianceKey::Key>;
    });
  }
}

}  // namespace entropy_rl
