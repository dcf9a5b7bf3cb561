// kl_loss over a backend (token_loss.h).
#pragma once

#include "../kernels/kl_loss_math.h"
#include "token_loss.h"

namespace entropy_rl {

template <class T, bool straight_through, class Fn>
void with_kl_penalty(KlPenalty penalty, Fn fn) {
  switch (penalty) {
    case KlPenalty::kK1: return fn(K1Penalty<T, straight_through>{});
    case KlPenalty::kAbs: return fn(AbsPenalty<T, straight_through>{});
    case KlPenalty::kK2: return fn(K2Penalty<T>{});
    case KlPenalty::kK3: return fn(K3Penalty<T, straight_through>{});
  }
}

// `kl_loss_type`: kl, abs, mse, low_var_kl, their other names k1, k2, k3, and each with a final +
// for the straight-through form.
template <class Backend>
LossTuple kl_loss_forward(const Tensor& log_prob, const Tensor& ref_log_prob,
                          const Tensor& response_mask, std::optional<Tensor> batch_num_tokens,
                          std::optional<Tensor> global_batch_size, std::optional<Tensor> weights,
                          std::string kl_loss_type, std::string loss_agg_mode, int64_t dp_size,
                          std::optional<double> loss_scale_factor) {
  const std::pair<const char*, std::pair<KlPenalty, bool>> types[] = {
      {"kl", {KlPenalty::kK1, false}},         {"k1", {KlPenalty::kK1, false}},
      {"abs", {KlPenalty::kAbs, false}},       {"mse", {KlPenalty::kK2, false}},
      {"k2", {KlPenalty::kK2, false}},         {"low_var_kl", {KlPenalty::kK3, false}},
      {"k3", {KlPenalty::kK3, false}},         {"kl+", {KlPenalty::kK1, true}},
      {"k1+", {KlPenalty::kK1, true}},         {"abs+", {KlPenalty::kAbs, true}},
      {"mse+", {KlPenalty::kK2, true}},        {"k2+", {KlPenalty::kK2, true}},
      {"low_var_kl+", {KlPenalty::kK3, true}}, {"k3+", {KlPenalty::kK3, true}}};
  const std::pair<KlPenalty, bool> type = parse_choice("kl_loss_type", kl_loss_type, types);
  TokenTensors tokens("log_prob", log_prob, "response_mask", response_mask);
  tokens.old_log_prob = tokens.floats_of("ref_log_prob", ref_log_prob);
  if (weights) tokens.weights = tokens.floats_of("weights", *weights);
  const CheckedNormalization normalization(
      {loss_agg_mode, "response", dp_size, batch_num_tokens, global_batch_size, loss_scale_factor},
      tokens);
  const LossOutputs out(tokens);
  dispatch_accumulate(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](const auto& token_loss) {
      Backend::run(token_loss, tokens.inputs<T>(), normalization, out);
    };
    type.second ? with_kl_penalty<T, true>(type.first, run)
                : with_kl_penalty<T, false>(type.first, run);
  });
  return out.tuple();
}

}  // namespace entropy_rl
