// Proves the shim: right kernels give right results, and each kind of wrong kernel is caught, by
// both of its builds: the one under ASan and UBSan, and the one that searches for data races.
#include <gtest/gtest.h>

#include <numeric>

namespace {

constexpr int kThreads = 128;
constexpr unsigned kFullMask = 0xffffffffu;

// The error of `launch` about a kernel; empty if there is none.
template <class Launch>
std::string complaint(Launch launch) {
  try {
    launch();
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_COMPLAINT(launch, part)                                                \
  do {                                                                                \
    const std::string said = complaint([&] { launch; });                              \
    EXPECT_NE(said.find(part), std::string::npos) << "launch said: '" << said << "'"; \
  } while (false)

#if defined(SIMT_RACECHECK)
constexpr const char* kUnordered = "race on byte";
#else
constexpr const char* kUnordered = "depends on the order of threads";
#endif

// ---- Right kernels ----

__global__ void global_index_kernel(int* out) {  // [grid.z * grid.y * grid.x * threads]
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * threads + thread;
}

TEST(Simt, EveryThreadOfEveryBlockRunsOnce) {
  simt::Buffer<int> out(2 * 3 * 4 * 5 * 3 * 2);
  simt::launch(dim3(4, 3, 2), dim3(5, 3, 2), global_index_kernel, out.data());
  for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], int(i));
}

__global__ void block_sum_kernel(const int* in, int* out) {  // [blocks * kThreads] -> [blocks]
  __shared__ int partial[kThreads];
  partial[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  for (int stride = kThreads / 2; stride > 0; stride /= 2) {
    if (int(threadIdx.x) < stride) partial[threadIdx.x] += partial[threadIdx.x + stride];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

TEST(Simt, BlockReductionThroughSharedMemory) {
  std::vector<int> values(3 * kThreads);
  std::iota(values.begin(), values.end(), 1);
  simt::Buffer<int> in(values), out(3);
  simt::launch(3, kThreads, block_sum_kernel, in.data(), out.data());
  for (int block = 0; block < 3; ++block) {
    EXPECT_EQ(out[block], std::accumulate(values.begin() + block * kThreads,
                                          values.begin() + (block + 1) * kThreads, 0));
  }
}

template <class T>
__global__ void warp_scan_kernel(const T* in, T* out) {  // [32], inclusive
  const int lane = threadIdx.x;
  T sum = in[lane];
  for (int delta = 1; delta < warpSize; delta *= 2) {
    const T left = __shfl_up_sync(kFullMask, sum, delta);
    if (lane >= delta) sum += left;
  }
  out[lane] = sum;
}

template <class T>
class SimtShuffle : public testing::Test {};
using ShuffleTypes = testing::Types<int, unsigned, unsigned long long, float, double>;
TYPED_TEST_SUITE(SimtShuffle, ShuffleTypes);

TYPED_TEST(SimtShuffle, WarpScan) {
  std::vector<TypeParam> values(32);
  std::iota(values.begin(), values.end(), TypeParam(1));
  simt::Buffer<TypeParam> in(values), out(32);
  simt::launch(1, 32, warp_scan_kernel<TypeParam>, in.data(), out.data());
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(out[lane], TypeParam((lane + 1) * (lane + 2) / 2));
  }
}

__global__ void shuffles_kernel(int* out, int width) {  // [4, 32]
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(kFullMask, lane, 3, width);
  out[32 + lane] = __shfl_up_sync(kFullMask, lane, 2, width);
  out[64 + lane] = __shfl_down_sync(kFullMask, lane, 2, width);
  out[96 + lane] = __shfl_xor_sync(kFullMask, lane, 1, width);
}

TEST(Simt, ShufflesStayInTheirSegment) {
  for (int width : {4, 8, 16, 32}) {
    simt::Buffer<int> out(4 * 32);
    simt::launch(1, 32, shuffles_kernel, out.data(), width);
    for (int lane = 0; lane < 32; ++lane) {
      const int in_segment = lane % width;
      EXPECT_EQ(out[lane], lane - in_segment + 3);
      EXPECT_EQ(out[32 + lane], in_segment >= 2 ? lane - 2 : lane);
      EXPECT_EQ(out[64 + lane], in_segment + 2 < width ? lane + 2 : lane);
      EXPECT_EQ(out[96 + lane], lane ^ 1);
    }
  }
}

__global__ void votes_kernel(unsigned* out) {  // [3, 64]
  const int thread = threadIdx.x;
  const bool odd = thread % 2 == 1;
  out[thread] = __ballot_sync(kFullMask, odd);
  out[64 + thread] = __any_sync(kFullMask, thread == 40);
  // The two halves of a warp vote separately.
  const unsigned half = thread % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[128 + thread] = __all_sync(half, thread != 63);
}

TEST(Simt, Votes) {
  simt::Buffer<unsigned> out(3 * 64);
  simt::launch(1, 64, votes_kernel, out.data());
  for (int thread = 0; thread < 64; ++thread) {
    EXPECT_EQ(out[thread], 0xaaaaaaaau);
    EXPECT_EQ(out[64 + thread], unsigned(thread >= 32));
    EXPECT_EQ(out[128 + thread], unsigned(thread < 48));
  }
}

__global__ void atomics_kernel(unsigned* out) {  // [4]
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&out[0], i);
  atomicMax(&out[1], i);
  atomicMin(&out[2], i);
  atomicOr(&out[3], 1u << i % 32);
}

TEST(Simt, AtomicsCountOncePerThread) {
  simt::Buffer<unsigned> out(std::vector<unsigned>{0, 0, 1000, 0});
  simt::launch(2, 64, atomics_kernel, out.data());
  EXPECT_EQ(out[0], 127u * 128 / 2);
  EXPECT_EQ(out[1], 127u);
  EXPECT_EQ(out[2], 0u);
  EXPECT_EQ(out[3], kFullMask);
}

TEST(Simt, BitIntrinsics) {
  EXPECT_EQ(__popc(0xf0u), 4);
  EXPECT_EQ(__clz(1), 31);
  EXPECT_EQ(__clz(0), 32);
  EXPECT_EQ(__ffs(8), 4);
  EXPECT_EQ(__ffs(0), 0);
  EXPECT_EQ(__brev(1u), 0x80000000u);
  EXPECT_EQ(__uint_as_float(__float_as_uint(1.5f)), 1.5f);
}

std::vector<int>& threads_as_they_ran() {
  static std::vector<int> threads;
  return threads;
}

__global__ void record_order_kernel() {
  threads_as_they_ran().push_back(blockIdx.x * blockDim.x + threadIdx.x);
}

TEST(Simt, RunsForwardReverseAndTwiceShuffled) {
  threads_as_they_ran().clear();
  simt::launch(2, 32, record_order_kernel);
  ASSERT_EQ(threads_as_they_ran().size(), 4u * 64);
  std::vector<int> runs[4];
  for (int run = 0; run < 4; ++run) {
    const auto begin = threads_as_they_ran().begin() + 64 * run;
    runs[run].assign(begin, begin + 64);
  }
  EXPECT_TRUE(std::is_sorted(runs[0].begin(), runs[0].end()));
  EXPECT_TRUE(std::is_sorted(runs[1].rbegin(), runs[1].rend()));
  EXPECT_NE(runs[2], runs[0]);
  EXPECT_NE(runs[3], runs[2]);
  for (auto& run : runs) {
    std::sort(run.begin(), run.end());
    EXPECT_EQ(run, runs[0]);  // every thread once, in every run
  }
}

// ---- Wrong kernels ----

__global__ void missing_barrier_kernel(const int* in, int* out) {  // [kThreads]
  __shared__ int staged[kThreads];
  staged[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = staged[(threadIdx.x + 1) % kThreads];
}

TEST(Simt, CatchesReadBeforeAnotherThreadsWrite) {
  simt::Buffer<int> in(kThreads), out(kThreads);
  EXPECT_COMPLAINT(simt::launch(1, kThreads, missing_barrier_kernel, in.data(), out.data()),
                   kUnordered);
}

__global__ void missing_second_barrier_kernel(int* out) {  // [2, kThreads]
  __shared__ int staged[kThreads];
  for (int round = 0; round < 2; ++round) {
    staged[threadIdx.x] = round * kThreads + threadIdx.x;
    __syncthreads();
    out[round * kThreads + threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
    // The next round overwrites values that slower threads have not read yet.
  }
}

TEST(Simt, CatchesWriteBeforeAnotherThreadsRead) {
  simt::Buffer<int> out(2 * kThreads);
  EXPECT_COMPLAINT(simt::launch(1, kThreads, missing_second_barrier_kernel, out.data()),
                   kUnordered);
}

__global__ void missing_warp_barrier_kernel(int* out) {  // [32]
  __shared__ int staged[32];
  const int lane = threadIdx.x;
  staged[lane] = lane;
  out[lane] = staged[lane ^ 1];
}

TEST(Simt, CatchesRelianceOnLockstep) {
  simt::Buffer<int> out(32);
  EXPECT_COMPLAINT(simt::launch(1, 32, missing_warp_barrier_kernel, out.data()), kUnordered);
}

__global__ void uninitialised_shared_kernel(int* zeros) {  // [blocks]
  __shared__ int count;
  if (threadIdx.x == 0) zeros[blockIdx.x] = count == 0;
  __syncthreads();
  if (threadIdx.x == 0) count = 0;
}

TEST(Simt, SharedMemoryIsGarbageAtTheStartOfABlock) {
  simt::Buffer<int> zeros(2);
  simt::launch(2, 32, uninitialised_shared_kernel, zeros.data());
  EXPECT_EQ(zeros[0], 0);
  EXPECT_EQ(zeros[1], 0);
}

__global__ void barrier_in_branch_kernel() {
  if (threadIdx.x < 96) __syncthreads();
}

TEST(Simt, CatchesBarrierThatSomeThreadsNeverReach) {
  EXPECT_COMPLAINT(simt::launch(1, kThreads, barrier_in_branch_kernel),
                   "threads 96-127 have returned; threads 0-95 wait for __syncthreads");
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST(Simt, CatchesBarriersInBothBranches) {
  EXPECT_COMPLAINT(simt::launch(1, 4, two_barriers_kernel), "threads 0,2 wait for __syncthreads");
}

__global__ void shuffle_in_branch_kernel(int* out) {  // [32]
  if (threadIdx.x < 31) out[threadIdx.x] = __shfl_down_sync(kFullMask, int(threadIdx.x), 1);
}

TEST(Simt, CatchesShuffleThatALaneOfTheMaskNeverReaches) {
  simt::Buffer<int> out(32);
  EXPECT_COMPLAINT(simt::launch(1, 32, shuffle_in_branch_kernel, out.data()),
                   "threads 31 have returned; threads 0-30 wait for __shfl_down_sync");
  // In a block whose size is not a multiple of 32 these lanes do not exist.
  EXPECT_COMPLAINT(simt::launch(1, 16, shuffle_in_branch_kernel, out.data()), "threads 0-15 wait");
}

__global__ void shuffle_from_inactive_lane_kernel(int* out) {  // [32]
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, int(threadIdx.x), 16);
}

TEST(Simt, CatchesShuffleFromALaneOutsideTheMask) {
  simt::Buffer<int> out(32);
  EXPECT_COMPLAINT(simt::launch(1, 32, shuffle_from_inactive_lane_kernel, out.data()),
                   "thread (0,0,0) reads lane 16, which is not in the mask");
}

__global__ void outside_own_mask_kernel() { __syncwarp(0x0000ffffu); }

TEST(Simt, CatchesLaneOutsideItsOwnMask) {
  EXPECT_COMPLAINT(simt::launch(1, 32, outside_own_mask_kernel),
                   "thread (16,0,0) is not in its own mask");
}

__global__ void blocks_that_share_kernel(int* out) {  // [blocks + 1]
  if (threadIdx.x == 0) out[blockIdx.x + 1] = out[blockIdx.x] + 1;
}

TEST(Simt, CatchesBlocksThatRelyOnEarlierBlocks) {
  simt::Buffer<int> out(std::vector<int>(5, 0));
  EXPECT_COMPLAINT(simt::launch(4, 32, blocks_that_share_kernel, out.data()), kUnordered);
}

TEST(Simt, RefusesMemoryItCannotWatch) {
  int outside[32];
  EXPECT_COMPLAINT(simt::launch(1, 32, missing_warp_barrier_kernel, &outside[0]),
                   "does not point into a simt::Buffer");
}

TEST(Simt, RefusesShapesThatCudaRefuses) {
  EXPECT_COMPLAINT(simt::launch(0, 32, outside_own_mask_kernel), "CUDA refuses");
  EXPECT_COMPLAINT(simt::launch(dim3(1, 65536), 32, outside_own_mask_kernel), "CUDA refuses");
  EXPECT_COMPLAINT(simt::launch(1, 1025, outside_own_mask_kernel), "CUDA refuses");
}

// ---- Errors that only one of the builds finds ----

#if defined(SIMT_RACECHECK)
__global__ void lost_update_kernel(int* count) {  // [1]
  *count += 1;
}

TEST(Simt, RacecheckCatchesUpdateThatIsNotAtomic) {
  // Fibers are not interrupted inside the statement, so the result is right in every order.
  simt::Buffer<int> count(std::vector<int>{0});
  EXPECT_COMPLAINT(simt::launch(1, 32, lost_update_kernel, count.data()),
                   "race on byte 0 of buffer 0");
}

__global__ void update_beside_atomic_kernel(int* count) {  // [1]
  if (threadIdx.x == 0) {
    *count += 1;
  } else {
    atomicAdd(count, 1);
  }
}

TEST(Simt, RacecheckCatchesPlainUpdateBesideAtomicOnes) {
  simt::Buffer<int> count(std::vector<int>{0});
  EXPECT_COMPLAINT(simt::launch(1, 32, update_beside_atomic_kernel, count.data()),
                   "race on byte 0");
}

__global__ void exchange_in_warp_kernel(int* out, bool shuffle_instead) {  // [2 * 32]
  __shared__ int staged[2 * 32];
  const int thread = threadIdx.x;
  staged[thread] = thread;
  if (shuffle_instead) {
    __shfl_sync(kFullMask, thread, 0);
  } else {
    __syncwarp();
  }
  out[thread] = staged[thread ^ 1];
}

TEST(Simt, RacecheckTakesSyncwarpForABarrierAndAShuffleForNone) {
  simt::Buffer<int> out(2 * 32);
  EXPECT_EQ(complaint([&] { simt::launch(1, 64, exchange_in_warp_kernel, out.data(), false); }),
            "");
  for (int thread = 0; thread < 64; ++thread) EXPECT_EQ(out[thread], thread ^ 1);
  EXPECT_COMPLAINT(simt::launch(1, 64, exchange_in_warp_kernel, out.data(), true),
                   "of shared memory");
}

__global__ void exchange_between_warps_kernel(int* out) {  // [2 * 32]
  __shared__ int staged[2 * 32];
  staged[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = staged[threadIdx.x ^ 32];
}

TEST(Simt, RacecheckTakesSyncwarpForNoBarrierBetweenWarps) {
  simt::Buffer<int> out(2 * 32);
  EXPECT_COMPLAINT(simt::launch(1, 64, exchange_between_warps_kernel, out.data()),
                   "of shared memory");
}

__global__ void last_block_sums_kernel(int* partial, int* arrived, int* sum, bool fence) {
  if (threadIdx.x != 0) return;  // partial: [blocks]; arrived, sum: [1]
  partial[blockIdx.x] = blockIdx.x;
  if (fence) __threadfence();
  if (atomicAdd(arrived, 1) != int(gridDim.x) - 1) return;
  *sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) *sum += partial[block];
}

TEST(Simt, RacecheckWantsAFenceBeforeAHandOverBetweenBlocks) {
  simt::Buffer<int> partial(5), arrived(std::vector<int>{0}), sum(1);
  simt::launch(5, 32, last_block_sums_kernel, partial.data(), arrived.data(), sum.data(), true);
  EXPECT_EQ(sum[0], 10);
  arrived[0] = 0;
  EXPECT_COMPLAINT(simt::launch(5, 32, last_block_sums_kernel, partial.data(), arrived.data(),
                                sum.data(), false),
                   "of buffer 0");
}
#endif

#if defined(__SANITIZE_ADDRESS__)
__global__ void out_of_bounds_kernel(int* out, int size) {  // [size]
  if (int(threadIdx.x) <= size) out[threadIdx.x] = 0;
}

TEST(SimtDeathTest, AddressSanitizerSeesOutOfBounds) {
  simt::Buffer<int> out(20);
  EXPECT_DEATH(simt::launch(1, 32, out_of_bounds_kernel, out.data(), 20), "heap-buffer-overflow");
}

__global__ void vector_load_kernel(const float* in, float* out) {  // [>= 5], [1]
  out[0] = reinterpret_cast<const float4*>(in + 1)->w;
}

TEST(SimtDeathTest, UndefinedBehaviourSanitizerSeesMisalignedVectors) {
  simt::Buffer<float> in(8), out(1);
  EXPECT_DEATH(simt::launch(1, 1, vector_load_kernel, in.data(), out.data()), "misaligned address");
}
#endif

}  // namespace
