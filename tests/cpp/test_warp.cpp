// Reductions and scans of csrc/kernels/warp.cuh under the SIMT shim.
#include "kernels/warp.cuh"

#include <gtest/gtest.h>

#include <numeric>

#include "softmax_reference.h"

namespace entropy_rl {
namespace {

struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// One warp, four, as many as a block can have, and a number of warps that is not a power of two.
const std::vector<int> kBlockSizes = {32, 128, 1024, 96};

template <class T, class Combine>
__global__ void block_reduce_kernel(const T* in, T* out, T neutral) {  // [blocks * threads], same
  __shared__ T shared[kMaxWarps];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = block_reduce(in[i], neutral, Combine{}, shared);
}

TEST(Warp, EveryThreadReceivesTheBlocksSum) {
  for (int threads : kBlockSizes) {
    simt::Buffer<int> in(2 * threads), out(2 * threads);
    std::iota(in.begin(), in.end(), -100);
    simt::launch(2, threads, block_reduce_kernel<int, Plus>, in.data(), out.data(), 0);
    for (int block = 0; block < 2; ++block) {
      const int sum =
          std::accumulate(in.begin() + block * threads, in.begin() + (block + 1) * threads, 0);
      for (int thread = 0; thread < threads; ++thread)
        EXPECT_EQ(out[block * threads + thread], sum);
    }
  }
}

TEST(Warp, NeutralStandsInForMissingWarps) {
  // Every value is negative, so a 0 in place of a missing warp would be found.
  for (int threads : kBlockSizes) {
    simt::Buffer<int> in(std::vector<int>(threads, -7)), out(threads);
    in[threads - 1] = -3;
    simt::launch(1, threads, block_reduce_kernel<int, Max>, in.data(), out.data(),
                 std::numeric_limits<int>::min());
    for (int value : out) EXPECT_EQ(value, -3);
  }
}

TEST(Warp, FloatSumIsTheSameInEveryThread) {
  const int threads = 1024;
  simt::Buffer<float> in(testing::normal_values<float>(threads, 1e3, 1)), out(threads);
  simt::launch(1, threads, block_reduce_kernel<float, Plus>, in.data(), out.data(), 0.0f);
  const double sum = std::accumulate(in.begin(), in.end(), 0.0);
  for (float value : out) EXPECT_EQ(value, out[0]);
  // Ten additions a value (5 in its warp, 5 across warps), each within half a unit in the last
  // place.
  EXPECT_NEAR(out[0], sum, 10 * 0x1p-24 * 1024 * 1e3);
}

__global__ void two_reductions_kernel(int* out) {  // [2 * threads]
  __shared__ int shared[kMaxWarps];
  const int thread = threadIdx.x;
  out[thread] = block_reduce(thread, 0, Plus{}, shared);
  out[blockDim.x + thread] = block_reduce(1, 0, Plus{}, shared);
}

TEST(Warp, SharedMemoryCanBeUsedAgainAtOnce) {
  for (int threads : kBlockSizes) {
    simt::Buffer<int> out(2 * threads);
    simt::launch(1, threads, two_reductions_kernel, out.data());
    for (int thread = 0; thread < threads; ++thread) {
      EXPECT_EQ(out[thread], threads * (threads - 1) / 2);
      EXPECT_EQ(out[threads + thread], threads);
    }
  }
}

__global__ void warp_merge_kernel(const float* x, OnlineSoftmax<float>* out) {  // [threads]
  const RowScale<float> scale(0.5f);
  LogitSums<float> sums;
  const float one[1] = {x[threadIdx.x]};
  sums.add(one, scale);
  out[threadIdx.x] = warp_merge(sums.state(scale), scale.inverse_temperature);
}

TEST(Warp, MergesPartialRowsOfItsLanes) {
  auto x = testing::normal_values<float>(kWarpSize, 5.0, 3);
  x[5] = -std::numeric_limits<float>::infinity();
  simt::Buffer<float> in(x);
  simt::Buffer<OnlineSoftmax<float>> out(kWarpSize);
  simt::launch(1, kWarpSize, warp_merge_kernel, in.data(), out.data());
  const auto log_p = testing::log_softmax({x.begin(), x.end()}, 0.5);
  for (const auto& state : out) {
    EXPECT_NEAR(entropy(state), testing::entropy_of(log_p), testing::kValueTolerance<float>);
    EXPECT_EQ(state.sum, out[0].sum);
  }
}

__global__ void scan_kernel(const int* in, int* before, int* total) {  // [threads] each
  __shared__ int shared[kMaxWarps];
  const int thread = threadIdx.x;
  int first_total;
  const int first = block_exclusive_scan(in[thread], &first_total, shared);
  // A second scan at once, into the same shared memory.
  const int second = block_exclusive_scan(1, &total[thread], shared);
  before[thread] = second == thread ? first : -1;
  total[thread] = first_total;
}

TEST(Warp, ExclusiveScanCountsTheThreadsBefore) {
  for (int threads : kBlockSizes) {
    simt::Buffer<int> in(threads), before(threads), total(threads);
    for (int i = 0; i < threads; ++i) in[i] = i * 7 % 5 - 1;
    simt::launch(1, threads, scan_kernel, in.data(), before.data(), total.data());
    int sum = 0;
    for (int thread = 0; thread < threads; ++thread) {
      EXPECT_EQ(before[thread], sum);
      sum += in[thread];
    }
    for (int value : total) EXPECT_EQ(value, sum);
  }
}

}  // namespace
}  // namespace entropy_rl
