#include "../kernels/logprob_entropy.cuh"

#include "logits_rows.h"

namespace entropy_rl::cuda {
namespace {

struct LogprobEntropyKernels {
  template <class T>
  static auto forward() {
    return logprob_entropy_kernel<T>;
  }

  template <class T, class Launch>
  static void backward(const Launch& launch, const RowGradients& gradients) {
    using Acc = accumulate_t<T>;
    launch(logprob_entropy_backward_kernel<T>, const_data<Acc>(gradients.grad_log_prob),
           const_data<Acc>(gradients.grad_entropy), const_data<Acc>(gradients.entropy),
           const_data<Acc>(gradients.statistics));
  }
};

using LogprobEntropy = SoftmaxLaunch<LogprobEntropyKernels>;

}  // namespace
}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  using entropy_rl::cuda::LogprobEntropy;
  m.impl("logprob_entropy_forward",
         TORCH_BOX(&entropy_rl::logprob_entropy_forward<LogprobEntropy>));
  m.impl("logprob_entropy_backward",
         TORCH_BOX(&entropy_rl::logprob_entropy_backward<LogprobEntropy>));
}
