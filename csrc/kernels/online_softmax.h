// One row of softmax(x / T) in a single pass, and the combination of two partial rows.
//   d_j = (x_j - max) / T,  sum = sum_j e^d_j,  dot = sum_j e^d_j d_j
//   log p_y = d_y - log sum,  H = log sum - dot / sum  (nats)
// `dot` is relative to the running maximum, so logits of +-1e4 cost no digits.
// -inf logits have p = 0 and add nothing. A row of only -inf gives NaN, since its sum is 0; a row
// with +inf or NaN gives NaN, since its sum is NaN.
#pragma once

#include <cfloat>
#include <cmath>

#include "macros.h"

namespace entropy_rl {

// The temperatures that are taken: float32 holds each of them and its inverse, both as normal
// numbers.
template <class Value>
ENTROPY_RL_HD inline bool is_temperature(Value value) {
  return value >= static_cast<Value>(0x1p-126) && value <= static_cast<Value>(0x1p126);
}

// Below this exponent e^d is zero in the accumulate type. Where d multiplies e^d it is clamped to
// the floor, so that `dot` and the gradient hold no 0 * inf. `lowest` is the lowest finite number.
template <class Acc>
struct ExpFloor;
template <>
struct ExpFloor<float> {
  static constexpr float value = -104.0f;
  static constexpr float lowest = -FLT_MAX;
};
template <>
struct ExpFloor<double> {
  static constexpr double value = -746.0;
  static constexpr double lowest = -DBL_MAX;
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

// The value that is subtracted from elements: -inf - max would be NaN for a maximum of -inf.
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

// A partial row relative to another maximum, which is not smaller.
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

// ---- A thread's sums on the device ----

// e^(d / T) is exp_scaled(d * exponent_scale(1 / T)): for float in base 2, which the hardware has.
ENTROPY_RL_HD inline float exponent_scale(float inverse_temperature) {
  return inverse_temperature * 1.44269504088896341f;
}
ENTROPY_RL_HD inline double exponent_scale(double inverse_temperature) {
  return inverse_temperature;
}
ENTROPY_RL_HD inline float exp_scaled(float x) {
#if defined(__CUDA_ARCH__)
  // exp2f takes two more instructions to keep subnormal results, which do not count beside the
  // largest term, 1.
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}
ENTROPY_RL_HD inline double exp_scaled(double x) { return exp(x); }

// The maximum; of a number and NaN, the number.
ENTROPY_RL_HD inline float larger(float a, float b) { return fmaxf(a, b); }
ENTROPY_RL_HD inline double larger(double a, double b) { return fmax(a, b); }

// a b + c, rounded once.
ENTROPY_RL_HD inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
ENTROPY_RL_HD inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// a b, rounded whatever is added to it.
ENTROPY_RL_HD inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
ENTROPY_RL_HD inline double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Turns a difference of logits into an exponent. A difference that multiplies its exponential is
// clamped to `floor`, since 0 * -inf is NaN. `floor` is finite, and the exponential of every finite
// difference below it is 0. The clamp loses a NaN difference, but its exponential is NaN.
template <class Acc>
struct RowScale {
  Acc inverse_temperature;
  Acc exponent;
  Acc floor;

  ENTROPY_RL_HD explicit RowScale(Acc temperature)
      : inverse_temperature(Acc(1) / temperature),
        exponent(exponent_scale(inverse_temperature)),
        floor(larger(ExpFloor<Acc>::value * temperature, ExpFloor<Acc>::lowest)) {}
};

// An OnlineSoftmax whose dot is sum_j e^d_j (x_j - max), which saves a product an element. Every
// kernel that sums a row must give the same bits, so that the fused products are written out and
// not left to the compiler.
template <class Acc>
struct LogitSums {
  Acc max = -static_cast<Acc>(INFINITY);
  Acc sum = 0;
  Acc dot = 0;
  Acc squares = 0;  // sum_j e^2d_j, where add<true> keeps it

  // Adds kCount elements with one rescale. It is unconditional, since in nearly every step one of
  // the 32 lanes of a warp has a new maximum.
  template <bool kSquares = false, int kCount>
  ENTROPY_RL_HD void add(const Acc (&x)[kCount], const RowScale<Acc>& scale) {
    Acc new_max = max;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < kCount; ++j) new_max = larger(new_max, x[j]);
    const Acc shift = shift_of(new_max);
    const Acc step = max - shift;
    const Acc factor = exp_scaled(step * scale.exponent);
    dot = factor * multiply_add(sum, larger(step, scale.floor), dot);
    sum *= factor;
    if constexpr (kSquares) squares *= factor * factor;
    max = new_max;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < kCount; ++j) {
      const Acc d = x[j] - shift;
      const Acc e = exp_scaled(d * scale.exponent);
      sum += e;
      dot = multiply_add(e, larger(d, scale.floor), dot);
      if constexpr (kSquares) squares = multiply_add(e, e, squares);
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

// H of a complete row. The exact value is never negative, but rounding may make it so.
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

// The gradient, with the factors that all elements of a row share multiplied out: for an element
// other than the target it is p (slope log p + offset), and for the target `pull` more. As in
// LogitSums, the compiler does not choose which products are fused.
template <class Acc>
struct RowGradient {
  Acc shift;
  Acc exponent;
  Acc log_sum;  // in the base of exp_scaled
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
    const Acc log_p = multiply_add(x - shift, exponent, -log_sum);
    const Acc floored = larger(log_p, exponent_scale(ExpFloor<Acc>::value));
    return product(exp_scaled(log_p), multiply_add(slope, floored, offset));
  }
};

}  // namespace entropy_rl
