// linear_logprob_entropy: one tile [rows, width] of LM-head products at a time, one block a row.
//   forward   folds the tile into each row's state (VocabState): width sizeof(Acc) bytes read a
//             row, 96 of state read and written.
//   backward  turns the tile into its gradient, in place or in the narrower dtype of the next GEMM:
//             width sizeof(Acc) read, width sizeof(Out) written. A row without a gradient is only
//             filled with zeros.
// Accumulation is float (double for double) in a tile, double over tiles.
#pragma once

#include "linear_logprob_entropy_math.h"
#include "softmax_rows.cuh"

namespace entropy_rl {

// The arguments of one launch; a pointer is null if its argument is absent.
template <class Acc>
struct LogitTile {
  const Acc* products;  // rows of [width], `stride` apart
  int64_t stride;
  int64_t rows;
  int width;
  int64_t vocab_start;         // index in the vocabulary of the tile's first column
  const int64_t* targets;      // [rows] indices in the vocabulary
  Acc temperature;             // used where row_temperature is null
  const Acc* row_temperature;  // [rows]
  LogitTransform<Acc> transform;

  // The host cannot look at device values, so one that is not taken becomes NaN for its row.
  __device__ __forceinline__ Acc temperature_of(int64_t row) const {
    const Acc value = row_temperature ? row_temperature[row] : temperature;
    return is_temperature(value) ? value : static_cast<Acc>(NAN);
  }
  __device__ __forceinline__ int64_t target_column(int64_t row) const {
    return column_of_target(targets[row], vocab_start);
  }
};

// The parts of a warp's lanes as one; all lanes return it.
template <class Acc>
__device__ __forceinline__ VocabPart<Acc> warp_merge(const VocabPart<Acc>& part,
                                                     Acc inverse_temperature) {
  VocabPart<Acc> merged;
  merged.softmax = warp_merge(part.softmax, inverse_temperature);
  const Acc d = (part.softmax.max - merged.softmax.shift()) * inverse_temperature;
  merged.squares = warp_reduce(part.squares * exp_shifted(2 * d), Plus{});
  merged.before_target = warp_reduce(part.before_target, Larger{});
  return merged;
}

// A part of a tile's row. Only the statistics need squares and before_target, which take as many
// shuffles as the softmax.
template <class Acc, bool kStatistics>
using TilePart = std::conditional_t<kStatistics, VocabPart<Acc>, OnlineSoftmax<Acc>>;

// The sums of a tile's row over this thread's packs.
template <bool kStatistics, class Acc>
__device__ __forceinline__ TilePart<Acc, kStatistics> thread_part(const LogitTile<Acc>& tile,
                                                                  const PackReader<Acc>& reader,
                                                                  int64_t target,
                                                                  const RowScale<Acc>& scale) {
  constexpr int kCount = Pack<Acc>::kCount;
  LogitSums<Acc> sums;
  Acc before_target = -static_cast<Acc>(INFINITY);
  const bool is_identity = tile.transform.is_identity();
  const auto add = [&](const Pack<Acc>& a, const Pack<Acc>& b, int index_a, int index_b) {
    Acc z[2 * kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = a.values[i];
      z[kCount + i] = b.values[i];
    }
    const auto column = [&](int i) {
      return static_cast<int64_t>(i < kCount ? index_a : index_b) * kCount + i % kCount;
    };
    if (!is_identity) {
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        // Elements after the row's last stay -inf.
        if (column(i) < tile.width) z[i] = tile.transform(z[i], column(i));
      }
    }
    sums.template add<kStatistics>(z, scale);
    if constexpr (kStatistics) {
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        if (column(i) < target) before_target = larger(before_target, z[i]);
      }
    }
  };
  for_each_pair(reader, 0, reader.packs(), add);
  if constexpr (kStatistics) {
    return {sums.state(scale), sums.squares, before_target};
  } else {
    return sums.state(scale);
  }
}

