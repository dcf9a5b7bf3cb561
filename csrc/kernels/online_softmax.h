// One row of softmax(x / T) in a single pass, and how two partial rows combine.
//   d_j = (x_j - max) / T,  sum = sum_j e^d_j,  dot = sum_j e^d_j d_j
//   log p_y = d_y - log sum,  H = log sum - dot / sum  (nats)
// `dot` is kept against the running maximum, so logits of +-1e4 cost no digits.
// -inf logits have p = 0 and add nothing; a row of only -inf, or one that holds +inf or NaN, ends
// as NaN, since then sum is 0 or NaN.
#pragma once

#include <cmath>

#include "macros.h"

namespace entropy_rl {

// Below this exponent e^d is zero to the accumulate type. Clamping d where it multiplies e^d keeps
// 0 * inf out of `dot` and of the gradient.
template <class Acc>
struct ExpFloor;
template <>
struct ExpFloor<float> {
  static constexpr float value = -104.0f;
};
template <>
struct ExpFloor<double> {
  static constexpr double value = -746.0;
};

// max(d, floor) that keeps a NaN d, unlike fmax.
template <class Acc>
ENTROPY_RL_HD inline Acc clamp_exponent(Acc d) {
  return d < ExpFloor<Acc>::value ? ExpFloor<Acc>::value : d;
}

ENTROPY_RL_HD inline float exp_shifted(float d) {
#if defined(__CUDA_ARCH__)
  return __expf(d);
#else
  return expf(d);
#endif
}
ENTROPY_RL_HD inline double exp_shifted(double d) { return exp(d); }

// The value that elements are shifted by: shifting by -inf would turn -inf - max into NaN.
template <class Acc>
ENTROPY_RL_HD inline Acc shift_of(Acc max) {
  return max == -static_cast<Acc>(INFINITY) ? Acc(0) : max;
}

// Trivial, so that it can live in shared memory; neutral() is the state before any element.
template <class Acc>
struct OnlineSoftmax {
  Acc max;
  Acc sum;
  Acc dot;

  ENTROPY_RL_HD static OnlineSoftmax neutral() { return {-static_cast<Acc>(INFINITY), 0, 0}; }
  ENTROPY_RL_HD Acc shift() const { return shift_of(max); }
};

// Re-expresses a partial row against a new, not smaller, maximum.
template <class Acc>
ENTROPY_RL_HD inline OnlineSoftmax<Acc> rescaled(const OnlineSoftmax<Acc>& part, Acc max,
                                                 Acc inverse_temperature) {
  OnlineSoftmax<Acc> out;
  out.max = max;
  const Acc d = (part.max - out.shift()) * inverse_temperature;
  const Acc scale = exp_shifted(d);
  out.sum = part.sum * scale;
  out.dot = scale * (part.dot + part.sum * clamp_exponent(d));
  return out;
}

// Combines two partial rows; associative and commutative up to rounding, with neutral() as the
// neutral element.
template <class Acc>
ENTROPY_RL_HD inline OnlineSoftmax<Acc> merge(const OnlineSoftmax<Acc>& a,
                                              const OnlineSoftmax<Acc>& b,
                                              Acc inverse_temperature) {
  const Acc max = a.max > b.max ? a.max : b.max;
  OnlineSoftmax<Acc> out = rescaled(a, max, inverse_temperature);
  const OnlineSoftmax<Acc> other = rescaled(b, max, inverse_temperature);
  out.sum += other.sum;
  out.dot += other.dot;
  return out;
}

// Adds kCount elements with at most one rescale.
template <int kCount, class Acc>
ENTROPY_RL_HD inline void accumulate(OnlineSoftmax<Acc>* state, const Acc (&x)[kCount],
                                     Acc inverse_temperature) {
  Acc max = state->max;
  for (int i = 0; i < kCount; ++i) max = x[i] > max ? x[i] : max;
  if (max > state->max) *state = rescaled(*state, max, inverse_temperature);
  const Acc shift = state->shift();
  for (int i = 0; i < kCount; ++i) {
    const Acc d = (x[i] - shift) * inverse_temperature;
    const Acc e = exp_shifted(d);
    state->sum += e;
    state->dot += e * clamp_exponent(d);
  }
}

template <class Acc>
ENTROPY_RL_HD inline Acc log_sum(const OnlineSoftmax<Acc>& row) {
  return log(row.sum);
}

// H of a whole row. The exact value is never negative; a rounding residue is.
template <class Acc>
ENTROPY_RL_HD inline Acc entropy(const OnlineSoftmax<Acc>& row) {
  const Acc h = log(row.sum) - row.dot / row.sum;
  return h < Acc(0) ? Acc(0) : h;
}

// What the backward needs of one row, and its gradient:
//   dL/dx_j = (1/T) [ g_lp 1[j = y] - p_j (g_lp + g_H (log p_j + H)) ]
template <class Acc>
struct SoftmaxGradient {
  Acc shift;
  Acc log_sum;
  Acc entropy;
  Acc inverse_temperature;
  Acc grad_log_prob;
  Acc grad_entropy;

  ENTROPY_RL_HD Acc operator()(Acc x, bool is_target) const {
    const Acc log_p = (x - shift) * inverse_temperature - log_sum;
    const Acc p = exp_shifted(log_p);
    const Acc pull = is_target ? grad_log_prob : Acc(0);
    const Acc push = grad_log_prob + grad_entropy * (clamp_exponent(log_p) + entropy);
    return inverse_temperature * (pull - p * push);
  }
};

}  // namespace entropy_rl
