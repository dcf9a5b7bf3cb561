#include "../kl_loss_op.h"

#include "token_losses.h"

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  m.impl("kl_loss_forward", TORCH_BOX(&entropy_rl::kl_loss_forward<entropy_rl::cuda::TokenLosses>));
  m.impl("kl_loss_backward", TORCH_BOX(&entropy_rl::loss_backward<entropy_rl::cuda::TokenLosses>));
}
