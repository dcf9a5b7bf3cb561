// One row of logits on the CPU: max, sum e^d and sum e^d d in one pass over memory, and the
// gradient. The forward takes chunks of a row that stay in the first-level cache: maximum, then
// sums. The sums of a chunk are float32, over the lanes of vectors; chunks are added in float64.
// For float64 input all is float64. The loops are in softmax_loops.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../kernels/dtypes.h"
#include "../kernels/exp_log.h"
#include "../kernels/online_softmax.h"
#include "simd.h"

namespace entropy_rl::cpu {

constexpr int kChunk = 2048;
constexpr size_t kCacheLine = 64;

// Calls fn(row) for every row, on all threads.
template <class Fn>
void for_each_row(int64_t rows, int64_t width, Fn fn) {
  simd();  // throws here for a wrong ENTROPY_RL_SIMD; inside parallel_for the message would be lost
  const int64_t rows_per_task = std::max<int64_t>(1, 32768 / width);
  torch::stable::parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fn(row);
  });
}

// The largest of a chunk. Whether it is NaN where one of them is depends on their order.
template <class T>
accumulate_t<T> chunk_max(const T* x, int count);
// Sets sum and dot of one chunk, relative to `shift`.
template <class T>
void chunk_sums(const T* x, int count, accumulate_t<T> shift, accumulate_t<T> inverse_temperature,
                accumulate_t<T>* sum, accumulate_t<T>* dot);
// Writes the gradient without the target's own term. `out` may be x.
template <class T>
void softmax_gradient(const T* x, int64_t count, const SoftmaxGradient<accumulate_t<T>>& gradient,
                      T* out);
void narrow(const float* x, int count, BFloat16* out);
void narrow(const float* x, int count, Half* out);

template <class Acc>
struct RowSoftmax {
  Acc max;
  Acc log_sum;
  Acc entropy;

  Acc shift() const { return shift_of(max); }
  Acc log_prob(Acc x, Acc temperature) const { return (x - shift()) / temperature - log_sum; }
};

template <class T>
RowSoftmax<accumulate_t<T>> row_softmax(const T* logits /*[vocab]*/, int64_t vocab,
                                        double temperature) {
  using Acc = accumulate_t<T>;
  const Acc inverse_temperature = static_cast<Acc>(1.0 / temperature);
  OnlineSoftmax<double> row = OnlineSoftmax<double>::neutral();
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int count = static_cast<int>(vocab - begin < kChunk ? vocab - begin : kChunk);
    const T* x = logits + begin;
    const Acc max = chunk_max(x, count);
    if (max > row.max) row = rescaled<double>(row, max, 1.0 / temperature);
    Acc sum, dot;
    chunk_sums(x, count, static_cast<Acc>(row.shift()), inverse_temperature, &sum, &dot);
    row.sum += sum;
    row.dot += dot;
  }
  return {static_cast<Acc>(row.max), static_cast<Acc>(log_sum(row)),
          static_cast<Acc>(entropy(row))};
}

// Writes one row of dL/dlogits. A `target` outside [0, vocab) means that the row has none.
template <class T>
void row_gradient(const T* logits /*[vocab]*/, int64_t vocab, int64_t target,
                  const SoftmaxGradient<accumulate_t<T>>& gradient, T* grad_logits /*[vocab]*/) {
  using Acc = accumulate_t<T>;
  const bool has_target = target >= 0 && target < vocab;
  const Acc logit = has_target ? load_value(logits[target]) : Acc(0);
  softmax_gradient(logits, vocab, gradient, grad_logits);
  if (!has_target) return;
  // The target's term is added before rounding to T; added after it, p - 1 would be rounded twice.
  Acc value;
  softmax_gradient(&logit, 1, gradient, &value);
  store_value(value + gradient.inverse_temperature * gradient.grad_log_prob, &grad_logits[target]);
}

}  // namespace entropy_rl::cpu
