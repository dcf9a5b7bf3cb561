// What the loss ops share in front of the kernels: the names of modes, the checks of arguments, the
// tensors that a kernel reads and writes, and the ops themselves. They are templates over a backend:
//
//   struct Backend {
//     // Writes all outputs of a token loss.
//     template <class T, class TokenLoss>
//     static void run(const TokenLoss&, const TokenInputs<T>&, const Normalization&, const LossOutputs&);
//     // Writes uint8 [rows, cols]: 1 for the response tokens that a covariance key chooses.
//     template <class T, class CovarianceKey>
//     static void choose(const CovarianceKey&, const TokenInputs<T>&, const Tensor& seed,
//                        const Tensor& chosen);
//   };
#pragma once

#include <tuple>

#include "checks.h"
#include "kernels/policy_loss.h"

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
    return at_least_zero("clip_ratio_low", clip_ratio_low.value_or(clip_ratio));
  }
  double clip_high() const {
    return at_least_zero("clip_ratio_high", clip_ratio_high.value_or(clip_ratio));
  }

  static double at_least_zero(const char* name, double value) {
    check(std::isfinite(value) && value >= 0, name, " is ", value,
          "; it must be a finite number, 0 or above");
    return value;
  }
  static double above(double bound, const char* name, double value) {
    check(std::isfinite(value) && value > bound, name, " is ", value,
          "; it must be a finite number above ", bound);
    return value;
  }
};

// What a call reads. Half-precision tensors are widened here: log-probs are float32 in practice.
struct TokenTensors {
  int64_t rows = 0;
  int64_t cols = 0;
  ScalarType dtype;  // float32 or float64
  Tensor values;
  Tensor response_mask;
  std::optional<Tensor> old_log_prob;
  std::optional<Tensor> advantages;
  std::optional<Tensor> weights;
  std::optional<Tensor> entropy_mask;

  TokenTensors(const char* values_name, const Tensor& values_in, const char* mask_name,
               const Tensor& mask)
      : dtype(accumulate_dtype(values_in.scalar_type())),
        values(values_in),
        response_mask(mask),
        name_(values_name) {
    check_floating(name_, values);
    check(values.dim() == 2, name_, " has shape ", shape_name(shape_of(values)),
          "; it must be [rows, tokens]");
    rows = values.size(0);
    cols = values.size(1);
    response_mask = mask_of(mask_name, mask);
    values = as_contiguous(values_in, dtype);
  }

  Tensor floats_of(const char* name, const Tensor& tensor) const {
    check_floating(name, tensor);
    check_fits(name, tensor);
    return as_contiguous(tensor, dtype);
  }
  Tensor mask_of(const char* name, const Tensor& mask) const {
    check_fits(name, mask);
    return as_bool_mask(mask);
  }

  template <class T>
  TokenInputs<T> inputs() const {
    return {const_data<T>(values),
            const_data<T>(old_log_prob),
            const_data<T>(advantages),
            const_data<T>(weights),
            const_data<uint8_t>(response_mask),
            const_data<uint8_t>(entropy_mask),
            nullptr,
            rows,
            cols};
  }

 private:
  void check_fits(const char* name, const Tensor& tensor) const {
    check_shape(name, tensor, {rows, cols}, "the shape of the first argument");
    check_same_device(name, tensor, name_, values);
  }

  const char* name_;
};

// The four outputs of every loss op.
struct LossOutputs {
  Tensor loss;       // []
  Tensor metrics;    // [kMetrics]
  Tensor gradient;   // [rows, cols], d loss / d values but for the factor of the row
  Tensor row_scale;  // [rows], that factor

  explicit LossOutputs(const TokenTensors& in)
      : loss(torch::stable::new_empty(in.values, {}, in.dtype)),
        metrics(torch::stable::new_empty(in.values, {kMetrics}, in.dtype)),
        gradient(torch::stable::new_empty(in.values, {in.rows, in.cols}, in.dtype)),
        row_scale(torch::stable::new_empty(in.values, {in.rows}, in.dtype)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {loss, metrics, gradient, row_scale};
  }
};

// How a loss is averaged, as the caller says it.
struct AggregationArguments {
  std::string loss_agg_mode;
  std::string normalize;
  int64_t dp_size;
  std::optional<Tensor> batch_num_tokens;   // one number
  std::optional<Tensor> global_batch_size;  // one number
  std::optional<double> loss_scale_factor;
};

inline Aggregation parse_aggregation(const std::string& name) {
  return parse_choice<Aggregation>(
      "loss_agg_mode", name,
      {{"token-mean", Aggregation::kTokenMean},
       {"token-sum", Aggregation::kTokenSum},
       {"seq-mean-token-sum", Aggregation::kSeqMeanTokenSum},
       {"seq-mean-token-sum-norm", Aggregation::kSeqMeanTokenSumNorm},
       {"seq-mean-token-mean", Aggregation::kSeqMeanTokenMean}});
}

// Normalization with the tensor that its pointer points into.
struct CheckedNormalization : Normalization {
  std::optional<Tensor> divisor;

