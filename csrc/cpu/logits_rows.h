// The loops over rows that token_entropy and logprob_entropy share on the CPU.
#pragma once

#include "../logits_rows.h"
#include "softmax_rows.h"

namespace entropy_rl::cpu {

inline void check_row_temperature(const LogitsRows& in) {
  if (!in.row_temperature) return;
  dispatch_floating(in.row_temperature->scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* temperature = const_data<T>(*in.row_temperature);
    for (int64_t row = 0; row < in.rows; ++row) {
      const double value = load_value(temperature[row]);
      check(std::isfinite(value) && value > 0, "temperature[", row, "] is ", value,
            "; it must be a finite number above 0");
    }
  });
}

inline void check_targets(const LogitsRows& in, const Tensor& targets) {
  const int64_t* target = const_data<int64_t>(targets);
  const bool* mask = const_data<bool>(in.mask);
  for (int64_t row = 0; row < in.rows; ++row) {
    if (mask && !mask[row]) continue;
    check(target[row] >= 0 && target[row] < in.vocab, "targets[", row, "] (flat index) is ",
          target[row], "; it must be in [0, ", in.vocab, "), the vocabulary");
  }
}

// Calls fn(row) for every row, on all threads.
template <class Fn>
inline void for_each_row(const LogitsRows& in, Fn fn) {
  const int64_t rows_per_task = std::max<int64_t>(1, 32768 / in.vocab);
  torch::stable::parallel_for(0, in.rows, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fn(row);
  });
}

// Entropy and statistics of every row and, where `targets` is given, the target's log-prob.
// Rows that the mask leaves out are not read and give 0.
inline void forward_rows(const LogitsRows& in, const int64_t* targets /*[rows] or null*/,
                         const std::optional<Tensor>& log_prob, const Tensor& entropy,
                         const Tensor& statistics) {
  dispatch_floating(in.logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Acc = accumulate_t<T>;
    const T* logits = const_data<T>(in.logits);
    const bool* mask = const_data<bool>(in.mask);
    const Acc* row_temperature = const_data<Acc>(in.row_temperature);
    Acc* log_prob_out = log_prob ? mutable_data<Acc>(*log_prob) : nullptr;
    Acc* entropy_out = mutable_data<Acc>(entropy);
    Acc* statistics_out = mutable_data<Acc>(statistics);  // [rows, 2]
    for_each_row(in, [&](int64_t row) {
      if (mask && !mask[row]) {
        entropy_out[row] = 0;
        if (log_prob_out) log_prob_out[row] = 0;
        statistics_out[2 * row] = statistics_out[2 * row + 1] = 0;
        return;
      }
      const T* x = logits + in.layout.offset(row);
      const double temperature = row_temperature ? row_temperature[row] : in.temperature;
      const RowStatistics<Acc> result = row_statistics(x, in.vocab, temperature);
      entropy_out[row] = result.entropy;
      statistics_out[2 * row] = result.max;
      statistics_out[2 * row + 1] = result.log_sum;
      if (targets) {
        log_prob_out[row] =
            result.log_prob(load_value(x[targets[row]]), static_cast<Acc>(temperature));
      }
    });
  });
}

// dL/dlogits [..., vocab], contiguous. Rows with no gradient are not read, only filled with zero.
inline Tensor backward_rows(const LogitsRows& in, const int64_t* targets /*[rows] or null*/,
                            const std::optional<Tensor>& grad_log_prob,
                            const std::optional<Tensor>& grad_entropy, const Tensor& entropy,
                            const Tensor& statistics) {
  Tensor grad_logits = torch::stable::new_empty(in.logits, in.row_shape_with(in.vocab));
  dispatch_floating(in.logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Acc = accumulate_t<T>;
    const T* logits = const_data<T>(in.logits);
    const bool* mask = const_data<bool>(in.mask);
    const Acc* row_temperature = const_data<Acc>(in.row_temperature);
    const Acc* grad_log_prob_in = const_data<Acc>(grad_log_prob);
    const Acc* grad_entropy_in = const_data<Acc>(grad_entropy);
    const Acc* entropy_in = const_data<Acc>(entropy);
    const Acc* statistics_in = const_data<Acc>(statistics);
    T* out = mutable_data<T>(grad_logits);
    for_each_row(in, [&](int64_t row) {
      const Acc g_log_prob = grad_log_prob_in ? grad_log_prob_in[row] : Acc(0);
      const Acc g_entropy = grad_entropy_in ? grad_entropy_in[row] : Acc(0);
      T* grad_row = out + row * in.vocab;
      if ((mask && !mask[row]) || (g_log_prob == 0 && g_entropy == 0)) {
        memset(static_cast<void*>(grad_row), 0, static_cast<size_t>(in.vocab) * sizeof(T));
        return;
      }
      const double temperature = row_temperature ? row_temperature[row] : in.temperature;
      const RowStatistics<Acc> row_in{statistics_in[2 * row], statistics_in[2 * row + 1],
                                      entropy_in[row]};
      const SoftmaxGradient<Acc> gradient{
          row_in.shift(), row_in.log_sum, row_in.entropy, static_cast<Acc>(1.0 / temperature),
          g_log_prob,     g_entropy};
      row_gradient(logits + in.layout.offset(row), in.vocab, targets ? targets[row] : -1, gradient,
                   grad_row);
    });
  });
  return grad_logits;
}

}  // namespace entropy_rl::cpu
