// logprob_entropy, and token_entropy, which is the same without targets, over a backend. It has
//
//   // Checks the values that a backend can look at without waiting for a device.
//   static void check_values(const LogitsRows&, const std::optional<Tensor>& targets);
//   static void forward(const LogitsRows&, const RowOutputs&);
//   // Gradient of the logits, contiguous. Rows whose gradients are zero are not read.
//   static Tensor backward(const LogitsRows&, const RowGradients&);
#pragma once

#include <tuple>

#include "softmax.h"

namespace entropy_rl {

// What a forward writes, contiguous over rows, and the targets that it reads.
struct RowOutputs {
  std::optional<Tensor> targets;  // [rows] int64
  Tensor log_prob;                // [rows]; [0] without targets
  Tensor entropy;                 // [rows]
  Tensor max_log_sum;             // [rows, 2]

  RowOutputs(const LogitsRows& in, const std::optional<Tensor>& targets)
      : targets(targets),
        log_prob(targets ? in.new_row_tensor() : new_tensor(in.logits, {0}, in.accumulate_dtype())),
        entropy(in.new_row_tensor()),
        max_log_sum(in.new_max_log_sum()) {}
};

// What a backward reads beside the logits. The backward op is public, so these are checked too.
struct RowGradients {
  std::optional<Tensor> targets;        // [rows] int64
  std::optional<Tensor> grad_log_prob;  // [rows]
  std::optional<Tensor> grad_entropy;   // [rows]
  Tensor entropy;                       // [rows]
  Tensor max_log_sum;                   // [rows, 2]

  RowGradients(const LogitsRows& in, const std::optional<Tensor>& targets,
               const std::optional<Tensor>& grad_log_prob_in,
               const std::optional<Tensor>& grad_entropy_in, const Tensor& entropy_in,
               const Tensor& max_log_sum_in)
      : targets(targets),
        entropy(in.row_values("entropy", entropy_in, in.accumulate_dtype())),
        max_log_sum(as_contiguous(max_log_sum_in, in.accumulate_dtype())) {
    check_shape("max_log_sum", max_log_sum_in, in.row_shape_with(2), "max and log sum of each row");
    check_same_device("max_log_sum", max_log_sum_in, "logits", in.logits);
    if (grad_log_prob_in) {
      check(targets.has_value(), "grad_log_prob is given and targets is None; it needs targets");
      grad_log_prob = in.row_values("grad_log_prob", *grad_log_prob_in, in.accumulate_dtype());
    }
    if (grad_entropy_in) {
      grad_entropy = in.row_values("grad_entropy", *grad_entropy_in, in.accumulate_dtype());
    }
  }
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> logprob_entropy_forward(const Tensor& logits,
                                                           std::optional<Tensor> targets,
                                                           std::optional<Tensor> mask,
                                                           const Tensor& temperature) {
  const LogitsRows in(logits, mask, temperature);
  if (targets) targets = in.targets(*targets);
  Backend::check_values(in, targets);
  const RowOutputs out(in, targets);
  if (in.rows > 0) Backend::forward(in, out);
  return {out.log_prob, out.entropy, out.max_log_sum};
}

template <class Backend>
Tensor logprob_entropy_backward(std::optional<Tensor> grad_log_prob,
                                std::optional<Tensor> grad_entropy, const Tensor& logits,
                                std::optional<Tensor> targets, std::optional<Tensor> mask,
                                const Tensor& temperature, const Tensor& entropy,
                                const Tensor& max_log_sum) {
  const LogitsRows in(logits, mask, temperature);
  if (targets) targets = in.targets(*targets);
  const RowGradients gradients(in, targets, grad_log_prob, grad_entropy, entropy, max_log_sum);
  return in.rows > 0 ? Backend::backward(in, gradients) : in.new_grad_logits();
}

}  // namespace entropy_rl
