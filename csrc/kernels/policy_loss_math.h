// Policy losses of one token, as verl 0.9.1 has them; host and device.
//   d = log_prob - old_log_prob,  r = e^d,  A = advantage
// Each struct states its formula. Before the pass over the tokens, clip_cov and kl_cov choose
// tokens by their covariance, and gspo needs the mean d of each row: a separate pass sums Moments
// for both.
#pragma once

#include <limits>

#include "ratio.h"
#include "selection.h"

namespace entropy_rl {

enum class LossMode {
  kVanilla,
  kGpg,
  kClipCov,
  kKlCov,
  kGspo,
  kGeoMean,
  kDppoTv,
  kDppoKl,
  kSapo,
  kDro,
  kCispo
};

// max(-A r, -A clip(r, low, high)), given d r / d log_prob.
template <class Value, class Bound>
ENTROPY_RL_HD inline TokenResult<Value> clipped_surrogate(const Value& advantage,
                                                          const Value& ratio,
                                                          const Value& ratio_gradient,
                                                          const Bound& low, const Bound& high) {
  using T = scalar_t<Value>;
  const Value loss = -advantage * ratio;
  const Value clipped_loss = -advantage * clamped(ratio, low, high);
  const mask_t<Value> clipped = clipped_loss > loss;
  TokenResult<Value> out{};
  out.loss = clipped ? clipped_loss : loss;
  out.gradient = clipped ? T(0) : -advantage * ratio_gradient;
  out.clipped = clipped ? T(1) : T(0);
  return out;
}

// PPO with dual clip: max(-A r, -A clip(r, low, high)), and at most -A c where A < 0.
// arXiv 1707.06347, 1912.09729.
template <class T, class Bound = T>
struct VanillaLoss {
  Bound low, high;
  T dual_clip;

  template <class Value>
  ENTROPY_RL_HD VanillaLoss<T, Value> with_clip_ratios(const Value& below,
                                                       const Value& above) const {
    return {T(1) - below, T(1) + above, dual_clip};
  }

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const ClampedRatio<Value> r(token.log_prob - token.old_log_prob);
    TokenResult<Value> out =
        clipped_surrogate(token.advantage, r.ratio, r.inside ? r.ratio : T(0), low, high);
    const Value bound = -token.advantage * dual_clip;
    const mask_t<Value> bounded = (token.advantage < T(0)) & (out.loss > bound);
    out.loss = bounded ? bound : out.loss;
    out.gradient = bounded ? T(0) : out.gradient;
    out.clipped_lower = bounded ? T(1) : T(0);
    out.kl = -r.log_ratio;
    return out;
  }
};

// -A log_prob. arXiv 2504.02546.
template <class T>
struct GpgLoss {
  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    TokenResult<Value> out{};
    out.loss = -token.log_prob * token.advantage;
    out.gradient = -token.advantage;
    return out;
  }
};

// max(-A r, -A clip(r, low, high)), without loss or gradient where chosen. arXiv 2505.22617.
template <class T, class Bound = T>
struct ClipCovLoss {
  Bound low, high;

  template <class Value>
  ENTROPY_RL_HD ClipCovLoss<T, Value> with_clip_ratios(const Value& below,
                                                       const Value& above) const {
    return {T(1) - below, T(1) + above};
  }
  // By value: the host's loop over keys does not vectorise where an address is taken.
  template <class Value>
  ENTROPY_RL_HD ClipCovLoss at(const Token<Value>&) const {
    return *this;
  }

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    const Value ratio = ratio_exp(d);
    TokenResult<Value> out = clipped_surrogate(token.advantage, ratio, ratio, low, high);
    out.loss = token.chosen ? T(0) : out.loss;
    out.gradient = token.chosen ? T(0) : out.gradient;
    out.clipped = token.chosen ? T(1) : T(0);
    out.kl = -d;
    return out;
  }
};

