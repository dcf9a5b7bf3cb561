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
template <class T>
ENTROPY_RL_HD inline TokenResult<T> clipped_surrogate(T advantage, T ratio, T ratio_gradient, T low,
                                                      T high) {
  const T loss = -advantage * ratio;
  const T clipped_loss = -advantage * clamped(ratio, low, high);
  const bool clipped = clipped_loss > loss;
  TokenResult<T> out{};
  out.loss = clipped ? clipped_loss : loss;
  out.gradient = clipped ? T(0) : -advantage * ratio_gradient;
  out.clipped = clipped ? T(1) : T(0);
  return out;
}

// PPO with dual clip: max(-A r, -A clip(r, low, high)), and at most -A c where A < 0.
// arXiv 1707.06347, 1912.09729.
template <class T>
struct VanillaLoss {
  T low, high, dual_clip;

  ENTROPY_RL_HD void set_clip_ratios(T below, T above) {
    low = T(1) - below;
    high = T(1) + above;
  }

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
    TokenResult<T> out =
        clipped_surrogate(token.advantage, r.ratio, r.inside ? r.ratio : T(0), low, high);
    const T bound = -token.advantage * dual_clip;
    const bool bounded = (token.advantage < 0) & (out.loss > bound);
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
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    TokenResult<T> out{};
    out.loss = -token.log_prob * token.advantage;
    out.gradient = -token.advantage;
    return out;
  }
};

// max(-A r, -A clip(r, low, high)), without loss or gradient where chosen. arXiv 2505.22617.
template <class T>
struct ClipCovLoss {
  T low, high;

  ENTROPY_RL_HD void set_clip_ratios(T below, T above) {
    low = T(1) - below;
    high = T(1) + above;
  }
  // By value: the host's loops do not vectorise where an address is taken.
  ENTROPY_RL_HD ClipCovLoss at(const Token<T>&) const { return *this; }

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const T ratio = ratio_exp(d);
    TokenResult<T> out = clipped_surrogate(token.advantage, ratio, ratio, low, high);
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

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const T loss = -token.advantage * ratio_exp(d);
    const T sign = d > 0 ? T(1) : d < 0 ? T(-1) : T(0);
    TokenResult<T> out{};
    out.kl = d < 0 ? -d : d;
    out.loss = token.chosen ? loss + kl_coefficient * out.kl : loss;
    out.gradient = token.chosen ? loss + kl_coefficient * sign : loss;
    return out;
  }
};

// max(-A s, -A clip(s, low, high)), where s is the geometric mean of r over the sequence and has
// the gradient of the token's own r. arXiv 2507.18071.
template <class T>
struct GspoLoss {
  T low, high;

  ENTROPY_RL_HD void set_clip_ratios(T below, T above) {
    low = T(1) - below;
    high = T(1) + above;
  }

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T log_ratio = token.sequence_log_ratio;
    const bool inside = log_ratio <= T(10);
    const T ratio = ratio_exp(log_ratio > T(10) ? T(10) : log_ratio);
    TokenResult<T> out =
        clipped_surrogate(token.advantage, ratio, inside ? ratio : T(0), low, high);
    out.kl = token.old_log_prob - token.log_prob;
    return out;
  }
};

// The loss of a sequence is -mean(A) * geometric mean of r, where each token's d is clipped to
// [low, high] on the side to which its advantage pushes it. A token's `loss` here is its clipped d,
// from which sequence_loss computes the loss. arXiv 2507.20673.
template <class T>
struct GeoMeanLoss {
  T low, high;

  ENTROPY_RL_HD void set_clip_ratios(T below, T above) {
    low = -below;
    high = above;
  }

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const T up = token.advantage > 0 ? T(1) : T(0);
    const T down = token.advantage < 0 ? T(1) : T(0);
    const T sign = up - down;
    const T bound = token.advantage > 0 ? high : low;
    const bool clipped = sign * d > sign * bound;
    const T outside = within(d, low, high) ? T(0) : T(1);
    TokenResult<T> out{};
    out.loss = clipped ? bound : sign * sign * d;
    out.gradient = clipped ? T(0) : sign * sign;
    out.clipped = outside * up;
    out.clipped_lower = outside * down;
    out.kl = -d;
    return out;
  }
};

