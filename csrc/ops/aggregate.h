// aggregate over a backend (token_loss.h).
#pragma once

#include "../kernels/aggregate_math.h"
#include "token_loss.h"

namespace entropy_rl {

template <class Backend>
LossTuple aggregate_forward(const Tensor& values, const Tensor& mask,
                            std::optional<Tensor> batch_num_tokens,
                            std::optional<Tensor> global_batch_size, std::string loss_agg_mode,
                            int64_t dp_size, std::optional<double> loss_scale_factor) {
  const TokenTensors tokens("values", values, "mask", mask);
  const CheckedNormalization normalization(
      {loss_agg_mode, "response", dp_size, batch_num_tokens, global_batch_size, loss_scale_factor},
      tokens);
  const LossOutputs out(tokens);
  dispatch_accumulate(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    Backend::run(PlainValue<T>{}, tokens.inputs<T>(), normalization, out);
  });
  return out.tuple();
}

}  // namespace entropy_rl