// -A r, and |d| times a coefficient where chosen. arXiv 2505.22617.
template <class T>
struct KlCovLoss {
  T kl_coefficient;

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    const Value loss = -token.advantage * ratio_exp(d);
    const Value sign = d > T(0) ? T(1) : d < T(0) ? T(-1) : T(0);
    TokenResult<Value> out{};
    out.kl = d < T(0) ? -d : d;
    out.loss = token.chosen ? loss + kl_coefficient * out.kl : loss;
    out.gradient = token.chosen ? loss + kl_coefficient * sign : loss;
    return out;
  }
};

// max(-A s, -A clip(s, low, high)), where s is the geometric mean of r over the sequence and has
// the gradient of the token's own r. arXiv 2507.18071.
template <class T, class Bound = T>
struct GspoLoss {
  Bound low, high;

  template <class Value>
  ENTROPY_RL_HD GspoLoss<T, Value> with_clip_ratios(const Value& below, const Value& above) const {
    return {T(1) - below, T(1) + above};
  }

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value log_ratio = token.sequence_log_ratio;
    const mask_t<Value> inside = log_ratio <= T(10);
    const Value ratio = ratio_exp(log_ratio > T(10) ? T(10) : log_ratio);
    TokenResult<Value> out =
        clipped_surrogate(token.advantage, ratio, inside ? ratio : T(0), low, high);
    out.kl = token.old_log_prob - token.log_prob;
    return out;
  }
};

// The loss of a sequence is -mean(A) * geometric mean of r, where each token's d is clipped to
// [low, high] on the side to which its advantage pushes it. A token's `loss` here is its clipped d,
// from which sequence_loss computes the loss. arXiv 2507.20673.
template <class T, class Bound = T>
struct GeoMeanLoss {
  Bound low, high;

  template <class Value>
  ENTROPY_RL_HD GeoMeanLoss<T, Value> with_clip_ratios(const Value& below,
                                                       const Value& above) const {
    return {-below, above};
  }

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    const Value up = token.advantage > T(0) ? T(1) : T(0);
    const Value down = token.advantage < T(0) ? T(1) : T(0);
    const Value sign = up - down;
    const Value bound = token.advantage > T(0) ? high : low;
    const mask_t<Value> clipped = sign * d > sign * bound;
    const Value outside = within(d, low, high) ? T(0) : T(1);
    TokenResult<Value> out{};
    out.loss = clipped ? bound : sign * sign * d;
    out.gradient = clipped ? T(0) : sign * sign;
    out.clipped = outside * up;
    out.clipped_lower = outside * down;
    out.kl = -d;
    return out;
  }
};

template <class T, class Bound>
inline constexpr bool kIsSequenceLoss<GeoMeanLoss<T, Bound>> = true;

// -A min(r, c) log_prob, where r has no gradient; 0 where the token's probability has already moved
// by more than `low` or `high` in the direction of its advantage. arXiv 2602.04879.
template <class Value>
ENTROPY_RL_HD inline TokenResult<Value> truncated_reinforce(const Token<Value>& token,
                                                            scalar_t<Value> truncation,
                                                            const mask_t<Value>& valid) {
  using T = scalar_t<Value>;
  const ClampedRatio<Value> r(token.log_prob - token.old_log_prob);
  const Value ratio = r.ratio > truncation ? truncation : r.ratio;
  TokenResult<Value> out{};
  out.loss = valid ? -token.advantage * ratio * token.log_prob : T(0);
  out.gradient = valid ? -token.advantage * ratio : T(0);
  out.clipped = valid ? T(0) : T(1);
  out.clipped_lower = valid & (r.ratio > truncation) ? T(1) : T(0);
  out.kl = -r.log_ratio;
  return out;
}

// Movement is the total variation distance over (this token, any other token).
template <class T, class Bound = T>
struct DppoTvLoss {
  Bound low, high;
  T truncation;

  template <class Value>
  ENTROPY_RL_HD DppoTvLoss<T, Value> with_clip_ratios(const Value& below,
                                                      const Value& above) const {
    return {below, above, truncation};
  }

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value moved = ratio_exp(token.log_prob) - ratio_exp(token.old_log_prob);
    const mask_t<Value> up = token.advantage > T(0);
    const mask_t<Value> down = !up;
    const mask_t<Value> valid = (up & (moved <= high)) | (down & (moved >= -low));
    return truncated_reinforce(token, truncation, valid);
  }
};

