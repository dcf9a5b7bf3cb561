#include "../ops/kl_loss.h"

#include "token_loss_backend.h"

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("kl_loss_forward", TORCH_BOX(&entropy_rl::kl_loss_forward<entropy_rl::cpu::TokenLosses>));
  m.impl("kl_loss_backward", TORCH_BOX(&entropy_rl::loss_backward<entropy_rl::cpu::TokenLosses>));
}
