// What the kernels of token_entropy and logprob_entropy share. A row is packs of 16 bytes, counted
// from its first element; a part of a row is a run of packs, of which thread t of a block takes
// every blockDim.x-th. Where its row is cut depends on vocabulary, dtype and block size alone: a
// row gives the same bits in every batch, at every alignment, and by one block or by a block a
// part.
//   forward   reads V * sizeof(T) bytes a row and writes three values. An element takes a
//             conversion, a maximum, a subtraction, a product, ex2, a clamp, an addition and an
//             fma: 8 issue slots and 8 cycles of the ex2 unit of the 19 that bf16 leaves at 3 TB/s
//             (H100).
//   backward  reads the row once and writes it once; a row with no gradient is only zero-filled.
// A thread loads four packs before it uses the first: 64 bytes, 64 KB an SM at 1024 threads, where
// 3.35 TB/s at 0.7 us want 18. It rescales once per two packs. Accumulation is float (double for
// double).
#pragma once

#include "dtypes.h"
#include "online_softmax.h"
#include "row_layout.h"
#include "warp.cuh"

namespace entropy_rl {

// The arguments of one launch; pointers that do not apply are null.
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
  // The host cannot look at device values, so one that is not above 0 becomes NaN for its row.
  __device__ __forceinline__ Acc temperature_of(int64_t row) const {
    if (!row_temperature) return temperature;
    const Acc value = row_temperature[row];
    return value > Acc(0) ? value : static_cast<Acc>(NAN);
  }
  __device__ __forceinline__ bool target_is_valid(int64_t row) const {
    return targets[row] >= 0 && targets[row] < vocab;
  }
};

// ---- Packs ----

constexpr int kPackBytes = 16;
constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowWarps = kMaxRowThreads / kWarpSize;
// Blocks that share an SM: 64 registers a thread. A double takes two; held to 64 it would spill.
template <class T>
inline constexpr int kRowBlocks = sizeof(T) == sizeof(double) ? 1 : 2;

template <class T>
struct Pack {
  static constexpr int kCount = kPackBytes / static_cast<int>(sizeof(T));
  T values[kCount];

  __device__ __forceinline__ static Pack of(const uint4& raw) {
    Pack pack;
    memcpy(&pack, &raw, kPackBytes);
    return pack;
  }
  // By an intrinsic: a plain load whose elements are used one by one comes out as loads of one.
  __device__ __forceinline__ static Pack load(const T* from) {
    return of(__ldcs(reinterpret_cast<const uint4*>(from)));
  }
  __device__ __forceinline__ static Pack filled(float value) {
    Pack pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) store_value(value, &pack.values[j]);
    return pack;
  }
};

// Packs that a thread loads before it uses the first. Two make a group, which rescales once.
constexpr int kGroupPacks = 2;
constexpr int kPacks = 2 * kGroupPacks;
template <class T>
inline constexpr int kPacksInFlight = sizeof(T) == sizeof(double) ? kGroupPacks : kPacks;

// Elements before the first 16-byte boundary of a row: rows of an odd vocabulary begin anywhere.
template <class T>
__device__ __forceinline__ int elements_before_boundary(const T* row, int vocab) {
  const int bytes = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kPackBytes);
  const int count = (kPackBytes - bytes) % kPackBytes / static_cast<int>(sizeof(T));
  return count < vocab ? count : vocab;
}

