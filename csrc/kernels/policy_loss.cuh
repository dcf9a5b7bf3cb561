// What some policy losses need before the pass over the tokens (token_loss.cuh).
//   moments_kernel             a block a tile: Moments
//   sequence_log_ratio_kernel  a few lanes a row: gspo's sequence ratio
//   covariance_moments_kernel  one block: the Moments of the batch
//   covariance_keys_kernel     a block a tile: the keys by which clip_cov and kl_cov choose tokens
// Sums are T within a tile and double over tiles, in an order that depends on shapes alone, without
// atomics. For float32 the moments read 13 bytes a token; the keys read 13 and write 4.
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
    const bool aligned = tile_is_aligned(in, tile);
    for_each_pack(in.cols, tile, [&](int64_t row, int64_t index, int count) {
      const PackedTokens<T> tokens(in, row, index, count, aligned);
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        if (!tokens.is_response(j)) continue;
        const Token<T> token = tokens.token(j);
        sum +=
            Moments<T>{T(1), token.log_prob - token.old_log_prob, token.log_prob, token.advantage};
      }
    });
    sum = block_reduce(sum, Moments<T>{}, Plus{}, shared);
    if (threadIdx.x == 0) moments[tile] = sum;
  }
}

template <class T>
__global__ void sequence_log_ratio_kernel(const Moments<T>* moments /*[rows, tiles_per_row]*/,
                                          int64_t rows, int64_t tiles_per_row, T* out /*[rows]*/) {
  const int lanes = lanes_per_row(tiles_per_row);
  const int64_t rows_per_block = blockDim.x / lanes;
  const int64_t row = blockIdx.x * rows_per_block + threadIdx.x / lanes;
  const Moments<T> first = first_tile(moments, row, rows, tiles_per_row, lanes);
  const Moments<double> sums = shared_row_sum(first, moments, row, rows, tiles_per_row, lanes);
  if (threadIdx.x % lanes == 0 && row < rows) out[row] = static_cast<T>(sequence_log_ratio(sums));
}

// Launched with one block.
template <class T, class CovarianceKey>
__global__ void covariance_moments_kernel(CovarianceKey key, const Moments<T>* moments /*[tiles]*/,
                                          int64_t tiles, CovarianceMoments* out /*[]*/) {
  __shared__ Moments<double> shared[kMaxWarps];
  Moments<double> sum{};
  for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) sum += moments[tile];
  sum = block_reduce(sum, Moments<double>{}, Plus{}, shared);
  if (threadIdx.x == 0) *out = CovarianceMoments(sum, key.ratio, CovarianceKey::kEpsilon);
}

template <class T, class CovarianceKey>
__global__ void covariance_keys_kernel(CovarianceKey key, TokenInputs<T> in,
                                       const CovarianceMoments* moments /*[]*/,
                                       const int64_t* seed /*[]*/,
                                       typename CovarianceKey::Key* keys /*[rows, cols]*/) {
  constexpr bool clips = kReadsClipRatios<CovarianceKey>;
  const CovarianceMoments batch = *moments;
  const uint64_t seed_value = static_cast<uint64_t>(*seed);
  for (int64_t tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
    const bool aligned = tile_is_aligned<clips>(in, tile);
    for_each_pack(in.cols, tile, [&](int64_t row, int64_t index, int count) {
      using Key = typename CovarianceKey::Key;
      const PackedTokens<T, clips> tokens(in, row, index, count, aligned);
      TokenPack<Key> pack;
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        pack.values[j] = tokens.is_response(j) ? key(tokens.token(j), batch, seed_value, index + j)
                                               : kIneligibleKey<Key>;
      }
      store_tokens(pack, count, keys + index);
    });
  }
}

}  // namespace entropy_rl
