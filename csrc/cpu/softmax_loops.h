// The loops of softmax_backend.h (see each_simd.h). Those over floats use vectors of kVectorBytes,
// and base 2: e^d = 2^t with t = d log2(e). So the range reduction is one rounding.

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Uints __attribute__((vector_size(kVectorBytes)));
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(float));
// The vectors of one step of a loop. Each operation is written for all of them before the next, so
// that they hide each other's latency.
constexpr int kVectors = 4;
// Fewer where each has two sums, so that 16 registers hold them and the polynomial's constants.
constexpr int kSumVectors = 2;

#define ENTROPY_RL_INLINE __attribute__((always_inline)) inline

ENTROPY_RL_INLINE Floats load(const float* x) {
  Floats value;
  memcpy(&value, x, sizeof(value));
  return value;
}
ENTROPY_RL_INLINE void store(Floats value, float* x) { memcpy(x, &value, sizeof(value)); }

// Two vectors of 2 * kWidth consecutive elements. Which holds which element depends on the type.
ENTROPY_RL_INLINE void load_pair(const float* x, Floats* pair) {
  pair[0] = load(x);
  pair[1] = load(x + kWidth);
}
ENTROPY_RL_INLINE void store_pair(const Floats* pair, float* x) {
  store(pair[0], x);
  store(pair[1], x + kWidth);
}

// The elements with even indices are the low halves of 32-bit words, the others the high halves.
ENTROPY_RL_INLINE void load_pair(const BFloat16* x, Floats* pair) {
  Uints words;
  memcpy(&words, x, sizeof(words));
  pair[0] = (Floats)(words << 16);
  pair[1] = (Floats)(words & 0xffff0000u);
}
// The high half is the rounded value, as of store_value.
ENTROPY_RL_INLINE Uints rounded_to_bfloat16(Floats value) {
  const Uints bits = (Uints)value;
  const Uints rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  return value == value ? rounded : Uints{} + 0x7fc00000u;
}
ENTROPY_RL_INLINE void store_pair(const Floats* pair, BFloat16* x) {
  const Uints low = rounded_to_bfloat16(pair[0]) >> 16;
  const Uints high = rounded_to_bfloat16(pair[1]) & 0xffff0000u;
  const Uints words = low | high;
  memcpy(x, &words, sizeof(words));
}

// As load_value and store_value, but a NaN keeps its sign and high bits.
template <class Vector>
ENTROPY_RL_INLINE Vector widened(const Half* x) {
#if defined(ENTROPY_RL_X86_SIMD)
  if constexpr (sizeof(Vector) == 64) {
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
  } else if constexpr (sizeof(Vector) == 32) {
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
  }
#endif
  alignas(64) float values[kWidth];
  for (int i = 0; i < kWidth; ++i) values[i] = load_value(x[i]);
  return load(values);
}
template <class Vector>
ENTROPY_RL_INLINE void store_narrowed(Vector value, Half* x) {
#if defined(ENTROPY_RL_X86_SIMD)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  if constexpr (sizeof(Vector) == 64) {
    _mm256_storeu_si256((__m256i*)x, _mm512_cvtps_ph(value, kNearest));
    return;
  } else if constexpr (sizeof(Vector) == 32) {
    _mm_storeu_si128((__m128i*)x, _mm256_cvtps_ph(value, kNearest));
    return;
  }
#endif
  for (int i = 0; i < kWidth; ++i) store_value(value[i], x + i);
}
ENTROPY_RL_INLINE void load_pair(const Half* x, Floats* pair) {
  pair[0] = widened<Floats>(x);
  pair[1] = widened<Floats>(x + kWidth);
}
ENTROPY_RL_INLINE void store_pair(const Floats* pair, Half* x) {
  store_narrowed(pair[0], x);
  store_narrowed(pair[1], x + kWidth);
}

template <int kCount, class T>
ENTROPY_RL_INLINE void load_vectors(const T* x, Floats (&values)[kCount]) {
  for (int u = 0; u < kCount; u += 2) load_pair(x + u * kWidth, values + u);
}
template <int kCount, class T>
ENTROPY_RL_INLINE void store_vectors(const Floats (&values)[kCount], T* x) {
  for (int u = 0; u < kCount; u += 2) store_pair(values + u, x + u * kWidth);
}

