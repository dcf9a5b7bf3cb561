#include "softmax_rows.h"

namespace entropy_rl::cpu {
namespace {

// Each runs over kLanes independent lanes first, so that the compiler can keep a vector per sum,
// then over the remainder. Lane order is fixed: the same input gives the same bits on every path
// but for fused multiply-add, which the baseline lacks.

template <class Acc>
__attribute__((always_inline)) inline Acc max_of(const Acc* x, int count) {
  Acc lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -static_cast<Acc>(INFINITY);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (int j = 0; i < count; ++i, ++j) lanes[j] = x[i] > lanes[j] ? x[i] : lanes[j];
  for (int j = 1; j < kLanes; ++j) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
  return lanes[0];
}

template <class Acc>
__attribute__((always_inline)) inline void add_sums(const Acc* x, int count, Acc shift,
                                                    Acc inverse_temperature, Acc* sum, Acc* dot) {
  Acc sums[kLanes] = {};
  Acc dots[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const Acc d = clamp_exponent((x[i + j] - shift) * inverse_temperature);
      const Acc e = exp_vectorizable(d);
      sums[j] += e;
      dots[j] += e * d;
    }
  }
  for (int j = 0; i < count; ++i, ++j) {
    const Acc d = clamp_exponent((x[i] - shift) * inverse_temperature);
    const Acc e = exp_vectorizable(d);
    sums[j] += e;
    dots[j] += e * d;
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      sums[j] += sums[j + width];
      dots[j] += dots[j + width];
    }
  }
  *sum = sums[0];
  *dot = dots[0];
}

template <class Acc>
__attribute__((always_inline)) inline void gradient_of(Acc* x, int count,
                                                       const SoftmaxGradient<Acc>& g) {
  for (int i = 0; i < count; ++i) {
    const Acc log_p = clamp_exponent((x[i] - g.shift) * g.inverse_temperature - g.log_sum);
    const Acc p = exp_vectorizable(log_p);
    x[i] = -g.inverse_temperature * p * (g.grad_log_prob + g.grad_entropy * (log_p + g.entropy));
  }
}

}  // namespace

ENTROPY_RL_SIMD_CLONES float chunk_max(const float* x, int count) { return max_of(x, count); }
ENTROPY_RL_SIMD_CLONES double chunk_max(const double* x, int count) { return max_of(x, count); }

ENTROPY_RL_SIMD_CLONES void chunk_sums(const float* x, int count, float shift,
                                       float inverse_temperature, float* sum, float* dot) {
  add_sums(x, count, shift, inverse_temperature, sum, dot);
}
ENTROPY_RL_SIMD_CLONES void chunk_sums(const double* x, int count, double shift,
                                       double inverse_temperature, double* sum, double* dot) {
  add_sums(x, count, shift, inverse_temperature, sum, dot);
}

ENTROPY_RL_SIMD_CLONES void chunk_gradient(float* x, int count,
                                           const SoftmaxGradient<float>& gradient) {
  gradient_of(x, count, gradient);
}
ENTROPY_RL_SIMD_CLONES void chunk_gradient(double* x, int count,
                                           const SoftmaxGradient<double>& gradient) {
  gradient_of(x, count, gradient);
}

ENTROPY_RL_SIMD_CLONES void widen(const BFloat16* x, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = load_value(x[i]);
}
ENTROPY_RL_SIMD_CLONES void widen(const Half* x, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = load_value(x[i]);
}
ENTROPY_RL_SIMD_CLONES void narrow(const float* x, int count, BFloat16* out) {
  for (int i = 0; i < count; ++i) store_value(x[i], out + i);
}
ENTROPY_RL_SIMD_CLONES void narrow(const float* x, int count, Half* out) {
  for (int i = 0; i < count; ++i) store_value(x[i], out + i);
}

}  // namespace entropy_rl::cpu