  CheckedNormalization(const AggregationArguments& in, const TokenTensors& tokens) {
    aggregation = parse_aggregation(in.loss_agg_mode);
    by_response =
        parse_choice<bool>("normalize", in.normalize, {{"selected", false}, {"response", true}});
    check(in.dp_size >= 1, "dp_size is ", in.dp_size, "; it must be 1 or above");
    dp_size = static_cast<double>(in.dp_size);
    scale_factor = PolicyLossNumbers::above(
        0, "loss_scale_factor",
        in.loss_scale_factor.value_or(static_cast<double>(std::max<int64_t>(tokens.cols, 1))));
    if (aggregation == Aggregation::kTokenMean) {
      set_divisor("batch_num_tokens", in.batch_num_tokens, in, tokens);
    } else if (aggregation != Aggregation::kTokenSum) {
      set_divisor("global_batch_size", in.global_batch_size, in, tokens);
    }
  }

 private:
  void set_divisor(const char* name, const std::optional<Tensor>& tensor,
                   const AggregationArguments& in, const TokenTensors& tokens) {
    check(tensor.has_value() || in.dp_size == 1, name, " is None and dp_size is ", in.dp_size, "; ",
          in.loss_agg_mode, " over several ranks needs it");
    if (!tensor) return;
    check(tensor->numel() == 1, name, " has shape ", shape_name(shape_of(*tensor)),
          "; it must be one number");
    check_same_device(name, *tensor, "the first argument", tokens.values);
    divisor = as_contiguous(*tensor, ScalarType::Double);
    given_divisor = const_data<double>(*divisor);
  }
};

// Calls fn with the token loss of a mode. The two losses that choose tokens by covariance are given
// to choose first, with their key.
template <class T, class Choose, class Fn>
void with_policy_loss(LossMode mode, const PolicyLossNumbers& numbers, Choose choose, Fn fn) {
  const auto scalar = [](double value) { return static_cast<T>(value); };
  const auto ratio_low = [&] { return scalar(1.0 - numbers.clip_low()); };
  const auto ratio_high = [&] { return scalar(1.0 + numbers.clip_high()); };
  const auto dual_clip = [&](double bound) {
    return scalar(numbers.above(bound, "clip_ratio_c", numbers.clip_ratio_c));
  };
  switch (mode) {
    case LossMode::kVanilla: return fn(VanillaLoss<T>{ratio_low(), ratio_high(), dual_clip(1)});
    case LossMode::kGpg: return fn(GpgLoss<T>{});
    case LossMode::kClipCov: {
      const ClipCovLoss<T> loss{ratio_low(), ratio_high()};
      numbers.above(0, "clip_cov_ratio", numbers.clip_cov_ratio);
      check(numbers.clip_cov_lb < numbers.clip_cov_ub, "clip_cov_lb is ", numbers.clip_cov_lb,
            "; it must be below clip_cov_ub, ", numbers.clip_cov_ub);
      choose(ClipCovKey<T>{loss, scalar(numbers.clip_cov_lb), scalar(numbers.clip_cov_ub),
                           numbers.clip_cov_ratio});
      return fn(loss);
    }
    case LossMode::kKlCov:
      check(numbers.kl_cov_ratio > 0 && numbers.kl_cov_ratio <= 1, "kl_cov_ratio is ",
            numbers.kl_cov_ratio, "; it must be in (0, 1]");
      choose(KlCovKey<T>{numbers.kl_cov_ratio});
      return fn(KlCovLoss<T>{scalar(numbers.at_least_zero("ppo_kl_coef", numbers.ppo_kl_coef))});
    case LossMode::kGspo: return fn(GspoLoss<T>{ratio_low(), ratio_high()});
    case LossMode::kGeoMean:
      return fn(GeoMeanLoss<T>{scalar(-numbers.clip_low()), scalar(numbers.clip_high())});
    case LossMode::kDppoTv:
      return fn(DppoTvLoss<T>{scalar(numbers.clip_low()), scalar(numbers.clip_high()),
                              dual_clip(0)});
    case LossMode::kDppoKl:
      return fn(DppoKlLoss<T>{scalar(numbers.clip_low()), scalar(numbers.clip_high()),
                              dual_clip(0)});
    case LossMode::kSapo:
      return fn(SapoLoss<T>{scalar(numbers.above(0, "tau_pos", numbers.tau_pos)),
                            scalar(numbers.above(0, "tau_neg", numbers.tau_neg))});
    case LossMode::kDro:
      check(numbers.dro_beta.has_value(), "dro_beta is None; loss_mode 'dro' needs it");
      return fn(DroLoss<T>{scalar(numbers.above(0, "dro_beta", *numbers.dro_beta))});
    case LossMode::kCispo: return fn(CispoLoss<T>{ratio_low(), ratio_high()});
  }
}

template <class T, class Fn>
void with_kl_penalty(KlPenalty penalty, bool straight_through, Fn fn) {
  switch (penalty) {
    case KlPenalty::kK1: return fn(K1Penalty<T>{straight_through});
    case KlPenalty::kAbs: return fn(AbsPenalty<T>{straight_through});
    case KlPenalty::kK2: return fn(K2Penalty<T>{});
    case KlPenalty::kK3: return fn(K3Penalty<T>{straight_through});
  }
}