// A block a row. With statistics a thread needs more registers than two blocks an SM leave it.
template <class Acc, bool kStatistics>
__global__ void __launch_bounds__(kMaxRowThreads, kStatistics ? 1 : kRowBlocks<Acc>)
    linear_logprob_entropy_tile_kernel(LogitTile<Acc> tile, VocabState* state /*[rows]*/) {
  using Part = TilePart<Acc, kStatistics>;
  __shared__ Part shared[kMaxRowWarps];
  const int64_t row = blockIdx.x;
  const Acc* products = tile.products + row * tile.stride;
  const int64_t target = tile.target_column(row);
  const RowScale<Acc> scale(tile.temperature_of(row));
  const PackReader<Acc> reader(products, tile.width);
  const Part part =
      warp_merge(thread_part<kStatistics>(tile, reader, target, scale), scale.inverse_temperature);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = part;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  const Part merged = merge_warps(shared, scale.inverse_temperature);
  if (threadIdx.x != 0) return;
  state[row].part =
      merge(state[row].part, widened(merged), static_cast<double>(scale.inverse_temperature));
  if (target >= 0 && target < tile.width) {
    state[row].target = tile.transform(products[target], target);
  }
}

// A block a row. `gradient` may be the tile itself: a thread reads an element before it writes it.
template <class Acc, class Out>
__global__ void __launch_bounds__(kMaxRowThreads) linear_logprob_entropy_tile_backward_kernel(
    LogitTile<Acc> tile, const Acc* grad_log_prob /*[rows]*/, const Acc* grad_entropy /*[rows]*/,
    const Acc* entropy /*[rows]*/, const Acc* max_log_sum /*[rows, 2]*/,
    Out* gradient /*[rows, width]*/, int64_t gradient_stride) {
  // 16 bytes of float. Doubles are taken one by one: four would spill.
  constexpr int kCount = 4;
  constexpr int kAhead = 4;  // packs that a thread loads before it uses the first
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int64_t row = blockIdx.x;
  const Acc* products = tile.products + row * tile.stride;
  Out* out = gradient + row * gradient_stride;
  const Acc g_log_prob = grad_log_prob ? grad_log_prob[row] : Acc(0);
  const Acc g_entropy = grad_entropy ? grad_entropy[row] : Acc(0);
  if (g_log_prob == Acc(0) && g_entropy == Acc(0)) {
    for (int j = thread; j < tile.width; j += threads) store_value(Acc(0), out + j);
    return;
  }
  const int64_t target = tile.target_column(row);
  const RowGradient<Acc> at(
      SoftmaxGradient<Acc>{shift_of(max_log_sum[2 * row]), max_log_sum[2 * row + 1], entropy[row],
                           Acc(1) / tile.temperature_of(row), g_log_prob, g_entropy});
  const bool is_identity = tile.transform.is_identity();
  const auto gradient_of = [&](Acc x, int column) {
    const Acc z = tile.transform(x, column);
    return tile.transform.slope(z) * (at(z) + (column == target ? at.pull : Acc(0)));
  };
  const auto write = [&](const Pack<Acc, kCount>& x, int column) {
    Acc values[kCount];
    if (is_identity) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j] = at(x.values[j]);
      const int64_t in_pack = target - column;
      if (in_pack >= 0 && in_pack < kCount) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) values[j] += j == in_pack ? at.pull : Acc(0);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j] = gradient_of(x.values[j], column + j);
    }
    rounded_pack<Out>(values).store(out + column);
  };
  int written = 0;
  if constexpr (std::is_same_v<Acc, float>) {
    const bool aligned =
        Pack<Acc, kCount>::is_aligned(products) && Pack<Out, kCount>::is_aligned(out);
    const int packs = aligned ? tile.width / kCount : 0;
    int pack = thread;
    for (; pack < packs - (kAhead - 1) * threads; pack += kAhead * threads) {
      Pack<Acc, kCount> loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        loaded[i] = Pack<Acc, kCount>::load_at_once(products + (pack + i * threads) * kCount);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) write(loaded[i], (pack + i * threads) * kCount);
    }
    for (; pack < packs; pack += threads) {
      write(Pack<Acc, kCount>::load_at_once(products + pack * kCount), pack * kCount);
    }
    written = packs * kCount;
  }
  for (int j = written + thread; j < tile.width; j += threads) {
    store_value(gradient_of(products[j], j), out + j);
  }
}

}  // namespace entropy_rl
