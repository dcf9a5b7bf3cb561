#include <tuple>

#include "logits_rows.h"

namespace entropy_rl::cpu {

std::tuple<Tensor, Tensor, Tensor> logprob_entropy_forward(const Tensor& logits,
                                                           const Tensor& targets,
                                                           std::optional<Tensor> mask,
                                                           const Tensor& temperature) {
  const LogitsRows in(logits, mask, temperature);
  check_row_temperature(in);
  const Tensor row_targets = in.targets(targets);
  check_targets(in, row_targets);
  Tensor log_prob = in.new_row_tensor();
  Tensor entropy = in.new_row_tensor();
  Tensor statistics = in.new_statistics();
  forward_rows(in, const_data<int64_t>(row_targets), log_prob, entropy, statistics);
  return {log_prob, entropy, statistics};
}

Tensor logprob_entropy_backward(std::optional<Tensor> grad_log_prob,
                                std::optional<Tensor> grad_entropy, const Tensor& logits,
                                const Tensor& targets, std::optional<Tensor> mask,
                                const Tensor& temperature,
                                const Tensor& entropy, const Tensor& statistics) {
  const LogitsRows in(logits, mask, temperature);
  const SavedRows saved(in, entropy, statistics);
  const Tensor row_targets = in.targets(targets);
  return backward_rows(in, const_data<int64_t>(row_targets),
                       in.gradient("grad_log_prob", grad_log_prob),
                       in.gradient("grad_entropy", grad_entropy), saved.entropy, saved.statistics);
}

}  // namespace entropy_rl::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("logprob_entropy_forward", TORCH_BOX(&entropy_rl::cpu::logprob_entropy_forward));
  m.impl("logprob_entropy_backward", TORCH_BOX(&entropy_rl::cpu::logprob_entropy_backward));
}
