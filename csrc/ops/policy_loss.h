// policy_loss over a backend. Beside run (token_loss.h), the backend has
//
//   // Writes uint8 [rows, cols]: 1 for the response tokens with the largest covariance keys.
//   Called
//   // only if the caller gives no covariance_mask.
//   template <class T, class CovarianceKey>
//   static void choose(const CovarianceKey&, const TokenInputs<T>&, const Tensor& seed,
//                      const Tensor& chosen);
//   // Writes T [rows]: the log of gspo's sequence ratio.
//   template <class T>
//   static void sequence_log_ratios(const TokenInputs<T>&, const Tensor& out);
#pragma once

#include "../kernels/policy_loss_math.h"
#include "token_loss.h"

namespace entropy_rl {

// The named numbers of policy_loss; each loss checks those that it uses.
struct PolicyLossNumbers {
  double clip_ratio;
  std::optional<double> clip_ratio_low;
  std::optional<double> clip_ratio_high;
  double clip_ratio_c;
  double clip_cov_ratio;
  double clip_cov_lb;
  double clip_cov_ub;
  double kl_cov_ratio;
  double ppo_kl_coef;
  double tau_pos;
  double tau_neg;
  std::optional<double> dro_beta;

  double clip_low() const {
    return clip_ratio_low ? at_least_zero("clip_ratio_low", *clip_ratio_low)
                          : at_least_zero("clip_ratio", clip_ratio);
  }
  double clip_high() const {
    return clip_ratio_high ? at_least_zero("clip_ratio_high", *clip_ratio_high)
                           : at_least_zero("clip_ratio", clip_ratio);
  }
};

// Calls fn with the token loss of a mode; before it, for the two losses that choose tokens by
// covariance, choose with their key. `by_token`: the clip ratios are those of each token.
template <class T, class Choose, class Fn>
void with_policy_loss(LossMode mode, const PolicyLossNumbers& numbers, bool by_token, Choose choose,
                      Fn fn) {
  const auto scalar = [](double value) { return static_cast<T>(value); };
  const auto ratio_low = [&] { return scalar(1.0 - numbers.clip_low()); };
  const auto ratio_high = [&] { return scalar(1.0 + numbers.clip_high()); };
  const auto dual_clip = [&](double bound) {
    return scalar(above(bound, "clip_ratio_c", numbers.clip_ratio_c));
  };
  // Calls then with a loss that clips.
  const auto clipping = [&](const auto& loss, const auto& then) {
    by_token ? then(ClippedByToken<T, std::decay_t<decltype(loss)>>{loss}) : then(loss);
  };
  switch (mode) {
    case LossMode::kVanilla:
      return clipping(VanillaLoss<T>{ratio_low(), ratio_high(), dual_clip(1)}, fn);
    case LossMode::kGpg: return fn(GpgLoss<T>{});
    case LossMode::kClipCov:
      above(0, "clip_cov_ratio", numbers.clip_cov_ratio);
      check(numbers.clip_cov_lb < numbers.clip_cov_ub, "clip_cov_lb is ", numbers.clip_cov_lb,
            "; it must be below clip_cov_ub, ", numbers.clip_cov_ub);
      return clipping(ClipCovLoss<T>{ratio_low(), ratio_high()}, [&](const auto& loss) {
        using Loss = std::decay_t<decltype(loss)>;
        choose(ClipCovKey<T, Loss>{loss, scalar(numbers.clip_cov_lb), scalar(numbers.clip_cov_ub),
                                   numbers.clip_cov_ratio});
        fn(loss);
      });
    case LossMode::kKlCov:
      check(numbers.kl_cov_ratio > 0 && numbers.kl_cov_ratio <= 1, "kl_cov_ratio is ",
            numbers.kl_cov_ratio, "; it must be in (0, 1]");
      choose(KlCovKey<T>{numbers.kl_cov_ratio});
      return fn(KlCovLoss<T>{scalar(at_least_zero("ppo_kl_coef", numbers.ppo_kl_coef))});
    case LossMode::kGspo: return clipping(GspoLoss<T>{ratio_low(), ratio_high()}, fn);
    case LossMode::kGeoMean:
      return clipping(GeoMeanLoss<T>{scalar(-numbers.clip_low()), scalar(numbers.clip_high())}, fn);
    case LossMode::kDppoTv:
      return clipping(
          DppoTvLoss<T>{scalar(numbers.clip_low()), scalar(numbers.clip_high()), dual_clip(0)}, fn);
    case LossMode::kDppoKl:
      return clipping(
          DppoKlLoss<T>{scalar(numbers.clip_low()), scalar(numbers.clip_high()), dual_clip(0)}, fn);
    case LossMode::kSapo:
      return fn(SapoLoss<T>{scalar(above(0, "tau_pos", numbers.tau_pos)),
                            scalar(above(0, "tau_neg", numbers.tau_neg))});
    case LossMode::kDro:
      check(numbers.dro_beta.has_value(), "dro_beta is None; loss_mode 'dro' needs it");
      return fn(DroLoss<T>{scalar(above(0, "dro_beta", *numbers.dro_beta))});
    case LossMode::kCispo: return clipping(CispoLoss<T>{ratio_low(), ratio_high()}, fn);
  }
}

template <class Backend>
LossTuple policy_loss_forward(
    const Tensor& log_prob, const Tensor& old_log_prob, const Tensor& advantages,
    const Tensor& response_mask, std::optional<Tensor> entropy_mask,
    std::optional<Tensor> covariance_mask, std::optional<Tensor> rollout_is_weights,
    std::optional<Tensor> batch_num_tokens, std::optional<Tensor> global_batch_size,
    std::optional<Tensor> seed, std::optional<Tensor> token_clip_ratio_low,
    std::optional<Tensor> token_clip_ratio_high, std::string loss_mode, std::string normalize,
    double clip_ratio, std::optional<double> clip_ratio_low, std::optional<double> clip_ratio_high,
    double clip_ratio_c, double clip_cov_ratio, double clip_cov_lb, double clip_cov_ub,
    double kl_cov_ratio, double ppo_kl_coef, double tau_pos, double tau_neg,
    std::optional<double> dro_beta, std::string loss_agg_mode, int64_t dp_size,
    std::optional<double> loss_scale_factor) {
  const LossMode mode = parse_choice<LossMode>("loss_mode", loss_mode,
                                               {{"vanilla", LossMode::kVanilla},
                                                {"gpg", LossMode::kGpg},
                                                {"clip_cov", LossMode::kClipCov},
                                                {"kl_cov", LossMode::kKlCov},
                                                {"gspo", LossMode::kGspo},
                                                {"geo_mean", LossMode::kGeoMean},
                                                {"dppo_tv", LossMode::kDppoTv},
                                                {"dppo_kl", LossMode::kDppoKl},
                                                {"sapo", LossMode::kSapo},
                                                {"dro", LossMode::kDro},
                                                {"cispo", LossMode::kCispo}});
  TokenTensors tokens("log_prob", log_prob, "response_mask", response_mask);
  tokens.old_log_prob = tokens.floats_of("old_log_prob", old_log_prob);
  tokens.advantages = tokens.floats_of("advantages", advantages);
  if (rollout_is_weights) {
    tokens.weights = tokens.floats_of("rollout_is_weights", *rollout_is_weights);
  }
  if (entropy_mask) {
    tokens.entropy_mask = tokens.mask_of("entropy_mask", *entropy_mask);
    // These two aggregate over the sequence, and do not apply entropy_mask.
    if (mode == LossMode::kGspo || mode == LossMode::kGeoMean) tokens.entropy_mask.reset();
  }
  if (covariance_mask) {
    check(mode == LossMode::kClipCov || mode == LossMode::kKlCov, "covariance_mask is given and ",
          "loss_mode is '", loss_mode, "'; it must be clip_cov or kl_cov");
    covariance_mask = tokens.mask_of("covariance_mask", *covariance_mask);
  }
  // As in verl, sapo is always seq-mean-token-mean, and geo_mean is always the mean over rows.
  // Their loss_agg_mode has no effect, but a misspelt name is still an error.
  parse_aggregation(loss_agg_mode);
  if (mode == LossMode::kSapo) loss_agg_mode = "seq-mean-token-mean";
  if (mode == LossMode::kGeoMean) loss_agg_mode = "token-sum";
  const CheckedNormalization normalization(
      {loss_agg_mode, normalize, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor},
      tokens);
  PolicyLossNumbers numbers{clip_ratio,     clip_ratio_low, clip_ratio_high, clip_ratio_c,
                            clip_cov_ratio, clip_cov_lb,    clip_cov_ub,     kl_cov_ratio,
                            ppo_kl_coef,    tau_pos,        tau_neg,         dro_beta};

  const bool by_token = token_clip_ratio_low.has_value() || token_clip_ratio_high.has_value();
  if (by_token) {
    check(!(token_clip_ratio_low && clip_ratio_low) && !(token_clip_ratio_high && clip_ratio_high),
          "a clip ratio is given as a number and as a tensor; it must be one of them");
    tokens.clip_low = token_clip_ratio_low
                          ? tokens.clip_ratios_of("clip_ratio_low", *token_clip_ratio_low)
                          : tokens.filled(numbers.clip_low());
    tokens.clip_high = token_clip_ratio_high
                           ? tokens.clip_ratios_of("clip_ratio_high", *token_clip_ratio_high)
                           : tokens.filled(numbers.clip_high());
    numbers.clip_ratio_low = numbers.clip_ratio_high = 0;  // no loss uses them then
  }

  const LossOutputs out(tokens);
  dispatch_accumulate(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    TokenInputs<T> inputs = tokens.inputs<T>();
    std::optional<Tensor> sequence;
    if (mode == LossMode::kGspo) {
      sequence = new_tensor(tokens.values, {tokens.rows}, tokens.dtype);
      Backend::sequence_log_ratios(inputs, *sequence);
      inputs.sequence_log_ratio = const_data<T>(*sequence);
    }
    const auto choose = [&](const auto& key) {
      if (!seed) {
        seed = new_zero_tensor(tokens.values, {}, ScalarType::Long);
      }
      check(seed->numel() == 1 && is_integer(seed->scalar_type()), "seed is a ",
            dtype_name(seed->scalar_type()), " tensor of shape ", shape_name(shape_of(*seed)),
            "; it must be one integer");
      check_same_device("seed", *seed, "log_prob", tokens.values);
      if (!covariance_mask) {
        covariance_mask = new_tensor(tokens.values, {tokens.rows, tokens.cols}, ScalarType::Byte);
        Backend::choose(key, inputs, as_contiguous(*seed, ScalarType::Long), *covariance_mask);
      }
      inputs.chosen = const_data<uint8_t>(covariance_mask);
    };
    with_policy_loss<T>(mode, numbers, by_token, choose, [&](const auto& token_loss) {
      Backend::run(token_loss, inputs, normalization, out);
    });
  });
  return out.tuple();
}

}  // namespace entropy_rl