// Movement is the KL divergence over (this token, any other token).
template <class T, class Bound = T>
struct DppoKlLoss {
  Bound low, high;
  T truncation;

  template <class Value>
  ENTROPY_RL_HD DppoKlLoss<T, Value> with_clip_ratios(const Value& below,
                                                      const Value& above) const {
    return {below, above, truncation};
  }

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value p = ratio_exp(token.log_prob);
    const Value q = ratio_exp(token.old_log_prob);
    const T epsilon = T(1e-8);
    const Value moved = q * (token.old_log_prob - token.log_prob) +
                        (T(1) - q) * ratio_log((T(1) - q + epsilon) / (T(1) - p + epsilon));
    const mask_t<Value> up = token.advantage > T(0);
    const mask_t<Value> down = !up;
    const mask_t<Value> valid =
        (up & ((moved <= high) | (p <= q))) | (down & ((moved <= low) | (p >= q)));
    return truncated_reinforce(token, truncation, valid);
  }
};

// -A sigmoid(tau (r - 1)) 4 / tau, with one tau for A > 0 and another for A <= 0. arXiv 2511.20347.
template <class T>
struct SapoLoss {
  T tau_positive, tau_negative;

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const ClampedRatio<Value> r(token.log_prob - token.old_log_prob);
    const Value tau = token.advantage > T(0) ? tau_positive : tau_negative;
    const Value x = tau * (r.ratio - T(1));
    // e^-|x| cannot overflow.
    const Value e = ratio_exp(x < T(0) ? x : -x);
    const Value larger = T(1) / (T(1) + e);
    const Value sigmoid = x < T(0) ? e * larger : larger;
    TokenResult<Value> out{};
    const Value factor = token.advantage > T(0) ? T(4) / tau_positive : T(4) / tau_negative;
    out.loss = -token.advantage * sigmoid * factor;
    out.gradient = r.inside ? T(-4) * token.advantage * e * larger * larger * r.ratio : T(0);
    out.kl = -r.log_ratio;
    return out;
  }
};

// -(A log_prob - beta / 2 d^2). arXiv 2405.19107.
template <class T>
struct DroLoss {
  T beta;

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    TokenResult<Value> out{};
    out.loss = -(token.log_prob * token.advantage - T(0.5) * beta * d * d);
    out.gradient = -(token.advantage - beta * d);
    out.kl = -d;
    return out;
  }
};

// -clip(r, low, high) A log_prob, where the clipped r has no gradient. arXiv 2506.13585.
template <class T, class Bound = T>
struct CispoLoss {
  Bound low, high;

  template <class Value>
  ENTROPY_RL_HD CispoLoss<T, Value> with_clip_ratios(const Value& below, const Value& above) const {
    return {T(1) - below, T(1) + above};
  }

  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const ClampedRatio<Value> r(token.log_prob - token.old_log_prob);
    const Value ratio = clamped(r.ratio, low, high);
    TokenResult<Value> out{};
    out.loss = -ratio * token.advantage * token.log_prob;
    out.gradient = -ratio * token.advantage;
    out.clipped = r.ratio != ratio ? T(1) : T(0);
    out.kl = -r.log_ratio;
    return out;
  }
};

// ---- Clip ratios of each token ----

// A loss that clips, with the clip ratios of each token in place of its own two numbers; a separate
// type, so that losses with numbers load nothing more. A clip ratio below 0, infinite or NaN gives
// NaN.
template <class T, class Loss>
struct ClippedByToken {
  Loss loss;

  // The loss that a token has.
  template <class Value>
  ENTROPY_RL_HD auto at(const Token<Value>& token) const {
    return loss.with_clip_ratios(token.clip_low, token.clip_high);
  }
  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const T largest = std::numeric_limits<T>::max();
    const mask_t<Value> valid =
        within(token.clip_low, T(0), largest) & within(token.clip_high, T(0), largest);
    TokenResult<Value> out = at(token)(token);
    out.loss = valid ? out.loss : T(NAN);
    out.gradient = valid ? out.gradient : T(NAN);
    return out;
  }
};

