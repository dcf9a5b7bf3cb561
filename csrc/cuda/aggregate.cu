#include "../ops/aggregate.h"

#include "token_loss_backend.cuh"

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  m.impl("aggregate_forward",
         TORCH_BOX(&entropy_rl::aggregate_forward<entropy_rl::cuda::TokenLosses>));
  m.impl("aggregate_backward",
         TORCH_BOX(&entropy_rl::loss_backward<entropy_rl::cuda::TokenLosses>));
}
