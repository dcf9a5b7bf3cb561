// logprob_entropy: log p_y = d_y - log sum, H = log sum - dot / sum of each row (online_softmax.h);
// without targets only H, which is token_entropy. A row is cut into parts by vocabulary, dtype
// and block size alone, so it gives the same bits in every batch and at every alignment.
//   forward   a block a row, or a block a part and a warp a row that merges them. Reads V sizeof(T)
//             bytes a row, writes 3 or 4 values. An element takes a conversion, a maximum, a
//             subtraction, a product, ex2, a clamp, an addition and an fma: 8 issue slots and 8
//             cycles of the ex2 unit, of the 19 that bf16 leaves at 3 TB/s (H100).
//   backward  a block a part of a row. Reads the row once and writes it once; a row without a
//             gradient is only filled with zeros.
// Accumulation is float (double for double).
#pragma once

#include <type_traits>

#include "row_layout.h"
#include "softmax_rows.cuh"

namespace entropy_rl {

// The arguments of one launch; a pointer is null if its argument is absent.
template <class T>
struct SoftmaxRows {
  using Acc = accumulate_t<T>;
  const T* logits;  // rows of [vocab] at layout.offset(row)
  RowLayout layout;
  int64_t rows;
  int vocab;
  const bool* mask;            // [rows]
  Acc temperature;             // used where row_temperature is null
  const Acc* row_temperature;  // [rows]
  const int64_t* targets;      // [rows]

  __device__ __forceinline__ const T* row(int64_t row) const { return logits + layout.offset(row); }
  __device__ __forceinline__ bool is_masked(int64_t row) const { return mask && !mask[row]; }
  // The host cannot look at device values, so one that is not taken becomes NaN for its row.
  __device__ __forceinline__ Acc temperature_of(int64_t row) const {
    if (!row_temperature) return temperature;
    const Acc value = row_temperature[row];
    return is_temperature(value) ? value : static_cast<Acc>(NAN);
  }
  __device__ __forceinline__ bool target_is_valid(int64_t row) const {
    return targets[row] >= 0 && targets[row] < vocab;
  }
};

// ---- Forward ----

template <class T>
ENTROPY_RL_HD inline int row_packs(int vocab) {
  return (vocab - 1) / Pack<T>::kCount + 1;
}
// In a round every thread of the block takes kPacksInFlight packs.
template <class T>
ENTROPY_RL_HD inline int round_packs(int threads) {
  return kPacksInFlight<T> * threads;
}

// The parts of a row. All but the last have the same number of rounds.
struct RowParts {
  int packs;  // of a part
  int count;

