// KL penalties of one token against a reference policy, whose log-prob is the token's old_log_prob;
// host and device. d = log_prob - reference log_prob. A straight-through penalty has its own value
// and the gradient of k2, which is d: an unbiased estimate of the KL divergence's gradient.
// joschu.net/blog/kl-approx.html
#pragma once

#include "ratio.h"

namespace entropy_rl {

enum class KlPenalty { kK1, kAbs, kK2, kK3 };

// d
template <class T, bool straight_through>
struct K1Penalty {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    TokenResult<T> out{};
    out.loss = d;
    out.gradient = straight_through ? d : T(1);
    return out;
  }
};

// |d|
template <class T, bool straight_through>
struct AbsPenalty {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const T sign = d > 0 ? T(1) : d < 0 ? T(-1) : T(0);
    TokenResult<T> out{};
    out.loss = d < 0 ? -d : d;
    out.gradient = straight_through ? d : sign;
    return out;
  }
};

// d^2 / 2
template <class T>
struct K2Penalty {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    TokenResult<T> out{};
    out.loss = T(0.5) * d * d;
    out.gradient = d;
    return out;
  }
};

// e^-d + d - 1, d clamped to [-20, 20] and the result to [-10, 10]
template <class T, bool straight_through>
struct K3Penalty {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const ClampedRatio<T> r(-d);
    const T value = r.ratio - r.log_ratio - T(1);
    const bool inside = r.inside & within(value, T(-10), T(10));
    TokenResult<T> out{};
    out.loss = clamped(value, T(-10), T(10));
    out.gradient = straight_through ? d : inside ? T(1) - r.ratio : T(0);
    return out;
  }
};

}  // namespace entropy_rl
