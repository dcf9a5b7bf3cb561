#include "../ops/aggregate.h"

#include "token_loss_backend.h"

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("aggregate_forward",
         TORCH_BOX(&entropy_rl::aggregate_forward<entropy_rl::cpu::TokenLosses>));
  m.impl("aggregate_backward", TORCH_BOX(&entropy_rl::loss_backward<entropy_rl::cpu::TokenLosses>));
}
