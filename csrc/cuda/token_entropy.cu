#include "../kernels/token_entropy.cuh"

#include "logits_rows.h"

namespace entropy_rl::cuda {
namespace {

struct TokenEntropyKernels {
  template <class Launch, class T>
  static void forward(const Launch& launch, const SoftmaxRows<T>& in, const RowOutputs& out) {
    using Acc = accumulate_t<T>;
    launch(token_entropy_kernel<T>, in, mutable_data<Acc>(out.entropy),
           mutable_data<Acc>(out.statistics));
  }

  template <class Launch, class T>
  static void backward(const Launch& launch, const SoftmaxRows<T>& in,
                       const RowGradients& gradients, T* grad_logits) {
    using Acc = accumulate_t<T>;
    launch(token_entropy_backward_kernel<T>, in, const_data<Acc>(gradients.grad_entropy),
           const_data<Acc>(gradients.entropy), const_data<Acc>(gradients.statistics), grad_logits);
  }
};

using TokenEntropy = SoftmaxLaunch<TokenEntropyKernels>;

}  // namespace
}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  using entropy_rl::cuda::TokenEntropy;
  m.impl("token_entropy_forward", TORCH_BOX(&entropy_rl::token_entropy_forward<TokenEntropy>));
  m.impl("token_entropy_backward", TORCH_BOX(&entropy_rl::token_entropy_backward<TokenEntropy>));
}
