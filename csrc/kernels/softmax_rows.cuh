// What the kernels of token_entropy and logprob_entropy share: one block takes one row of logits.
//   forward   reads the row once: V * sizeof(T) bytes; writes three values.
//   backward  reads it once and writes it once; a row with no gradient is only filled with zeros.
// A thread loads kPacks 16-byte packs before it uses the first, so that several reads are in
// flight, and rescales once per two packs. Accumulation is float (double for double).
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

constexpr int kPackBytes = 16;
constexpr int kPacks = 4;
constexpr int kMaxRowThreads = 512;

template <class T>
struct Pack {
  static constexpr int kCount = kPackBytes / static_cast<int>(sizeof(T));
  T values[kCount];

  __device__ __forceinline__ static Pack load(const T* from) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    Pack pack;
    memcpy(&pack, &raw, kPackBytes);
    return pack;
  }
  __device__ __forceinline__ void store(T* to) const {
    uint4 raw;
    memcpy(&raw, this, kPackBytes);
    *reinterpret_cast<uint4*>(to) = raw;
  }
};

// Elements before the first 16-byte boundary of a row: rows of an odd vocabulary begin anywhere.
template <class T>
__device__ __forceinline__ int elements_before_boundary(const T* row, int vocab) {
  const int bytes = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kPackBytes);
  const int count = (kPackBytes - bytes) % kPackBytes / static_cast<int>(sizeof(T));
  return count < vocab ? count : vocab;
}

// All threads of the block call it; all return the whole row's state.
template <class T, class Acc>
__device__ OnlineSoftmax<Acc> reduce_softmax_row(const T* row /*[vocab]*/, int vocab,
                                                 Acc inverse_temperature,
                                                 OnlineSoftmax<Acc>* shared /*[kMaxWarps]*/) {
  constexpr int kCount = Pack<T>::kCount;
  OnlineSoftmax<Acc> state = OnlineSoftmax<Acc>::neutral();
  const auto add_one = [&](T element) {
    const Acc x[1] = {load_value(element)};
    accumulate(&state, x, inverse_temperature);
  };

  const int head = elements_before_boundary(row, vocab);
  const int packs = (vocab - head) / kCount;
  const T* body = row + head;
  if (static_cast<int>(threadIdx.x) < head) add_one(row[threadIdx.x]);

  const int threads = static_cast<int>(blockDim.x);
  int pack = static_cast<int>(threadIdx.x);
  for (; pack + (kPacks - 1) * threads < packs; pack += kPacks * threads) {
    Pack<T> loaded[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      loaded[i] = Pack<T>::load(body + static_cast<int64_t>(pack + i * threads) * kCount);
    }
#pragma unroll
    for (int i = 0; i < kPacks; i += 2) {
      Acc x[2 * kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        x[j] = load_value(loaded[i].values[j]);
        x[kCount + j] = load_value(loaded[i + 1].values[j]);
      }
      accumulate(&state, x, inverse_temperature);
    }
  }
  for (; pack < packs; pack += threads) {
    const Pack<T> loaded = Pack<T>::load(body + static_cast<int64_t>(pack) * kCount);
    Acc x[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = load_value(loaded.values[j]);
    accumulate(&state, x, inverse_temperature);
  }
  const int tail = head + packs * kCount + static_cast<int>(threadIdx.x);
  if (tail < vocab) add_one(row[tail]);

  return block_reduce(
      state, OnlineSoftmax<Acc>::neutral(),
      [=](const OnlineSoftmax<Acc>& a, const OnlineSoftmax<Acc>& b) {
        return merge(a, b, inverse_temperature);
      },
      shared);
}

// Forward of the rows blockIdx.x, blockIdx.x + gridDim.x, ...
template <class T>
__device__ void forward_softmax_rows(const SoftmaxRows<T>& in, accumulate_t<T>* log_prob /*[rows]*/,
                                     accumulate_t<T>* entropy_out /*[rows]*/,
                                     accumulate_t<T>* statistics /*[rows, 2]*/) {
  using Acc = accumulate_t<T>;
  __shared__ OnlineSoftmax<Acc> shared[kMaxWarps];
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    OnlineSoftmax<Acc> state = {0, 1, 0};  // gives 0 everywhere, for rows that the mask leaves out
    const bool masked = in.is_masked(row);
    const T* x = in.logits + in.layout.offset(row);
    const Acc temperature = in.temperature_of(row);
    if (!masked) state = reduce_softmax_row(x, in.vocab, Acc(1) / temperature, shared);
    if (threadIdx.x != 0) continue;
    const Acc log_total = log_sum(state);
    entropy_out[row] = entropy(state);
    statistics[2 * row] = state.max;
    statistics[2 * row + 1] = log_total;
    if (!in.targets) continue;
    if (masked) {
      log_prob[row] = 0;
    } else if (in.target_is_valid(row)) {
      log_prob[row] = (load_value(x[in.targets[row]]) - state.shift()) / temperature - log_total;
    } else {
      log_prob[row] = static_cast<Acc>(NAN);
    }
  }
}

