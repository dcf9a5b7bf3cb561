// The loops of softmax_backend.h (see each_simd.h). Those over floats use vectors of kVectorBytes,
// and base 2: t = d log2(e), e^d = 2^t. So the range reduction is one rounding, and sum e^d d needs
// one factor at the end.

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(float));
// Vectors in flight, which hide each other's latency.
constexpr int kUnroll = 4;
// Fewer where each has two sums, so that 16 registers hold them and the polynomial's constants.
constexpr int kSumUnroll = 2;

#define ENTROPY_RL_INLINE __attribute__((always_inline)) inline

ENTROPY_RL_INLINE Floats load(const float* x) {
  Floats value;
  memcpy(&value, x, sizeof(value));
  return value;
}
ENTROPY_RL_INLINE void store(Floats value, float* x) { memcpy(x, &value, sizeof(value)); }

// The last count < kWidth elements, padded with `fill`.
ENTROPY_RL_INLINE Floats load_tail(const float* x, int count, float fill) {
  alignas(64) float padded[kWidth];
  for (int i = 0; i < kWidth; ++i) padded[i] = i < count ? x[i] : fill;
  return load(padded);
}

// x > y ? x : y, also for NaN. The compiler makes two instructions of that expression.
template <class Vector>
ENTROPY_RL_INLINE Vector larger(Vector x, Vector y) {
#if defined(ENTROPY_RL_X86_SIMD)
  if constexpr (sizeof(Vector) == 64) {
    return _mm512_max_ps(x, y);
  } else if constexpr (sizeof(Vector) == 32) {
    return _mm256_max_ps(x, y);
  } else {
    return _mm_max_ps(x, y);
  }
#else
  return x > y ? x : y;
#endif
}

// 2^t for t in [-127, 127], with an error under 1 ulp; 0 below -126.5, and NaN for NaN. The caller
// clamps smaller t to -127, where the exponent's bits are those of 0; so 2^t * t is 0 for a d of
// -inf.
ENTROPY_RL_INLINE Floats exp2_of(Floats t) {
  // Adding 1.5 * 2^23 rounds t to an integer in the low bits; here they include the exponent's
  // bias.
  constexpr float kRound = 12582912.0f + 127.0f;
  const Floats shifted = t + kRound;
  const Floats f = t - (shifted - kRound);
  Floats p = f * 1.534581243e-4f + 1.339993090e-3f;
  p = p * f + 9.618489072e-3f;
  p = p * f + 5.550328642e-2f;
  p = p * f + 2.402264625e-1f;
  p = p * f + 6.931471825e-1f;
  p = p * f + 1.0f;
  return p * (Floats)((Ints)shifted << 23);
}

// max(t, -127), and NaN for NaN.
ENTROPY_RL_INLINE Floats clamp_power(Floats t) { return larger(Floats{} - 127.0f, t); }

float max_of(const float* x, int count) {
  const Floats lowest = Floats{} - INFINITY;
  Floats best[kUnroll];
  for (int u = 0; u < kUnroll; ++u) best[u] = lowest;
  int i = 0;
  for (; i + kUnroll * kWidth <= count; i += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) best[u] = larger(load(x + i + u * kWidth), best[u]);
  }
  for (; i + kWidth <= count; i += kWidth) best[0] = larger(load(x + i), best[0]);
  if (i < count) best[0] = larger(load_tail(x + i, count - i, -INFINITY), best[0]);
  for (int u = 1; u < kUnroll; ++u) best[0] = larger(best[u], best[0]);
  float result = best[0][0];
  for (int j = 1; j < kWidth; ++j) result = best[0][j] > result ? best[0][j] : result;
  return result;
}

void add_sums(const float* x, int count, float shift, float inverse_temperature, float* sum,
              float* dot) {
  const float scale = inverse_temperature * static_cast<float>(M_LOG2E);
  Floats sums[kSumUnroll] = {};
  Floats dots[kSumUnroll] = {};
  const auto add = [&](Floats value, int u) __attribute__((always_inline)) {
    const Floats t = clamp_power((value - shift) * scale);
    const Floats e = exp2_of(t);
    sums[u] += e;
    dots[u] += e * t;
  };
  int i = 0;
  for (; i + kSumUnroll * kWidth <= count; i += kSumUnroll * kWidth) {
    for (int u = 0; u < kSumUnroll; ++u) add(load(x + i + u * kWidth), u);
  }
  for (; i + kWidth <= count; i += kWidth) add(load(x + i), 0);
  if (i < count) add(load_tail(x + i, count - i, -INFINITY), 1);
  const Floats s = sums[0] + sums[1];
  const Floats d = dots[0] + dots[1];
  float total = 0;
  float total_dot = 0;
  for (int j = 0; j < kWidth; ++j) {
    total += s[j];
    total_dot += d[j];
  }
  *sum = total;
  *dot = total_dot * static_cast<float>(M_LN2);
}

void gradient_of(const float* x, int count, const SoftmaxGradient<float>& g, float* out) {
  const float scale = g.inverse_temperature * static_cast<float>(M_LOG2E);
  const float log2_sum = g.log_sum * static_cast<float>(M_LOG2E);
  // dL/dx = p (constant + slope t), t the log of p to base 2.
  const float constant = -g.inverse_temperature * (g.grad_log_prob + g.grad_entropy * g.entropy);
  const float slope = -g.inverse_temperature * g.grad_entropy * static_cast<float>(M_LN2);
  const auto gradient = [&](Floats value) __attribute__((always_inline)) {
    const Floats t = clamp_power((value - g.shift) * scale - log2_sum);
    return exp2_of(t) * (slope * t + constant);
  };
  int i = 0;
  for (; i + kUnroll * kWidth <= count; i += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u)
      store(gradient(load(x + i + u * kWidth)), out + i + u * kWidth);
  }
  for (; i + kWidth <= count; i += kWidth) store(gradient(load(x + i)), out + i);
  if (i == count) return;
  const Floats last = gradient(load_tail(x + i, count - i, 0));
  for (int j = 0; i < count; ++i, ++j) out[i] = last[j];
}

// ---- float64: kLanes independent sums, which the compiler holds in vectors ----

double max_of(const double* x, int count) {
  double lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -INFINITY;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (int j = 0; i < count; ++i, ++j) lanes[j] = x[i] > lanes[j] ? x[i] : lanes[j];
  for (int j = 1; j < kLanes; ++j) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
  return lanes[0];
}

void add_sums(const double* x, int count, double shift, double inverse_temperature, double* sum,
              double* dot) {
  double sums[kLanes] = {};
  double dots[kLanes] = {};
  for (int i = 0; i < count; ++i) {
    const double d = clamp_exponent((x[i] - shift) * inverse_temperature);
    const double e = exp_vectorizable(d);
    sums[i % kLanes] += e;
    dots[i % kLanes] += e * d;
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

void gradient_of(const double* x, int count, const SoftmaxGradient<double>& g, double* out) {
  for (int i = 0; i < count; ++i) {
    const double log_p = clamp_exponent((x[i] - g.shift) * g.inverse_temperature - g.log_sum);
    const double p = exp_vectorizable(log_p);
    out[i] = -g.inverse_temperature * p * (g.grad_log_prob + g.grad_entropy * (log_p + g.entropy));
  }
}

// ---- 16-bit floats ----

template <class T>
void widen_all(const T* x, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = load_value(x[i]);
}

template <class T>
void narrow_all(const float* x, int count, T* out) {
  for (int i = 0; i < count; ++i) store_value(x[i], out + i);
}

#undef ENTROPY_RL_INLINE
