#include <tuple>

#include "logits_rows.h"

namespace entropy_rl::cpu {

std::tuple<Tensor, Tensor> token_entropy_forward(const Tensor& logits, std::optional<Tensor> mask,
                                                 const Tensor& temperature) {
  const LogitsRows in(logits, mask, temperature);
  check_row_temperature(in);
  Tensor entropy = in.new_row_tensor();
  Tensor statistics = in.new_statistics();
  forward_rows(in, nullptr, std::nullopt, entropy, statistics);
  return {entropy, statistics};
}

Tensor token_entropy_backward(const Tensor& grad_entropy, const Tensor& logits,
                              std::optional<Tensor> mask, const Tensor& temperature, const Tensor& entropy,
                              const Tensor& statistics) {
  const LogitsRows in(logits, mask, temperature);
  const SavedRows saved(in, entropy, statistics);
  return backward_rows(in, nullptr, std::nullopt, in.gradient("grad_entropy", grad_entropy),
                       saved.entropy, saved.statistics);
}

}  // namespace entropy_rl::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("token_entropy_forward", TORCH_BOX(&entropy_rl::cpu::token_entropy_forward));
  m.impl("token_entropy_backward", TORCH_BOX(&entropy_rl::cpu::token_entropy_backward));
}
