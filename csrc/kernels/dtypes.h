// The element types of logits, without torch: 16-bit floats are bit patterns, widened when loaded
// and rounded to nearest even when stored. Arithmetic is float32, or float64 for float64 input.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace entropy_rl {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The type in which sums over elements of type T are kept.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateType<T>::type;

namespace detail {

ENTROPY_RL_HD inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

ENTROPY_RL_HD inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

}  // namespace detail

ENTROPY_RL_HD inline float load_value(float value) { return value; }
ENTROPY_RL_HD inline double load_value(double value) { return value; }
ENTROPY_RL_HD inline float load_value(BFloat16 value) {
  return detail::float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}
ENTROPY_RL_HD inline float load_value(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // The 15 low bits, moved under a float's exponent and multiplied by 2^112, are the exact value of
  // a normal or subnormal number; only infinity and NaN need their exponent restored. There is no
  // branch, so loops over it vectorise.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const float scaled = detail::float_from_bits(magnitude) * 0x1p112f;
  const uint32_t special = (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return detail::float_from_bits(detail::bits_from_float(scaled) | special | sign);
#endif
}

ENTROPY_RL_HD inline void store_value(float value, float* out) { *out = value; }
ENTROPY_RL_HD inline void store_value(double value, double* out) { *out = value; }
ENTROPY_RL_HD inline void store_value(float value, BFloat16* out) {
  const uint32_t bits = detail::bits_from_float(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // Rounding could turn the bits of a NaN into those of infinity, so every NaN becomes 0x7fc0.
  out->bits = is_nan ? uint16_t{0x7fc0} : static_cast<uint16_t>(rounded >> 16);
}
ENTROPY_RL_HD inline void store_value(float value, Half* out) {
#if defined(__CUDA_ARCH__)
  out->bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = detail::bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal. Adding 0.5 aligns its last bit with the float's last
    // bit, and the addition rounds to nearest even.
    const float shifted = detail::float_from_bits(magnitude) + 0.5f;
    half = detail::bits_from_float(shifted) - 0x3f000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
#endif
}

}  // namespace entropy_rl
