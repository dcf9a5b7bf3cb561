// Reductions and scans over the threads of a warp and of a block. The order of combination depends
// on the block size alone, so results are the same in every run. nvcc compiles this as CUDA; the
// host tests compile it against their SIMT shim.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "online_softmax.h"

namespace entropy_rl {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxWarps = 32;

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kFullMask, value, lane_mask);
}

// All 32 lanes call it; all return the combination of their values.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
    value = combine(value, shuffle_xor(value, lane_mask));
  }
  return value;
}

struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return larger(a, b);
  }
};

struct Plus {
  template <class T>
  __device__ __forceinline__ T operator()(T a, const T& b) const {
    a += b;
    return a;
  }
};

// Combines the partial rows of a warp's lanes, with one exponential a lane; all return the result.
template <class Acc>
__device__ __forceinline__ OnlineSoftmax<Acc> warp_merge(const OnlineSoftmax<Acc>& state,
                                                         Acc inverse_temperature) {
  const Acc max = warp_reduce(state.max, Larger{});
  OnlineSoftmax<Acc> merged = rescaled(state, max, inverse_temperature);
  merged.sum = warp_reduce(merged.sum, Plus{});
  merged.dot = warp_reduce(merged.dot, Plus{});
  return merged;
}

// All threads of the block call it, blockDim.x a multiple of 32; all return the combination.
// `shared` holds kMaxWarps values; `neutral` stands in for warps that the block does not have.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, T neutral, Combine combine, T* shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  value = warp_reduce(value, combine);
  if (warps == 1) return value;
  // A previous use of `shared` may still be read by slower warps.
  __syncthreads();
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? shared[lane] : neutral, combine);
}

// Sum of `value` over all threads before this one; `total` receives the block's sum.
// `shared` holds kMaxWarps values.
template <class T>
__device__ __forceinline__ T block_exclusive_scan(T value, T* total, T* shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  T inclusive = value;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const T below = __shfl_up_sync(kFullMask, inclusive, delta);
    if (lane >= delta) inclusive += below;
  }
  // A previous use of `shared` may still be read by slower warps.
  __syncthreads();
  if (lane == kWarpSize - 1) shared[warp] = inclusive;
  __syncthreads();
  T before = 0;
  T sum = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before = sum;
    sum += shared[w];
  }
  *total = sum;
  return before + inclusive - value;
}

}  // namespace entropy_rl
