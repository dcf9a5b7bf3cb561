#include "../kernels/token_entropy.cuh"

#include "logits_rows.h"

namespace entropy_rl::cuda {
namespace {

struct TokenEntropyKernels {
  template <class T>
  static auto forward() {
    return token_entropy_kernel<T>;
  }

  template <class T, class Launch>
  static void backward(const Launch& launch, const RowGradients& gradients) {
    using Acc = accumulate_t<T>;
    launch(token_entropy_backward_kernel<T>, const_data<Acc>(gradients.grad_entropy),
           const_data<Acc>(gradients.entropy), const_data<Acc>(gradients.statistics));
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