template <class T>
__device__ void fill_zero_row(T* row /*[vocab]*/, int vocab) {
  constexpr int kCount = Pack<T>::kCount;
  const int head = elements_before_boundary(row, vocab);
  const int packs = (vocab - head) / kCount;
  const int thread = static_cast<int>(threadIdx.x);
  const int tail = head + packs * kCount + thread;
  if (thread < head) row[thread] = T{};
  for (int pack = thread; pack < packs; pack += static_cast<int>(blockDim.x)) {
    Pack<T>{}.store(row + head + static_cast<int64_t>(pack) * kCount);
  }
  if (tail < vocab) row[tail] = T{};
}

template <class T, class Acc>
__device__ void write_gradient_row(const T* row /*[vocab]*/, T* grad_row /*[vocab]*/, int vocab,
                                   int target, const SoftmaxGradient<Acc>& gradient) {
  constexpr int kCount = Pack<T>::kCount;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const auto write_one = [&](int j) {
    store_value(gradient(load_value(row[j]), j == target), grad_row + j);
  };
  const int head = elements_before_boundary(row, vocab);
  if (head != elements_before_boundary(grad_row, vocab)) {
    // Input and output rows are shifted against each other (a strided input): one element a thread.
    for (int j = thread; j < vocab; j += threads) write_one(j);
    return;
  }
  const int packs = (vocab - head) / kCount;
  if (thread < head) write_one(thread);
  for (int pack = thread; pack < packs; pack += threads) {
    const int64_t begin = head + static_cast<int64_t>(pack) * kCount;
    Pack<T> values = Pack<T>::load(row + begin);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      store_value(gradient(load_value(values.values[j]), begin + j == target), &values.values[j]);
    }
    values.store(grad_row + begin);
  }
  const int tail = head + packs * kCount + thread;
  if (tail < vocab) write_one(tail);
}

// Backward of the rows blockIdx.x, blockIdx.x + gridDim.x, ...; null gradients count as zero.
template <class T>
__device__ void backward_softmax_rows(const SoftmaxRows<T>& in,
                                      const accumulate_t<T>* grad_log_prob /*[rows]*/,
                                      const accumulate_t<T>* grad_entropy /*[rows]*/,
                                      const accumulate_t<T>* entropy_in /*[rows]*/,
                                      const accumulate_t<T>* statistics /*[rows, 2]*/,
                                      T* grad_logits /*[rows, vocab]*/) {
  using Acc = accumulate_t<T>;
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    Acc g_log_prob = grad_log_prob ? grad_log_prob[row] : Acc(0);
    const Acc g_entropy = grad_entropy ? grad_entropy[row] : Acc(0);
    T* grad_row = grad_logits + row * in.vocab;
    if (in.is_masked(row) || (g_log_prob == Acc(0) && g_entropy == Acc(0))) {
      fill_zero_row(grad_row, in.vocab);
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
    const SoftmaxGradient<Acc> gradient = {shift_of(statistics[2 * row]),
                                           statistics[2 * row + 1],
                                           entropy_in[row],
                                           Acc(1) / in.temperature_of(row),
                                           g_log_prob,
                                           g_entropy};
    write_gradient_row(in.logits + in.layout.offset(row), grad_row, in.vocab, target, gradient);
  }
}

}  // namespace entropy_rl
