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

// ---- Sums over logits as they are: what token_entropy and logprob_entropy keep on the device ----

// e^(d / T) as exp_scaled(d * exponent_scale(1 / T)): in base 2 for float, as the hardware has it.
ENTROPY_RL_HD inline float exponent_scale(float inverse_temperature) {
  return inverse_temperature * 1.44269504088896341f;
}
ENTROPY_RL_HD inline double exponent_scale(double inverse_temperature) {
  return inverse_temperature;
}
ENTROPY_RL_HD inline float exp_scaled(float x) {
#if defined(__CUDA_ARCH__)
  // exp2f takes two more instructions to keep subnormal results, which are nothing beside the 1 of
  // the largest term.
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}
ENTROPY_RL_HD inline double exp_scaled(double x) { return exp(x); }

// The maximum; a NaN gives way to a number.
ENTROPY_RL_HD inline float larger(float a, float b) { return fmaxf(a, b); }
ENTROPY_RL_HD inline double larger(double a, double b) { return fmax(a, b); }

// What it takes to turn a difference of logits into an exponent. `floor` is a difference whose
// exponential is 0: where a difference multiplies that 0 it is held there, since -inf would give
// NaN. A NaN difference is lost there, and kept by its exponential.
template <class Acc>
struct RowScale {
  Acc inverse_temperature;
  Acc exponent;
  Acc floor;

  ENTROPY_RL_HD explicit RowScale(Acc temperature)
      : inverse_temperature(Acc(1) / temperature),
        exponent(exponent_scale(inverse_temperature)),
        floor(ExpFloor<Acc>::value * temperature) {}
};

// OnlineSoftmax but for dot = sum_j e^d_j (x_j - max), which saves a product an element.
template <class Acc>
struct LogitSums {
  Acc max = -static_cast<Acc>(INFINITY);
  Acc sum = 0;
  Acc dot = 0;

  // Adds kCount elements with one rescale: unconditional, since among the 32 lanes of a warp one
  // nearly always has a new maximum.
  template <int kCount>
  ENTROPY_RL_HD void add(const Acc (&x)[kCount], const RowScale<Acc>& scale) {
    Acc new_max = max;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < kCount; ++j) new_max = larger(new_max, x[j]);
    const Acc shift = shift_of(new_max);
    const Acc step = max - shift;
    const Acc factor = exp_scaled(step * scale.exponent);
    dot = factor * (dot + sum * larger(step, scale.floor));
    sum *= factor;
    max = new_max;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < kCount; ++j) {
      const Acc d = x[j] - shift;
      const Acc e = exp_scaled(d * scale.exponent);
      sum += e;
      dot += e * larger(d, scale.floor);
    }
  }
  ENTROPY_RL_HD OnlineSoftmax<Acc> state(const RowScale<Acc>& scale) const {
    return {max, sum, dot * scale.inverse_temperature};
  }
};

// ---- Results ----

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

// What the backward needs of one row:
//   dL/dx_j = (1/T) [ g_lp 1[j = y] - p_j (g_lp + g_H (log p_j + H)) ]
template <class Acc>
struct SoftmaxGradient {
  Acc shift;
  Acc log_sum;
  Acc entropy;
  Acc inverse_temperature;
  Acc grad_log_prob;
  Acc grad_entropy;
};

// The gradient, with all that a row's elements share multiplied out: an element other than the
// target is p (slope log p + offset), the target `pull` more.
template <class Acc>
struct RowGradient {
  Acc shift;
  Acc exponent;
  Acc log_sum;  // as exp_scaled takes it
  Acc slope;
  Acc offset;
  Acc pull;

  ENTROPY_RL_HD explicit RowGradient(const SoftmaxGradient<Acc>& row)
      : shift(row.shift),
        exponent(exponent_scale(row.inverse_temperature)),
        log_sum(exponent_scale(row.log_sum)),
        slope(-row.grad_entropy * row.inverse_temperature / exponent_scale(Acc(1))),
        offset(-(row.grad_log_prob + row.grad_entropy * row.entropy) * row.inverse_temperature),
        pull(row.grad_log_prob * row.inverse_temperature) {}

  ENTROPY_RL_HD Acc operator()(Acc x) const {
    const Acc log_p = (x - shift) * exponent - log_sum;
    return exp_scaled(log_p) *
           (slope * larger(log_p, exponent_scale(ExpFloor<Acc>::value)) + offset);
  }
};

}  // namespace entropy_rl
