#include "logits_rows.h"

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("logprob_entropy_forward",
         TORCH_BOX(&entropy_rl::logprob_entropy_forward<entropy_rl::cpu::SoftmaxRows>));
  m.impl("logprob_entropy_backward",
         TORCH_BOX(&entropy_rl::logprob_entropy_backward<entropy_rl::cpu::SoftmaxRows>));
}
