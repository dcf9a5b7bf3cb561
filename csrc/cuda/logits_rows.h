// From the checked arguments of token_entropy and logprob_entropy to a kernel's.
#pragma once

#include "../kernels/softmax_rows.cuh"
#include "../logits_rows.h"
#include "launch.h"
#include "tuning.h"

namespace entropy_rl::cuda {

template <class T>
inline SoftmaxRows<T> softmax_rows(const LogitsRows& in, const std::optional<Tensor>& targets) {
  using Acc = accumulate_t<T>;
  return {const_data<T>(in.logits),
          in.layout,
          in.rows,
          static_cast<int>(in.vocab),
          const_data<bool>(in.mask),
          static_cast<Acc>(in.temperature),
          const_data<Acc>(in.row_temperature),
          const_data<int64_t>(targets)};
}

}  // namespace entropy_rl::cuda
