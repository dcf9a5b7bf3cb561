// How the kernels over rows of logits (logprob_entropy.cuh, linear_logprob_entropy.cuh) go through
// a row and combine what the threads of a block found. A thread loads four packs before it uses the
// first: 64 bytes, 64 KB an SM at 1024 threads, where 3.35 TB/s at a latency of 0.7 us need 18 KB.
// It rescales its sums (LogitSums) once per two packs.
#pragma once

#include "online_softmax.h"
#include "packs.cuh"
#include "warp.cuh"

namespace entropy_rl {

constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowWarps = kMaxRowThreads / kWarpSize;
// Blocks that share an SM: 64 registers a thread. A double takes two registers, and would spill.
template <class T>
inline constexpr int kRowBlocks = sizeof(T) == sizeof(double) ? 1 : 2;
// Packs that a thread loads before it uses the first.
template <class T>
inline constexpr int kPacksInFlight = sizeof(T) == sizeof(double) ? 2 : 4;

// Calls f(pack, next, index of pack, index of next) for this thread's share of the packs [begin,
// end) of a row, two at a time. Elements after the row's last are -inf; a next pack that does not
// exist has the index packs().
template <bool aligned, class T, class F>
__device__ __forceinline__ void for_each_pair(const PackReader<T>& reader, int begin, int end,
                                              F f) {
  constexpr int kAhead = kPacksInFlight<T>;
  const int threads = static_cast<int>(blockDim.x);
  const int full = end < reader.full_packs() ? end : reader.full_packs();
  int pack = begin + static_cast<int>(threadIdx.x);
  for (; pack < full - (kAhead - 1) * threads; pack += kAhead * threads) {
    Pack<T> loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      loaded[i] = reader.template load<aligned>(pack + i * threads);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i += 2) {
      f(loaded[i], loaded[i + 1], pack + i * threads, pack + (i + 1) * threads);
    }
  }
  for (; pack < end; pack += 2 * threads) {
    const Pack<T> first = reader.template load_any<aligned>(pack, -INFINITY);
    const bool has_next = end - pack > threads;
    const Pack<T> next = has_next ? reader.template load_any<aligned>(pack + threads, -INFINITY)
                                  : Pack<T>::filled(-INFINITY);
    f(first, next, pack, has_next ? pack + threads : reader.packs());
  }
}
template <class T, class F>
__device__ __forceinline__ void for_each_pair(const PackReader<T>& reader, int begin, int end,
                                              F f) {
  if (reader.misaligned == 0) {
    for_each_pair<true>(reader, begin, end, f);
  } else {
    for_each_pair<false>(reader, begin, end, f);
  }
}

// The states of a block's warps as one. All lanes of a warp call it; all return it. State is an
// OnlineSoftmax, or another that has neutral() and warp_merge.
template <class State, class Acc>
__device__ __forceinline__ State merge_warps(const State* warp_states /*[warps]*/,
                                             Acc inverse_temperature) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  return warp_merge(lane < warps ? warp_states[lane] : State::neutral(), inverse_temperature);
}

}  // namespace entropy_rl
