// Probability ratios from log-probs, with the clamps that keep them finite; host and device.
// Here and in the losses, conditions are joined by & and |, and values are selected: && and || are
// branches, and the host's loops would not vectorise.
#pragma once

#include "exp_log.h"
#include "token_loss_math.h"

namespace entropy_rl {

ENTROPY_RL_HD inline float ratio_exp(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  return x > 88.0f ? INFINITY : exp_vectorizable(x);
#endif
}
ENTROPY_RL_HD inline double ratio_exp(double x) { return exp(x); }

ENTROPY_RL_HD inline float ratio_log(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  return log_vectorizable(x);
#endif
}
ENTROPY_RL_HD inline double ratio_log(double x) { return log(x); }

// NaN stays NaN, since comparisons with it are false.
template <class T>
ENTROPY_RL_HD inline T clamped(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}
template <class T>
ENTROPY_RL_HD inline bool within(T x, T low, T high) {
  return (x >= low) & (x <= high);
}

// d clamped to [-20, 20], its exponential, and whether d is inside, since only then is there a
// gradient.
template <class T>
struct ClampedRatio {
  T log_ratio;
  T ratio;
  bool inside;

  ENTROPY_RL_HD explicit ClampedRatio(T d)
      : log_ratio(clamped(d, T(-20), T(20))),
        ratio(ratio_exp(log_ratio)),
        inside(within(d, T(-20), T(20))) {}
};

}  // namespace entropy_rl
