// linear_logprob_entropy: one tile [rows, width] of LM-head products at a time, one block a row.
//   forward   folds the tile into each row's state (linear_logprob_entropy_math.h): width *
//   sizeof(Acc)
//             bytes read a row, 96 of state read and written.
//   backward  turns the tile into its gradient, in place or into a narrower dtype for the next
//   GEMM:
//             width * sizeof(Acc) read, width * sizeof(Out) written; a row without a gradient is
//             only filled with zeros.
// Accumulation float (double for double) in a tile, double over tiles.
#pragma once

#include "dtypes.h"
#include "linear_logprob_entropy_math.h"
#include "quad.cuh"
#include "softmax_rows.cuh"
#include "warp.cuh"

namespace entropy_rl {

// The arguments of one launch; pointers that do not apply are null.
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

  __device__ __forceinline__ Acc inverse_temperature(int64_t row) const {
    const Acc value = row_temperature ? row_temperature[row] : temperature;
    // The host cannot look at device values, so one that is not above 0 becomes NaN for its row.
    return value > Acc(0) ? Acc(1) / value : static_cast<Acc>(NAN);
  }
  // Column of the row's target in this tile; below 0 or from `width` on, it is in another.
  __device__ __forceinline__ int64_t target_column(int64_t row) const {
    return targets[row] - vocab_start;
  }
};

template <class Acc>
__device__ __forceinline__ VocabPart<Acc> shuffle_xor(const VocabPart<Acc>& value, int lane_mask) {
  VocabPart<Acc> out;
  out.softmax = shuffle_xor(value.softmax, lane_mask);
  out.squares = shuffle_xor(value.squares, lane_mask);
  out.before_target = shuffle_xor(value.before_target, lane_mask);
  return out;
}

// Adds z[0 .. kCount) of the columns from `column` on. kStatistics: squares and before_target too.
template <bool kStatistics, int kCount, class Acc>
__device__ __forceinline__ void accumulate_columns(VocabPart<Acc>* part, const Acc (&z)[kCount],
                                                   int64_t column, int64_t target,
                                                   Acc inverse_temperature) {
  if (!kStatistics) {
    accumulate(&part->softmax, z, inverse_temperature);
    return;
  }
  Acc max = part->softmax.max;
  for (int i = 0; i < kCount; ++i) max = z[i] > max ? z[i] : max;
  *part = rescaled(*part, max, inverse_temperature);
  accumulate(&part->softmax, z, inverse_temperature);
  const Acc shift = part->softmax.shift();
  for (int i = 0; i < kCount; ++i) {
    part->squares += exp_shifted(2 * (z[i] - shift) * inverse_temperature);
    if (column + i < target && z[i] > part->before_target) part->before_target = z[i];
  }
}

// One block an SM at least: held to the 64 registers of two, the statistics would spill.
template <class Acc, bool kStatistics>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    linear_logprob_entropy_tile_kernel(LogitTile<Acc> tile, VocabState* state /*[rows]*/) {
  constexpr int kCount = Pack<Acc>::kCount;
  __shared__ VocabPart<Acc> shared[kMaxWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  for (int64_t row = blockIdx.x; row < tile.rows; row += gridDim.x) {
    const Acc* products = tile.products + row * tile.stride;
    const Acc inverse_temperature = tile.inverse_temperature(row);
    const int64_t target = tile.target_column(row);
    VocabPart<Acc> part = VocabPart<Acc>::neutral();
    const auto add_one = [&](int column) {
      const Acc z[1] = {tile.transform(products[column], column)};
      accumulate_columns<kStatistics>(&part, z, column, target, inverse_temperature);
    };

    const int head = elements_before_boundary(products, tile.width);
    const int packs = (tile.width - head) / kCount;
    if (thread < head) add_one(thread);
    int pack = thread;
    for (; pack + (kPacks - 1) * threads < packs; pack += kPacks * threads) {
      Pack<Acc> loaded[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        loaded[i] = Pack<Acc>::load(products + head + (pack + i * threads) * kCount);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int column = head + (pack + i * threads) * kCount;
        Acc z[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) z[j] = tile.transform(loaded[i].values[j], column + j);
        accumulate_columns<kStatistics>(&part, z, column, target, inverse_temperature);
      }
    }
    for (; pack < packs; pack += threads) {
      const int column = head + pack * kCount;
      const Pack<Acc> loaded = Pack<Acc>::load(products + column);
      Acc z[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) z[j] = tile.transform(loaded.values[j], column + j);
      accumulate_columns<kStatistics>(&part, z, column, target, inverse_temperature);
    }
    const int tail = head + packs * kCount + thread;
    if (tail < tile.width) add_one(tail);

    part = block_reduce(
        part, VocabPart<Acc>::neutral(),
        [=](const VocabPart<Acc>& a, const VocabPart<Acc>& b) {
          return merge(a, b, inverse_temperature);
        },
        shared);
    if (thread != 0) continue;
    state[row].part =
        merge(state[row].part, widened(part), static_cast<double>(inverse_temperature));
    if (target >= 0 && target < tile.width) {
      state[row].target = tile.transform(products[target], target);
    }
  }
}

// `gradient` may be the tile itself: a thread reads an element before it writes it.
template <class Acc, class Out>
__global__ void __launch_bounds__(kMaxRowThreads) linear_logprob_entropy_tile_backward_kernel(
    LogitTile<Acc> tile, const Acc* grad_log_prob /*[rows]*/, const Acc* grad_entropy /*[rows]*/,
    const Acc* entropy /*[rows]*/, const Acc* statistics /*[rows, 2]*/,
    Out* gradient /*[rows, width]*/, int64_t gradient_stride) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  for (int64_t row = blockIdx.x; row < tile.rows; row += gridDim.x) {
    const Acc* products = tile.products + row * tile.stride;
    Out* out = gradient + row * gradient_stride;
    const Acc g_log_prob = grad_log_prob ? grad_log_prob[row] : Acc(0);
    const Acc g_entropy = grad_entropy ? grad_entropy[row] : Acc(0);
    if (g_log_prob == Acc(0) && g_entropy == Acc(0)) {
      for (int j = thread; j < tile.width; j += threads) store_value(Acc(0), out + j);
      continue;
    }
    const int64_t target = tile.target_column(row);
    const RowGradient<Acc> at(
        SoftmaxGradient<Acc>{shift_of(statistics[2 * row]), statistics[2 * row + 1], entropy[row],
                             tile.inverse_temperature(row), g_log_prob, g_entropy});
    const auto gradient_of = [&](Acc x, int column) {
      const Acc z = tile.transform(x, column);
      return tile.transform.slope(z) * (at(z) + (column == target ? at.pull : Acc(0)));
    };
    // Of doubles, four at a time would spill.
    const bool by_quads = sizeof(Acc) == sizeof(float) && is_quad(products) && is_quad(out);
    const int quads = by_quads ? tile.width / kQuad : 0;
    for (int quad = thread; quad < quads; quad += threads) {
      const int column = quad * kQuad;
      Acc x[kQuad];
      Out written[kQuad];
      load_quad(products + column, x);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) store_value(gradient_of(x[j], column + j), &written[j]);
      store_quad(written, out + column);
    }
    for (int j = quads * kQuad + thread; j < tile.width; j += threads) {
      store_value(gradient_of(products[j], j), out + j);
    }
  }
}

}  // namespace entropy_rl