template <class T, class Loss>
inline constexpr bool kReadsClipRatios<ClippedByToken<T, Loss>> = true;

template <class T, class Loss>
inline constexpr bool kIsSequenceLoss<ClippedByToken<T, Loss>> = kIsSequenceLoss<Loss>;

// ---- Sums before the pass ----

// Sums over response tokens.
template <class T>
struct Moments {
  T response;
  T log_ratio;
  T log_prob;
  T advantage;

  template <class U>
  ENTROPY_RL_HD Moments& operator+=(const Moments<U>& other) {
    response += static_cast<T>(other.response);
    log_ratio += static_cast<T>(other.log_ratio);
    log_prob += static_cast<T>(other.log_prob);
    advantage += static_cast<T>(other.advantage);
    return *this;
  }
};

// Mean d of a row, the log of gspo's sequence ratio.
ENTROPY_RL_HD inline double sequence_log_ratio(const Moments<double>& row) {
  return row.log_ratio / (row.response > 1 ? row.response : 1);
}

// ---- Choice by covariance: clip_cov and kl_cov ----

// What the choice needs of the batch.
struct CovarianceMoments {
  double mean_log_prob;
  double mean_advantage;
  int64_t count;  // how many tokens to choose: max(1, int(ratio * response tokens))

  ENTROPY_RL_HD CovarianceMoments(const Moments<double>& batch, double ratio, double epsilon)
      : mean_log_prob(0), mean_advantage(0), count(static_cast<int64_t>(ratio * batch.response)) {
    if (count < 1) count = 1;
    if (batch.response == 0) return;
    mean_log_prob = batch.log_prob / (batch.response + epsilon);
    mean_advantage = batch.advantage / (batch.response + epsilon);
  }
  CovarianceMoments() = default;

  template <class T>
  ENTROPY_RL_HD T covariance(T log_prob, T advantage) const {
    return (advantage - static_cast<T>(mean_advantage)) *
           (log_prob - static_cast<T>(mean_log_prob));
  }
};

// A well-mixed 64-bit word: the finaliser of splitmix64.
ENTROPY_RL_HD inline uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Keys of which the largest are chosen (selection.h). Tokens that may not be chosen have
// kIneligibleKey.

// clip_cov: random keys for the unclipped tokens whose covariance lies between two bounds.
template <class T, class Loss = ClipCovLoss<T>>
struct ClipCovKey {
  using Key = uint32_t;
  Loss loss;
  T lower, upper;
  double ratio;
  static constexpr double kEpsilon = kCountEpsilon;

  ENTROPY_RL_HD Key operator()(const Token<T>& token, const CovarianceMoments& moments,
                               uint64_t seed, int64_t index) const {
    const T ratio = ratio_exp(token.log_prob - token.old_log_prob);
    const auto own = loss.at(token);
    const bool clipped =
        clipped_surrogate(token.advantage, ratio, ratio, own.low, own.high).clipped != T(0);
    const T covariance = moments.covariance(token.log_prob, token.advantage);
    const bool eligible = !clipped & (covariance > lower) & (covariance < upper);
    const Key drawn = static_cast<Key>(mixed(mixed(seed) + static_cast<uint64_t>(index)) >> 32);
    // A product, because the compiler makes a branch of a selection here.
    static_assert(kIneligibleKey<Key> == 0);
    return static_cast<Key>(eligible) * (drawn + static_cast<Key>(drawn == 0));
  }
};

template <class T, class Loss>
inline constexpr bool kReadsClipRatios<ClipCovKey<T, Loss>> = kReadsClipRatios<Loss>;

// kl_cov: the covariance itself.
template <class T>
struct KlCovKey {
  using Key = selection_key_t<T>;
  double ratio;
  static constexpr double kEpsilon = 0;

  ENTROPY_RL_HD Key operator()(const Token<T>& token, const CovarianceMoments& moments, uint64_t,
                               int64_t) const {
    return selection_key(moments.covariance(token.log_prob, token.advantage));
  }
};

}  // namespace entropy_rl