template <class Fn>
void dispatch_accumulate(ScalarType dtype, Fn fn) {
  dtype == ScalarType::Double ? fn(double{}) : fn(float{});
}

using LossTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
LossTuple policy_loss_forward(
    const Tensor& log_prob, const Tensor& old_log_prob, const Tensor& advantages,
    const Tensor& response_mask, std::optional<Tensor> entropy_mask,
    std::optional<Tensor> rollout_is_weights, std::optional<Tensor> batch_num_tokens,
    std::optional<Tensor> global_batch_size, std::optional<Tensor> seed, std::string loss_mode,
    std::string normalize, double clip_ratio, std::optional<double> clip_ratio_low,
    std::optional<double> clip_ratio_high, double clip_ratio_c, double clip_cov_ratio,
    double clip_cov_lb, double clip_cov_ub, double kl_cov_ratio, double ppo_kl_coef, double tau_pos,
    double tau_neg, std::optional<double> dro_beta, std::string loss_agg_mode, int64_t dp_size,
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
    // They weigh a sequence as a whole.
    if (mode == LossMode::kGspo || mode == LossMode::kGeoMean) tokens.entropy_mask.reset();
  }
  // Two losses bring their own average: in verl, too, sapo is always seq-mean-token-mean and geo_mean
  // the mean over rows. A misspelt name is an error all the same.
  parse_aggregation(loss_agg_mode);
  if (mode == LossMode::kSapo) loss_agg_mode = "seq-mean-token-mean";
  if (mode == LossMode::kGeoMean) loss_agg_mode = "token-sum";
  const CheckedNormalization normalization({loss_agg_mode, normalize, dp_size, batch_num_tokens,
                                            global_batch_size, loss_scale_factor},
                                           tokens);
  const PolicyLossNumbers numbers{clip_ratio,     clip_ratio_low, clip_ratio_high, clip_ratio_c,
                                  clip_cov_ratio, clip_cov_lb,    clip_cov_ub,     kl_cov_ratio,
                                  ppo_kl_coef,    tau_pos,        tau_neg,         dro_beta};

  const LossOutputs out(tokens);
  dispatch_accumulate(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    TokenInputs<T> inputs = tokens.inputs<T>();
    std::optional<Tensor> chosen;
    const auto choose = [&](const auto& key) {
      if (!seed) {
        seed = torch::stable::new_zeros(tokens.values, {}, ScalarType::Long);
      }
      check(seed->numel() == 1 && is_integer(seed->scalar_type()), "seed is a ",
            dtype_name(seed->scalar_type()), " tensor of shape ", shape_name(shape_of(*seed)),
            "; it must be one integer");
      check_same_device("seed", *seed, "log_prob", tokens.values);
      chosen = torch::stable::new_empty(tokens.values, {tokens.rows, tokens.cols}, ScalarType::Byte);
      Backend::choose(key, inputs, as_contiguous(*seed, ScalarType::Long), *chosen);
      inputs.chosen = const_data<uint8_t>(*chosen);
    };
    with_policy_loss<T>(mode, numbers, choose, [&](const auto& token_loss) {
      Backend::run(token_loss, inputs, normalization, out);
    });
  });
  return out.tuple();
}

// `kl_loss_type`: kl, abs, mse, low_var_kl, their other names k1, k2, k3, and each with a final + for
// the straight-through form.
template <class Backend>
LossTuple kl_loss_forward(const Tensor& log_prob, const Tensor& ref_log_prob,
                          const Tensor& response_mask, std::optional<Tensor> batch_num_tokens,
                          std::optional<Tensor> global_batch_size, std::string kl_loss_type,
                          std::string loss_agg_mode, int64_t dp_size,
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
  const CheckedNormalization normalization({loss_agg_mode, "response", dp_size, batch_num_tokens,
                                            global_batch_size, loss_scale_factor},
                                           tokens);
  const LossOutputs out(tokens);
  dispatch_accumulate(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    with_kl_penalty<T>(type.first, type.second, [&](const auto& token_loss) {
      Backend::run(token_loss, tokens.inputs<T>(), normalization, out);
    });
  });
  return out.tuple();
}

template <class Backend>
LossTuple aggregate_forward(const Tensor& values, const Tensor& mask,
                            std::optional<Tensor> batch_num_tokens,
                            std::optional<Tensor> global_batch_size, std::string loss_agg_mode,
                            int64_t dp_size, std::optional<double> loss_scale_factor) {
  const TokenTensors tokens("values", values, "mask", mask);
  const CheckedNormalization normalization({loss_agg_mode, "response", dp_size, batch_num_tokens,
                                            global_batch_size, loss_scale_factor},
                                           tokens);
  const LossOutputs out(tokens);
  dispatch_accumulate(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    Backend::run(PlainValue<T>{}, tokens.inputs<T>(), normalization, out);
  });
  return out.tuple();
}

}  // namespace entropy_rl