template <class T>
inline constexpr bool kIsSequenceLoss<GeoMeanLoss<T>> = true;

// -A min(r, c) log_prob, where r has no gradient; 0 where the token's probability has already moved
// by more than `low` or `high` in the direction of its advantage. arXiv 2602.04879.
template <class T>
ENTROPY_RL_HD inline TokenResult<T> truncated_reinforce(const Token<T>& token, T truncation,
                                                        bool valid) {
  const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
  const T ratio = r.ratio > truncation ? truncation : r.ratio;
  TokenResult<T> out{};
  out.loss = valid ? -token.advantage * ratio * token.log_prob : T(0);
  out.gradient = valid ? -token.advantage * ratio : T(0);
  out.clipped = valid ? T(0) : T(1);
  out.clipped_lower = valid & (r.ratio > truncation) ? T(1) : T(0);
  out.kl = -r.log_ratio;
  return out;
}

// Movement is the total variation distance over (this token, any other token).
template <class T>
struct DppoTvLoss {
  T low, high, truncation;

  ENTROPY_RL_HD void set_clip_ratios(T below, T above) {
    low = below;
    high = above;
  }

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T moved = ratio_exp(token.log_prob) - ratio_exp(token.old_log_prob);
    const bool up = token.advantage > 0;
    const bool down = !up;
    const bool valid = (up & (moved <= high)) | (down & (moved >= -low));
    return truncated_reinforce(token, truncation, valid);
  }
};

// Movement is the KL divergence over (this token, any other token).
template <class T>
struct DppoKlLoss {
  T low, high, truncation;

  ENTROPY_RL_HD void set_clip_ratios(T below, T above) {
    low = below;
    high = above;
  }

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T p = ratio_exp(token.log_prob);
    const T q = ratio_exp(token.old_log_prob);
    const T epsilon = T(1e-8);
    const T moved = q * (token.old_log_prob - token.log_prob) +
                    (T(1) - q) * ratio_log((T(1) - q + epsilon) / (T(1) - p + epsilon));
    const bool up = token.advantage > 0;
    const bool down = !up;
    const bool valid = (up & ((moved <= high) | (p <= q))) | (down & ((moved <= low) | (p >= q)));
    return truncated_reinforce(token, truncation, valid);
  }
};

// -A sigmoid(tau (r - 1)) 4 / tau, with one tau for A > 0 and another for A <= 0. arXiv 2511.20347.
template <class T>
struct SapoLoss {
  T tau_positive, tau_negative;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
    const T tau = token.advantage > 0 ? tau_positive : tau_negative;
    const T x = tau * (r.ratio - T(1));
    // e^-|x| cannot overflow.
    const T e = ratio_exp(x < 0 ? x : -x);
    const T larger = T(1) / (T(1) + e);
    const T sigmoid = x < 0 ? e * larger : larger;
    TokenResult<T> out{};
    out.loss = -token.advantage * sigmoid * (T(4) / tau);
    out.gradient = r.inside ? T(-4) * token.advantage * e * larger * larger * r.ratio : T(0);
    out.kl = -r.log_ratio;
    return out;
  }
};

// -(A log_prob - beta / 2 d^2). arXiv 2405.19107.
template <class T>
struct DroLoss {
  T beta;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    TokenResult<T> out{};
    out.loss = -(token.log_prob * token.advantage - T(0.5) * beta * d * d);
    out.gradient = -(token.advantage - beta * d);
    out.kl = -d;
    return out;
  }
};

// -clip(r, low, high) A log_prob, where the clipped r has no gradient. arXiv 2506.13585.
template <class T>
struct CispoLoss {
  T low, high;

  ENTROPY_RL_HD void set_clip_ratios(T below, T above) {
    low = T(1) - below;
    high = T(1) + above;
  }

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
    const T ratio = clamped(r.ratio, low, high);
    TokenResult<T> out{};
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
  ENTROPY_RL_HD Loss at(const Token<T>& token) const {
    Loss own = loss;
    own.set_clip_ratios(token.clip_low, token.clip_high);
    return own;
  }
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T largest = std::numeric_limits<T>::max();
    const bool valid =
        within(token.clip_low, T(0), largest) & within(token.clip_high, T(0), largest);
    TokenResult<T> out = at(token)(token);
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
    const ClipCovLoss<T> own = loss.at(token);
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