// The 16 bytes that begin `bytes` into `low` and `high`; `bytes` is a multiple of kElement.
template <int kElement>
__device__ __forceinline__ uint4 shifted_pack(const uint4& low, const uint4& high, int bytes) {
  // By halves: an index known only at run time would put the words in local memory.
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (bytes & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (kElement < 8 && (bytes & 4)) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  if (kElement < 4 && (bytes & 2)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Packs of elements from `first` on, which may lie at any alignment: then a pack is cut out of the
// two aligned ones that it overlaps. Bytes before `first` that share its aligned pack are read and
// dropped; no allocation begins within an aligned pack. Bytes after the last element are not read.
template <class T>
struct PackReader {
  static constexpr int kCount = Pack<T>::kCount;
  const T* first;
  int count;       // elements
  int misaligned;  // bytes from the aligned address below `first`

  __device__ __forceinline__ PackReader(const T* first, int count)
      : first(first),
        count(count),
        misaligned(static_cast<int>(reinterpret_cast<uintptr_t>(first) % kPackBytes)) {}

  // How many packs `load` may be asked for.
  __device__ __forceinline__ int whole_packs() const {
    if (misaligned == 0) return count / kCount;
    const int before = misaligned / static_cast<int>(sizeof(T));
    const int64_t packs = (static_cast<int64_t>(count) + before) / kCount - 1;
    return packs < 0 ? 0 : static_cast<int>(packs);
  }
  template <bool aligned>
  __device__ __forceinline__ Pack<T> load(int pack) const {
    const char* address =
        reinterpret_cast<const char*>(first) + static_cast<int64_t>(pack) * kPackBytes;
    if constexpr (aligned) {
      return Pack<T>::of(__ldcs(reinterpret_cast<const uint4*>(address)));
    } else {
      const uint4* below = reinterpret_cast<const uint4*>(address - misaligned);
      return Pack<T>::of(shifted_pack<sizeof(T)>(below[0], below[1], misaligned));
    }
  }
  // Any pack; `beyond` stands in for elements after the last.
  template <bool aligned>
  __device__ __forceinline__ Pack<T> load_end(int pack, float beyond) const {
    if (pack < whole_packs()) return load<aligned>(pack);
    Pack<T> values = Pack<T>::filled(beyond);
    const int64_t begin = static_cast<int64_t>(pack) * kCount;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (begin + j < count) values.values[j] = first[begin + j];
    }
    return values;
  }
};

// ---- Forward ----

template <class T, class Acc>
__device__ __forceinline__ void add_group(const Pack<T>& a, const Pack<T>& b,
                                          const RowScale<Acc>& scale, LogitSums<Acc>* sums) {
  constexpr int kCount = Pack<T>::kCount;
  Acc x[kGroupPacks * kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    x[j] = load_value(a.values[j]);
    x[kCount + j] = load_value(b.values[j]);
  }
  sums->add(x, scale);
}

// The parts of a row. Each but the last is a whole number of rounds, in which every thread of the
// block has kPacksInFlight packs.
struct RowParts {
  int packs;  // of a part
  int count;
};
constexpr int kMaxRowParts = kWarpSize;  // so that a warp merges them

template <class T>
ENTROPY_RL_HD inline RowParts row_parts(int vocab, int threads) {
  const int round = kPacksInFlight<T> * threads;
  const int packs = (vocab - 1) / Pack<T>::kCount + 1;
  const int rounds = (packs - 1) / round + 1;
  const int rounds_per_part = (rounds - 1) / kMaxRowParts + 1;
  return {rounds_per_part * round, (rounds - 1) / rounds_per_part + 1};
}

template <bool aligned, class T, class Acc>
__device__ __forceinline__ OnlineSoftmax<Acc> reduce_packs(const PackReader<T>& reader, int begin,
                                                           int end, const RowScale<Acc>& scale) {
  // Of packs out of place it takes two loads each, so half as many are in flight.
  constexpr int kAhead = aligned ? kPacksInFlight<T> : kGroupPacks;
  LogitSums<Acc> sums;
  const int threads = static_cast<int>(blockDim.x);
  const int whole = end < reader.whole_packs() ? end : reader.whole_packs();
  int pack = begin + static_cast<int>(threadIdx.x);
  for (; pack < whole - (kAhead - 1) * threads; pack += kAhead * threads) {
    Pack<T> loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      loaded[i] = reader.template load<aligned>(pack + i * threads);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i += kGroupPacks) {
      add_group(loaded[i], loaded[i + 1], scale, &sums);
    }
  }
  for (; pack < end; pack += kGroupPacks * threads) {
    const Pack<T> first = reader.template load_end<aligned>(pack, -INFINITY);
    const Pack<T> second = end - pack > threads
                               ? reader.template load_end<aligned>(pack + threads, -INFINITY)
                               : Pack<T>::filled(-INFINITY);
    add_group(first, second, scale, &sums);
  }
  return sums.state(scale);
}

// The state of packs [begin, end) of a row over this warp's threads.
template <class T, class Acc>
__device__ __forceinline__ OnlineSoftmax<Acc> warp_state(const PackReader<T>& reader, int begin,
                                                         int end, const RowScale<Acc>& scale) {
  return warp_merge(reader.misaligned == 0 ? reduce_packs<true>(reader, begin, end, scale)
                                           : reduce_packs<false>(reader, begin, end, scale),
                    scale.inverse_temperature);
}

// The warps' states of one part as one. All lanes of a warp call it.
template <class Acc>
__device__ __forceinline__ OnlineSoftmax<Acc> merge_warps(
    const OnlineSoftmax<Acc>* warp_states /*[warps]*/, Acc inverse_temperature) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  return warp_merge(lane < warps ? warp_states[lane] : OnlineSoftmax<Acc>::neutral(),
                    inverse_temperature);
}

