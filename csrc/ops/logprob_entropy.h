// token_entropy and logprob_entropy over a backend. A backend of an op has
//
//   // What only a backend that may look at device values can check.
//   static void check_values(const LogitsRows&, const std::optional<Tensor>& targets);
//   static void forward(const LogitsRows&, const RowOutputs&);
//   // Gradient of the logits, contiguous.
//   static Tensor backward(const LogitsRows&, const RowGradients&);
#pragma once

#include <tuple>

#include "softmax.h"

namespace entropy_rl {

// What a forward writes, all contiguous over rows.
struct RowOutputs {
  std::optional<Tensor> targets;   // [rows] int64, read; absent for token_entropy
  std::optional<Tensor> log_prob;  // [rows], where there are targets
  Tensor entropy;                  // [rows]
  Tensor statistics;               // [rows, 2]: max and log sum

  RowOutputs(const LogitsRows& in, const std::optional<Tensor>& targets)
      : targets(targets), entropy(in.new_row_tensor()), statistics(in.new_statistics()) {
    if (targets) log_prob = in.new_row_tensor();
  }
};

// What a backward reads beside the logits, checked: a caller of the backward op may pass anything.
struct RowGradients {
  std::optional<Tensor> targets;        // [rows] int64
  std::optional<Tensor> grad_log_prob;  // [rows]
  std::optional<Tensor> grad_entropy;   // [rows]
  Tensor entropy;                       // [rows]
  Tensor statistics;                    // [rows, 2]

  RowGradients(const LogitsRows& in, const std::optional<Tensor>& targets,
               const std::optional<Tensor>& grad_log_prob_in,
               const std::optional<Tensor>& grad_entropy_in, const Tensor& entropy_in,
               const Tensor& statistics_in)
      : targets(targets),
        entropy(in.row_values("entropy", entropy_in, in.accumulate_dtype())),
        statistics(as_contiguous(statistics_in, in.accumulate_dtype())) {
    check_shape("statistics", statistics_in, in.row_shape_with(2), "max and log sum of each row");
    check_same_device("statistics", statistics_in, "logits", in.logits);
    if (grad_log_prob_in) {
      grad_log_prob = in.row_values("grad_log_prob", *grad_log_prob_in, in.accumulate_dtype());
    }
    if (grad_entropy_in) {
      grad_entropy = in.row_values("grad_entropy", *grad_entropy_in, in.accumulate_dtype());
    }
  }
};

template <class Backend>
std::tuple<Tensor, Tensor> token_entropy_forward(const Tensor& logits, std::optional<Tensor> mask,
                                                 const Tensor& temperature) {
  const LogitsRows in(logits, mask, temperature);
  Backend::check_values(in, std::nullopt);
  const RowOutputs out(in, std::nullopt);
  if (in.rows > 0) Backend::forward(in, out);
  return {out.entropy, out.statistics};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> logprob_entropy_forward(const Tensor& logits,
                                                           const Tensor& targets,
                                                           std::optional<Tensor> mask,
                                                           const Tensor& temperature) {
  const LogitsRows in(logits, mask, temperature);
  const Tensor row_targets = in.targets(targets);
  Backend::check_values(in, row_targets);
  const RowOutputs out(in, row_targets);
  if (in.rows > 0) Backend::forward(in, out);
  return {*out.log_prob, out.entropy, out.statistics};
}

// Gradient of the logits, contiguous. Rows without a gradient are not read, only filled with zeros.
// Rows without a gradient are not read, and zero.
template <class Backend>
Tensor softmax_backward(const LogitsRows& in, const RowGradients& gradients) {
  return in.rows > 0 ? Backend::backward(in, gradients) : in.new_grad_logits();
}

template <class Backend>
Tensor token_entropy_backward(const Tensor& grad_entropy, const Tensor& logits,
                              std::optional<Tensor> mask, const Tensor& temperature,
                              const Tensor& entropy, const Tensor& statistics) {
  const LogitsRows in(logits, mask, temperature);
  return softmax_backward<Backend>(
      in, {in, std::nullopt, std::nullopt, grad_entropy, entropy, statistics});
}

template <class Backend>
Tensor logprob_entropy_backward(std::optional<Tensor> grad_log_prob,
                                std::optional<Tensor> grad_entropy, const Tensor& logits,
                                const Tensor& targets, std::optional<Tensor> mask,
                                const Tensor& temperature, const Tensor& entropy,
                                const Tensor& statistics) {
  const LogitsRows in(logits, mask, temperature);
  return softmax_backward<Backend>(
      in, {in, in.targets(targets), grad_log_prob, grad_entropy, entropy, statistics});
}

}  // namespace entropy_rl
