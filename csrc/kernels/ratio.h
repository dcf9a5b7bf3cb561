// Probability ratios from log-probs, with the clamps that keep them finite; host and device.
// Here and in the losses, a Value is a number or on the host a vector (exp_log.h), so conditions
// are joined by & and |, and values are selected: && and || are branches, which vectors do not
// have.
#pragma once

#include "exp_log.h"
#include "token_loss_math.h"

namespace entropy_rl {

template <class Value>
ENTROPY_RL_HD inline Value ratio_exp(const Value& x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  if constexpr (sizeof(scalar_t<Value>) == sizeof(float)) {
    return x > 88.0f ? INFINITY : exp_vectorizable(x);
  } else {
    return each_lane(x, [](double lane) { return exp(lane); });
  }
#endif
}

// For x in [-20, 20], or NaN.
template <class Value>
ENTROPY_RL_HD inline Value bounded_ratio_exp(const Value& x) {
#if !defined(__CUDA_ARCH__)
  if constexpr (sizeof(scalar_t<Value>) == sizeof(float)) return exp_of_normal(x);
#endif
  return ratio_exp(x);
}

template <class Value>
ENTROPY_RL_HD inline Value ratio_log(const Value& x) {
#if defined(__CUDA_ARCH__)
  return log(x);
#else
  if constexpr (sizeof(scalar_t<Value>) == sizeof(float)) {
    return log_vectorizable(x);
  } else {
    return each_lane(x, [](double lane) { return log(lane); });
  }
#endif
}

// NaN stays NaN, since comparisons with it are false.
template <class Value, class Low, class High>
ENTROPY_RL_HD inline Value clamped(const Value& x, const Low& low, const High& high) {
  return x < low ? low : x > high ? high : x;
}
template <class Value, class Low, class High>
ENTROPY_RL_HD inline mask_t<Value> within(const Value& x, const Low& low, const High& high) {
  return (x >= low) & (x <= high);
}

// d clamped to [-20, 20], its exponential, and whether d is inside, since only then is there a
// gradient.
template <class Value>
struct ClampedRatio {
  using T = scalar_t<Value>;
  Value log_ratio;
  Value ratio;
  mask_t<Value> inside;

  ENTROPY_RL_HD explicit ClampedRatio(const Value& d)
      : log_ratio(clamped(d, T(-20), T(20))),
        ratio(bounded_ratio_exp(log_ratio)),
        inside(within(d, T(-20), T(20))) {}
};

}  // namespace entropy_rl