// What the forward writes; null where it does not apply.
template <class Acc>
struct SoftmaxOutputs {
  Acc* log_prob;    // [rows]
  Acc* entropy;     // [rows]
  Acc* statistics;  // [rows, 2]
};

// By one thread.
template <class T, class Acc>
__device__ __forceinline__ void write_row(const SoftmaxRows<T>& in, int64_t row,
                                          const OnlineSoftmax<Acc>& state,
                                          const SoftmaxOutputs<Acc>& out) {
  const Acc log_total = log_sum(state);
  out.entropy[row] = entropy(state);
  out.statistics[2 * row] = state.max;
  out.statistics[2 * row + 1] = log_total;
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
  out.entropy[row] = out.statistics[2 * row] = out.statistics[2 * row + 1] = 0;
  if (out.log_prob) out.log_prob[row] = 0;
}

// A block a row at a time.
template <class T>
__device__ void forward_softmax_rows(const SoftmaxRows<T>& in,
                                     const SoftmaxOutputs<accumulate_t<T>>& out) {
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
    const int packs = (in.vocab - 1) / Pack<T>::kCount + 1;
    for (int part = 0; part < parts.count; ++part) {
      const int begin = part * parts.packs;
      const int end = packs - begin < parts.packs ? packs : begin + parts.packs;
      const OnlineSoftmax<Acc> state = warp_state(reader, begin, end, scale);
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
  const int packs = (in.vocab - 1) / Pack<T>::kCount + 1;
  for (int64_t index = blockIdx.x; index < in.rows * parts.count; index += gridDim.x) {
    const int64_t row = index / parts.count;
    if (in.is_masked(row)) continue;
    const RowScale<Acc> scale(in.temperature_of(row));
    const int begin = static_cast<int>(index % parts.count) * parts.packs;
    const int end = packs - begin < parts.packs ? packs : begin + parts.packs;
    const OnlineSoftmax<Acc> state =
        warp_state(PackReader<T>(in.row(row), in.vocab), begin, end, scale);
    if (threadIdx.x % kWarpSize == 0) states[threadIdx.x / kWarpSize] = state;
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      const OnlineSoftmax<Acc> merged = merge_warps(states, scale.inverse_temperature);
      if (threadIdx.x == 0) part_states[index] = merged;
    }
    __syncthreads();
  }
}

