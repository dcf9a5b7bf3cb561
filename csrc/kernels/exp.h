// e^x that a compiler can vectorise on the host: libm's is a call for each element.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace entropy_rl {

// e^x for x in [-104, 88] (any x below 709 for double), NaN kept, zero where the result is below
// the smallest normal number; error under 2 ulp. Cody-Waite reduction and a degree-6 polynomial,
// free of branches so that loops over it vectorise.
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

}  // namespace entropy_rl
