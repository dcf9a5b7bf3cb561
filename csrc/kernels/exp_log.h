// e^x and log x that a compiler can vectorise on the host; libm's would be a call for each element.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace entropy_rl {

// e^x for x in [-104, 88] (any x below 709 for double), with an error under 2 ulp. NaN stays NaN; a
// result below the smallest normal number becomes 0. Cody-Waite reduction and a polynomial of
// degree 6, without branches, so that loops over it vectorise.
ENTROPY_RL_HD inline float exp_vectorizable(float x) {
  // 1.5 * 2^23: adding it rounds to an integer in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const uint32_t exponent = (detail::bits_from_float(shifted) - 0x4b400000u + 127u) << 23;
  const float value = p * detail::float_from_bits(exponent);
  return x < -87.3f ? 0.0f : value;
}
ENTROPY_RL_HD inline double exp_vectorizable(double x) { return x < -708.0 ? 0.0 : exp(x); }

// log x with an error under 1 ulp; NaN for x below 0. Subnormal numbers count as 0. x = 2^n m with
// m in [sqrt(1/2), sqrt(2)), and log m is Cephes' polynomial of degree 8.
ENTROPY_RL_HD inline float log_vectorizable(float x) {
  const uint32_t bits = detail::bits_from_float(x);
  const int32_t n = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = detail::float_from_bits(bits - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float exponent = static_cast<float>(n);
  const float square = f * f;
  const float low = p * f * square - 2.12194440e-4f * exponent - 0.5f * square;
  const float value = (f + low) + 0.693359375f * exponent;
  const float small = x < 0.0f ? NAN : -INFINITY;
  const float finite = x < 1.17549435e-38f ? small : value;
  return x < INFINITY ? finite : x;  // infinity and NaN are returned unchanged
}

}  // namespace entropy_rl