// A warp a row.
template <class T>
__global__ void softmax_merge_kernel(
    SoftmaxRows<T> in, const OnlineSoftmax<accumulate_t<T>>* part_states /*[rows, parts]*/,
    int parts, SoftmaxOutputs<accumulate_t<T>> out) {
  using Acc = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  int64_t row =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  for (; row < in.rows; row += stride) {
    if (in.is_masked(row)) {
      if (lane == 0) write_masked_row(row, out);
      continue;
    }
    const OnlineSoftmax<Acc> state =
        warp_merge(lane < parts ? part_states[row * parts + lane] : OnlineSoftmax<Acc>::neutral(),
                   Acc(1) / in.temperature_of(row));
    if (lane == 0) write_row(in, row, state, out);
  }
}

// ---- Backward ----

template <class T, class Acc>
__device__ __forceinline__ void store_values(const Acc (&x)[Pack<T>::kCount], T* to) {
  Pack<T> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
    for (int j = 0; j < Pack<T>::kCount; j += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[j], x[j + 1]);
      memcpy(&pack.values[j], &pair, sizeof(pair));
    }
  } else
#endif
  {
#pragma unroll
    for (int j = 0; j < Pack<T>::kCount; ++j) store_value(x[j], &pack.values[j]);
  }
  uint4 raw;
  memcpy(&raw, &pack, kPackBytes);
  __stcs(reinterpret_cast<uint4*>(to), raw);
}

// One part of a row that is written: elements before the first 16-byte boundary (the first part
// alone), packs [begin, end), elements after the last pack (the last part alone).
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
    T* to = row + part.head + static_cast<int64_t>(pack) * Pack<T>::kCount;
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(0, 0, 0, 0));
  }
}

template <bool aligned, class T, class Acc>
__device__ __forceinline__ void write_gradient_packs(const PackReader<T>& reader,
                                                     const RowGradient<Acc>& gradient, int target,
                                                     const OutputPart<T>& part,
                                                     T* grad_row /*[vocab]*/) {
  constexpr int kCount = Pack<T>::kCount;
  constexpr int kAhead = aligned ? kPacksInFlight<T> : kGroupPacks;
  const int threads = static_cast<int>(blockDim.x);
  const auto write = [&](int pack, const Pack<T>& x) {
    Acc values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = gradient(load_value(x.values[j]));
    const int64_t begin = part.head + static_cast<int64_t>(pack) * kCount;
    const int64_t in_pack = target - begin;
    if (in_pack >= 0 && in_pack < kCount) {
      // It joins before rounding to T: added after, p - 1 would be rounded twice.
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j] += j == in_pack ? gradient.pull : Acc(0);
    }
    store_values<T>(values, grad_row + begin);
  };
  const int whole = part.end < reader.whole_packs() ? part.end : reader.whole_packs();
  int pack = part.begin + static_cast<int>(threadIdx.x);
  for (; pack < whole - (kAhead - 1) * threads; pack += kAhead * threads) {
    Pack<T> loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      loaded[i] = reader.template load<aligned>(pack + i * threads);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) write(pack + i * threads, loaded[i]);
  }
  for (; pack < part.end; pack += threads) {
    write(pack, reader.template load_end<aligned>(pack, 0.0f));
  }
}

// A block a part of a row at a time; null gradients count as zero. Packs are those of the written
// row, so that every store is 16 bytes wide; logits that lie otherwise are shifted.
template <class T>
__device__ void backward_softmax_rows(const SoftmaxRows<T>& in, int parts,
                                      const accumulate_t<T>* grad_log_prob /*[rows]*/,
                                      const accumulate_t<T>* grad_entropy /*[rows]*/,
                                      const accumulate_t<T>* entropy_in /*[rows]*/,
                                      const accumulate_t<T>* statistics /*[rows, 2]*/,
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
    const RowGradient<Acc> gradient(SoftmaxGradient<Acc>{
        shift_of(statistics[2 * row]), statistics[2 * row + 1], entropy_in[row],
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