  // The packs of a part, of a row of `row_packs`.
  __device__ __forceinline__ int begin(int part) const { return part * packs; }
  __device__ __forceinline__ int end(int part, int row_packs) const {
    return row_packs - begin(part) < packs ? row_packs : begin(part) + packs;
  }
};
// A part ends with a merge of each warp's threads, which takes as many instructions as 15 elements
// of a thread, half of a round of bfloat16, so parts are long. 16 rows of 151,936 bfloat16 logits
// are 80 parts, each with 32 KiB of loads in flight: as much as a GPU's memory needs to be busy.
constexpr int kMinPartRounds = 2;
constexpr int kMaxRowParts = 8;
static_assert(kMaxRowParts <= kWarpSize, "a warp merges the parts of a row");

template <class T>
ENTROPY_RL_HD inline RowParts row_parts(int vocab, int threads) {
  const int rounds = (row_packs<T>(vocab) - 1) / round_packs<T>(threads) + 1;
  const int needed = (rounds - 1) / kMaxRowParts + 1;
  const int part_rounds = needed > kMinPartRounds ? needed : kMinPartRounds;
  return {part_rounds * round_packs<T>(threads), (rounds - 1) / part_rounds + 1};
}

// The state of packs [begin, end) of a row over this warp's threads.
template <class T, class Acc>
__device__ __forceinline__ OnlineSoftmax<Acc> warp_state(const PackReader<T>& reader, int begin,
                                                         int end, const RowScale<Acc>& scale) {
  constexpr int kCount = Pack<T>::kCount;
  LogitSums<Acc> sums;
  for_each_pair(reader, begin, end, [&](const Pack<T>& a, const Pack<T>& b, int, int) {
    Acc x[2 * kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      x[j] = load_value(a.values[j]);
      x[kCount + j] = load_value(b.values[j]);
    }
    sums.add(x, scale);
  });
  return warp_merge(sums.state(scale), scale.inverse_temperature);
}

// The outputs of the forward; log_prob is null without targets.
template <class Acc>
struct SoftmaxOutputs {
  Acc* log_prob;     // [rows]
  Acc* entropy;      // [rows]
  Acc* max_log_sum;  // [rows, 2]
};

// Called by one thread of a row.
template <class T, class Acc>
__device__ __forceinline__ void write_row(const SoftmaxRows<T>& in, int64_t row,
                                          const OnlineSoftmax<Acc>& state,
                                          const SoftmaxOutputs<Acc>& out) {
  const Acc log_total = log_sum(state);
  out.entropy[row] = entropy(state);
  out.max_log_sum[2 * row] = state.max;
  out.max_log_sum[2 * row + 1] = log_total;
  if (!in.targets) return;
  if (in.target_is_valid(row)) {
    const Acc logit = load_value(in.row(row)[in.targets[row]]);
    out.log_prob[row] = (logit - state.shift()) / in.temperature_of(row) - log_total;
  } else {
    out.log_prob[row] = static_cast<Acc>(NAN);
  }
}

template <class Acc>
__device__ __forceinline__ void write_masked_row(int64_t row, const SoftmaxOutputs<Acc>& out) {
  out.entropy[row] = out.max_log_sum[2 * row] = out.max_log_sum[2 * row + 1] = 0;
  if (out.log_prob) out.log_prob[row] = 0;
}

// A block a row at a time.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<T>)
    logprob_entropy_kernel(SoftmaxRows<T> in, SoftmaxOutputs<accumulate_t<T>> out) {
  using Acc = accumulate_t<T>;
  __shared__ OnlineSoftmax<Acc> states[kMaxRowParts][kMaxRowWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const RowParts parts = row_parts<T>(in.vocab, static_cast<int>(blockDim.x));
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    if (in.is_masked(row)) {
      if (threadIdx.x == 0) write_masked_row(row, out);
      continue;
    }
    const RowScale<Acc> scale(in.temperature_of(row));
    const PackReader<T> reader(in.row(row), in.vocab);
    for (int part = 0; part < parts.count; ++part) {
      const OnlineSoftmax<Acc> state =
          warp_state(reader, parts.begin(part), parts.end(part, reader.packs()), scale);
      if (lane == 0) states[part][warp] = state;
    }
    __syncthreads();
    for (int part = warp; part < parts.count; part += warps) {
      const OnlineSoftmax<Acc> state = merge_warps(states[part], scale.inverse_temperature);
      if (lane == 0) states[part][0] = state;
    }
    __syncthreads();
    if (warp == 0) {
      const OnlineSoftmax<Acc> state =
          warp_merge(lane < parts.count ? states[lane][0] : OnlineSoftmax<Acc>::neutral(),
                     scale.inverse_temperature);
      if (lane == 0) write_row(in, row, state, out);
    }
    // The next row's states may not overwrite what the first warp still reads.
    __syncthreads();
  }
}

// Where rows are few, a block a part; softmax_merge_kernel follows.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<T>)
    softmax_parts_kernel(SoftmaxRows<T> in,
                         OnlineSoftmax<accumulate_t<T>>* part_states /*[rows, parts]*/) {
  using Acc = accumulate_t<T>;
  __shared__ OnlineSoftmax<Acc> states[kMaxRowWarps];
  const RowParts parts = row_parts<T>(in.vocab, static_cast<int>(blockDim.x));
  const int64_t row = blockIdx.x / parts.count;
  const int part = static_cast<int>(blockIdx.x % parts.count);
  if (in.is_masked(row)) return;
  const RowScale<Acc> scale(in.temperature_of(row));
  const PackReader<T> reader(in.row(row), in.vocab);
  const OnlineSoftmax<Acc> state =
      warp_state(reader, parts.begin(part), parts.end(part, reader.packs()), scale);
  if (threadIdx.x % kWarpSize == 0) states[threadIdx.x / kWarpSize] = state;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  const OnlineSoftmax<Acc> merged = merge_warps(states, scale.inverse_temperature);
  if (threadIdx.x == 0) part_states[blockIdx.x] = merged;
}

// A block of one warp a row.
template <class T>
__global__ void softmax_merge_kernel(
    SoftmaxRows<T> in, const OnlineSoftmax<accumulate_t<T>>* part_states /*[rows, parts]*/,
    int parts, SoftmaxOutputs<accumulate_t<T>> out) {
  using Acc = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  if (in.is_masked(row)) {
    if (lane == 0) write_masked_row(row, out);
    return;
  }
  const OnlineSoftmax<Acc> state =
      warp_merge(lane < parts ? part_states[row * parts + lane] : OnlineSoftmax<Acc>::neutral(),
                 Acc(1) / in.temperature_of(row));
  if (lane == 0) write_row(in, row, state, out);
}

// ---- Backward ----

// One part of a row that is written: packs [begin, end), for the first part also the elements
// before the first 16-byte boundary, for the last part also the elements after the last pack.
template <class T>
struct OutputPart {
  static constexpr int kCount = Pack<T>::kCount;
  int head;
  int begin;
  int end;
  int tail;  // position of the first element after the packs
  bool is_first;
  bool is_last;

