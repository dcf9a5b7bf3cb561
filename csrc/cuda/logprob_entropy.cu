#include "../kernels/logprob_entropy.cuh"

#include <tuple>

#include "logits_rows.h"

namespace entropy_rl::cuda {

std::tuple<Tensor, Tensor, Tensor> logprob_entropy_forward(const Tensor& logits,
                                                           const Tensor& targets,
                                                           std::optional<Tensor> mask,
                                                           const Tensor& temperature) {
  const LogitsRows in(logits, mask, temperature);
  const Tensor row_targets = in.targets(targets);
  Tensor log_prob = in.new_row_tensor();
  const DeviceScope device(in.logits);
  Tensor entropy = in.new_row_tensor();
  Tensor statistics = in.new_statistics();
  if (in.rows == 0) return {log_prob, entropy, statistics};
  dispatch_floating(in.logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Acc = accumulate_t<T>;
    logprob_entropy_kernel<T>
        <<<grid_size(in.rows), softmax_row_threads(in.vocab), 0, device.stream()>>>(
            softmax_rows<T>(in, row_targets), mutable_data<Acc>(log_prob),
            mutable_data<Acc>(entropy), mutable_data<Acc>(statistics));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
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
  const std::optional<Tensor> g_log_prob = in.gradient("grad_log_prob", grad_log_prob);
  const std::optional<Tensor> g_entropy = in.gradient("grad_entropy", grad_entropy);
  const DeviceScope device(in.logits);
  Tensor grad_logits = torch::stable::new_empty(logits, in.row_shape_with(in.vocab));
  if (in.rows == 0) return grad_logits;
  dispatch_floating(in.logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Acc = accumulate_t<T>;
    logprob_entropy_backward_kernel<T>
        <<<grid_size(in.rows), softmax_row_threads(in.vocab), 0, device.stream()>>>(
            softmax_rows<T>(in, row_targets), const_data<Acc>(g_log_prob),
            const_data<Acc>(g_entropy), const_data<Acc>(saved.entropy),
            const_data<Acc>(saved.statistics), mutable_data<T>(grad_logits));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_logits;
}

}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  m.impl("logprob_entropy_forward", TORCH_BOX(&entropy_rl::cuda::logprob_entropy_forward));
  m.impl("logprob_entropy_backward", TORCH_BOX(&entropy_rl::cuda::logprob_entropy_backward));
}
