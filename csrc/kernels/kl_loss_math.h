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
  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    TokenResult<Value> out{};
    out.loss = d;
    out.gradient = straight_through ? d : Value{} + T(1);
    return out;
  }
};

// |d|
template <class T, bool straight_through>
struct AbsPenalty {
  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    const Value sign = d > T(0) ? T(1) : d < T(0) ? T(-1) : T(0);
    TokenResult<Value> out{};
    out.loss = d < T(0) ? -d : d;
    out.gradient = straight_through ? d : sign;
    return out;
  }
};

// d^2 / 2
template <class T>
struct K2Penalty {
  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    TokenResult<Value> out{};
    out.loss = T(0.5) * d * d;
    out.gradient = d;
    return out;
  }
};

// e^-d + d - 1, d clamped to [-20, 20] and the result to [-10, 10]
template <class T, bool straight_through>
struct K3Penalty {
  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    const Value d = token.log_prob - token.old_log_prob;
    const ClampedRatio<Value> r(-d);
    const Value value = r.ratio - r.log_ratio - T(1);
    const mask_t<Value> inside = r.inside & within(value, T(-10), T(10));
    TokenResult<Value> out{};
    out.loss = clamped(value, T(-10), T(10));
    out.gradient = straight_through ? d : inside ? T(1) - r.ratio : T(0);
    return out;
  }
};

}  // namespace entropy_rl