  __device__ __forceinline__ OutputPart(const T* row, int vocab, int part, int parts) {
    head = elements_before_boundary(row, vocab);
    const int packs = (vocab - head) / kCount;
    begin = static_cast<int>(static_cast<int64_t>(packs) * part / parts);
    end = static_cast<int>(static_cast<int64_t>(packs) * (part + 1) / parts);
    tail = head + packs * kCount;
    is_first = part == 0;
    is_last = part == parts - 1;
  }
  // Calls f(position) for this thread's elements outside the packs.
  template <class F>
  __device__ __forceinline__ void for_each_single(int vocab, F f) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (is_first && thread < head) f(thread);
    if (is_last && tail + thread < vocab && thread < kCount) f(tail + thread);
  }
};

template <class T>
__device__ __forceinline__ void fill_zero(T* row /*[vocab]*/, int vocab,
                                          const OutputPart<T>& part) {
  part.for_each_single(vocab, [&](int j) { row[j] = T{}; });
  for (int pack = part.begin + static_cast<int>(threadIdx.x); pack < part.end;
       pack += static_cast<int>(blockDim.x)) {
    const Pack<T> zeros{};
    zeros.store_streaming(row + part.head + static_cast<int64_t>(pack) * Pack<T>::kCount);
  }
}

template <bool aligned, class T, class Acc>
__device__ __forceinline__ void write_gradient_packs(const PackReader<T>& reader,
                                                     const RowGradient<Acc>& gradient, int target,
                                                     const OutputPart<T>& part,
                                                     T* grad_row /*[vocab]*/) {
  constexpr int kCount = Pack<T>::kCount;
  constexpr int kAhead = aligned ? kPacksInFlight<T> : 2;
  const int threads = static_cast<int>(blockDim.x);
  const auto write = [&](int pack, const Pack<T>& x) {
    Acc values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = gradient(load_value(x.values[j]));
    const int64_t begin = part.head + static_cast<int64_t>(pack) * kCount;
    const int64_t in_pack = target - begin;
    if (in_pack >= 0 && in_pack < kCount) {
      // It is added before rounding to T; added after it, p - 1 would be rounded twice.
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j] += j == in_pack ? gradient.pull : Acc(0);
    }
    rounded_pack<T>(values).store_streaming(grad_row + begin);
  };
  const int full = part.end < reader.full_packs() ? part.end : reader.full_packs();
  int pack = part.begin + static_cast<int>(threadIdx.x);
  for (; pack < full - (kAhead - 1) * threads; pack += kAhead * threads) {
    Pack<T> loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      loaded[i] = reader.template load<aligned>(pack + i * threads);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) write(pack + i * threads, loaded[i]);
  }
  for (; pack < part.end; pack += threads) {
    write(pack, reader.template load_any<aligned>(pack, 0.0f));
  }
}

// A block a part of a row at a time; null gradients count as zero. Packs are those of the written
// row, so that every store is 16 bytes wide; logits at another alignment are shifted.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<T>)
    logprob_entropy_backward_kernel(SoftmaxRows<T> in, int parts,
                                    const accumulate_t<T>* grad_log_prob /*[rows]*/,
                                    const accumulate_t<T>* grad_entropy /*[rows]*/,
                                    const accumulate_t<T>* entropy /*[rows]*/,
                                    const accumulate_t<T>* max_log_sum /*[rows, 2]*/,
                                    T* grad_logits /*[rows, vocab]*/) {
  using Acc = accumulate_t<T>;
  for (int64_t index = blockIdx.x; index < in.rows * parts; index += gridDim.x) {
    const int64_t row = index / parts;
    Acc g_log_prob = grad_log_prob ? grad_log_prob[row] : Acc(0);
    const Acc g_entropy = grad_entropy ? grad_entropy[row] : Acc(0);
    T* grad_row = grad_logits + row * in.vocab;
    const OutputPart<T> part(grad_row, in.vocab, static_cast<int>(index % parts), parts);
    if (in.is_masked(row) || (g_log_prob == Acc(0) && g_entropy == Acc(0))) {
      fill_zero(grad_row, in.vocab, part);
      continue;
    }
    int target = -1;
    if (in.targets && g_log_prob != Acc(0)) {
      if (in.target_is_valid(row)) {
        target = static_cast<int>(in.targets[row]);
      } else {
        g_log_prob = static_cast<Acc>(NAN);
      }
    }
    const RowGradient<Acc> gradient(
        SoftmaxGradient<Acc>{shift_of(max_log_sum[2 * row]), max_log_sum[2 * row + 1], entropy[row],
                             Acc(1) / in.temperature_of(row), g_log_prob, g_entropy});
    const T* x = in.row(row);
    part.for_each_single(in.vocab, [&](int j) {
      store_value(gradient(load_value(x[j])) + (j == target ? gradient.pull : Acc(0)),
                  grad_row + j);
    });
    const PackReader<T> reader(x + part.head, in.vocab - part.head);
    if (reader.misaligned == 0) {
      write_gradient_packs<true>(reader, gradient, target, part, grad_row);
    } else {
      write_gradient_packs<false>(reader, gradient, target, part, grad_row);
    }
  }
}

}  // namespace entropy_rl
