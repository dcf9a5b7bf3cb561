// One row of logits on the CPU: max, sum e^d and sum e^d d in one pass over memory, and the
// gradient. A row is processed in chunks that stay in the first-level cache: conversion to float,
// maximum, sums. The sums of a chunk are float32, over the lanes of vectors; chunks are added in
// float64. For float64 input all is float64. The loops over a chunk are in softmax_loops.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../kernels/dtypes.h"
#include "../kernels/exp_log.h"
#include "../kernels/online_softmax.h"
#include "simd.h"

namespace entropy_rl::cpu {

constexpr int kChunk = 1024;

// Calls fn(row) for every row, on all threads.
template <class Fn>
void for_each_row(int64_t rows, int64_t width, Fn fn) {
  simd();  // throws here for a wrong ENTROPY_RL_SIMD; inside parallel_for the message would be lost
  const int64_t rows_per_task = std::max<int64_t>(1, 32768 / width);
  torch::stable::parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fn(row);
  });
}

float chunk_max(const float* x, int count);
double chunk_max(const double* x, int count);
// Sets sum and dot of one chunk, relative to `shift`.
void chunk_sums(const float* x, int count, float shift, float inverse_temperature, float* sum,
                float* dot);
void chunk_sums(const double* x, int count, double shift, double inverse_temperature, double* sum,
                double* dot);
// Writes the gradient without the target's own term, which the caller adds. `out` may be x.
void chunk_gradient(const float* x, int count, const SoftmaxGradient<float>& gradient, float* out);
void chunk_gradient(const double* x, int count, const SoftmaxGradient<double>& gradient,
                    double* out);
void widen(const BFloat16* x, int count, float* out);
void widen(const Half* x, int count, float* out);
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
  alignas(64) Acc buffer[kChunk];
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int count = static_cast<int>(vocab - begin < kChunk ? vocab - begin : kChunk);
    const Acc* x;
    if constexpr (std::is_same_v<T, Acc>) {
      x = logits + begin;
    } else {
      widen(logits + begin, count, buffer);
      x = buffer;
    }
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
  alignas(64) Acc buffer[kChunk];
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int count = static_cast<int>(vocab - begin < kChunk ? vocab - begin : kChunk);
    Acc* out = buffer;
    if constexpr (std::is_same_v<T, Acc>) {
      out = grad_logits + begin;
      chunk_gradient(logits + begin, count, gradient, out);
    } else {
      widen(logits + begin, count, buffer);
      chunk_gradient(buffer, count, gradient, buffer);
    }
    // The target's term is added before rounding to T; added after it, p - 1 would be rounded
    // twice.
    if (target >= begin && target < begin + count) {
      out[target - begin] += gradient.inverse_temperature * gradient.grad_log_prob;
    }
    if constexpr (!std::is_same_v<T, Acc>) narrow(buffer, count, grad_logits + begin);
  }
}

}  // namespace entropy_rl::cpu