// Calls fn(x + i) for every step of kCount vectors; the last one is padded with -inf.
template <int kCount, class T, class Fn>
ENTROPY_RL_INLINE void for_each_step(const T* x, int count, Fn fn) {
  constexpr int kStep = kCount * kWidth;
  int i = 0;
  for (; i + kStep <= count; i += kStep) fn(x + i);
  if (i == count) return;
  T padded[kStep];
  for (int j = 0; j < kStep; ++j) store_value(-INFINITY, padded + j);
  memcpy(padded, x + i, (count - i) * sizeof(T));
  fn(padded);
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

// 2^t for t = d scale in [-127, 127], with an error of 2 ulp at most; 0 below -126.5, and NaN for
// NaN. The caller clamps smaller t to -127, where the exponent's bits are those of 0; so 2^t * d is
// 0 for a d of -inf.
template <int kCount>
ENTROPY_RL_INLINE void exp2_of(const Floats (&d)[kCount], float scale, Floats (&result)[kCount]) {
  // Adding 1.5 * 2^23 rounds t to an integer in the low bits; here they include the exponent's
  // bias. t itself is not needed: both sums are fused with the product.
  constexpr float kRound = 12582912.0f + 127.0f;
  // Of least relative error on [-1/2, 1/2], 9.1e-8, among those of degree 5 that are 1 at 0.
  constexpr float kPolynomial[] = {1.326472731e-3f, 9.671512991e-3f, 5.550733581e-2f,
                                   2.402224243e-1f, 6.931470037e-1f, 1.0f};
  Floats shifted[kCount], f[kCount];
  for (int u = 0; u < kCount; ++u) shifted[u] = d[u] * scale + kRound;
  for (int u = 0; u < kCount; ++u) f[u] = d[u] * scale - (shifted[u] - kRound);
  for (int u = 0; u < kCount; ++u) result[u] = Floats{} + kPolynomial[0];
  for (int k = 1; k < 6; ++k) {
    for (int u = 0; u < kCount; ++u) result[u] = result[u] * f[u] + kPolynomial[k];
  }
  for (int u = 0; u < kCount; ++u) result[u] *= (Floats)((Ints)shifted[u] << 23);
}

// max(x, floor), and NaN for NaN.
ENTROPY_RL_INLINE Floats clamped(Floats x, float floor) { return larger(Floats{} + floor, x); }

template <class T>
float max_of(const T* x, int count) {
  Floats best[kVectors];
  for (int u = 0; u < kVectors; ++u) best[u] = Floats{} - INFINITY;
  for_each_step<kVectors>(x, count, [&](const T* at) __attribute__((always_inline)) {
    Floats values[kVectors];
    load_vectors(at, values);
    for (int u = 0; u < kVectors; ++u) best[u] = larger(values[u], best[u]);
  });
  for (int u = 1; u < kVectors; ++u) best[0] = larger(best[u], best[0]);
  float result = best[0][0];
  for (int j = 1; j < kWidth; ++j) result = best[0][j] > result ? best[0][j] : result;
  return result;
}

template <class T>
void add_sums(const T* x, int count, float shift, float inverse_temperature, float* sum,
              float* dot) {
  // At temperatures above 10^36 the scale stays large enough for the floor of d to be finite.
  const float scale = std::max(inverse_temperature * static_cast<float>(M_LOG2E),
                               128.0f / std::numeric_limits<float>::max());
  const float floor = -127.0f / scale;
  Floats sums[kSumVectors] = {};
  Floats dots[kSumVectors] = {};
  for_each_step<kSumVectors>(x, count, [&](const T* at) __attribute__((always_inline)) {
    // The next chunk is fetched from memory while this one, which is in the cache, is computed.
    const uintptr_t next = reinterpret_cast<uintptr_t>(at) + kChunk * sizeof(T);
    for (size_t line = 0; line < kSumVectors * kWidth * sizeof(T); line += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + line));
    }
    Floats d[kSumVectors], e[kSumVectors];
    load_vectors(at, d);
    for (int u = 0; u < kSumVectors; ++u) d[u] = clamped(d[u] - shift, floor);
    exp2_of(d, scale, e);
    for (int u = 0; u < kSumVectors; ++u) sums[u] += e[u];
    for (int u = 0; u < kSumVectors; ++u) dots[u] += e[u] * d[u];
  });
  for (int u = 1; u < kSumVectors; ++u) {
    sums[0] += sums[u];
    dots[0] += dots[u];
  }
  float total = 0;
  float total_dot = 0;
  for (int j = 0; j < kWidth; ++j) {
    total += sums[0][j];
    total_dot += dots[0][j];
  }
  *sum = total;
  *dot = total_dot * inverse_temperature;
}

template <class T>
void gradient_of(const T* x, int64_t count, const SoftmaxGradient<float>& g, T* out) {
  const float shift = g.shift;
  const float scale = g.inverse_temperature * static_cast<float>(M_LOG2E);
  const float log2_sum = g.log_sum * static_cast<float>(M_LOG2E);
  // dL/dx = p (constant + slope t), t the log of p to base 2.
  const float constant = -g.inverse_temperature * (g.grad_log_prob + g.grad_entropy * g.entropy);
  const float slope = -g.inverse_temperature * g.grad_entropy * static_cast<float>(M_LN2);
  const auto gradient = [&](const T* from, T* to) __attribute__((always_inline)) {
    Floats t[kVectors], e[kVectors];
    load_vectors(from, t);
    for (int u = 0; u < kVectors; ++u) t[u] = clamped((t[u] - shift) * scale - log2_sum, -127.0f);
    exp2_of(t, 1.0f, e);
    for (int u = 0; u < kVectors; ++u) e[u] *= slope * t[u] + constant;
    store_vectors(e, to);
  };
  constexpr int kStep = kVectors * kWidth;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) gradient(x + i, out + i);
  if (i == count) return;
  T padded[kStep] = {};
  memcpy(padded, x + i, (count - i) * sizeof(T));
  gradient(padded, padded);
  memcpy(out + i, padded, (count - i) * sizeof(T));
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

void gradient_of(const double* x, int64_t count, const SoftmaxGradient<double>& g, double* out) {
  for (int64_t i = 0; i < count; ++i) {
    const double log_p = clamp_exponent((x[i] - g.shift) * g.inverse_temperature - g.log_sum);
    const double p = exp_vectorizable(log_p);
    out[i] = -g.inverse_temperature * p * (g.grad_log_prob + g.grad_entropy * (log_p + g.entropy));
  }
}

template <class T>
void narrow_all(const float* x, int count, T* out) {
  for (int i = 0; i < count; ++i) store_value(x[i], out + i);
}

#undef ENTROPY_RL_INLINE
