// e^x and log x that a compiler can vectorise on the host; libm's would be a call for each element.
// A value is a float, or on the host a vector of floats of GCC's kind, whose comparisons and
// selections (x < y ? x : y) are those of its lanes.
#pragma once

#include <cmath>
#include <type_traits>

#include "dtypes.h"

#if defined(__GNUC__) && !defined(__CUDACC__)
// How wide vectors are returned depends on the instruction set. These functions are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace entropy_rl {

// What a comparison of such values gives: bool, or a vector of integers.
template <class Value>
using mask_t = decltype(Value{} < Value{});

template <class Value, bool = std::is_arithmetic_v<Value>>
struct ScalarOf {
  using type = Value;
};
template <class Value>
struct ScalarOf<Value, false> {
  using type = std::decay_t<decltype(Value{}[0])>;
};
// The type of a value, or of one lane of a vector.
template <class Value>
using scalar_t = typename ScalarOf<Value>::type;

// fn of a value, or of each lane of a vector.
template <class Value, class Fn>
ENTROPY_RL_HD inline Value each_lane(const Value& value, Fn fn) {
  if constexpr (std::is_arithmetic_v<Value>) {
    return fn(value);
  } else {
    Value result;
    for (size_t i = 0; i < sizeof(Value) / sizeof(value[0]); ++i) result[i] = fn(value[i]);
    return result;
  }
}

namespace detail {

template <class Float>
struct Bits {
  typedef uint32_t type __attribute__((vector_size(sizeof(Float))));
};
template <>
struct Bits<float> {
  using type = uint32_t;
};
template <class Float>
using bits_t = typename Bits<Float>::type;

template <class Float>
ENTROPY_RL_HD inline bits_t<Float> bits_of(const Float& value) {
  bits_t<Float> bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
template <class Float>
ENTROPY_RL_HD inline Float value_of(const bits_t<Float>& bits) {
  Float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace detail

// e^x for x in [-87.3, 88], with an error under 2 ulp. NaN stays NaN. Cody-Waite reduction and a
// polynomial of degree 6, without branches, so that loops over it vectorise.
template <class Float>
ENTROPY_RL_HD inline Float exp_of_normal(const Float& x) {
  // 1.5 * 2^23: adding it rounds to an integer in the low bits.
  constexpr float kRound = 12582912.0f;
  const Float shifted = x * 1.44269504088896341f + kRound;
  const Float n = shifted - kRound;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const detail::bits_t<Float> exponent = (detail::bits_of(shifted) - 0x4b400000u + 127u) << 23;
  return p * detail::value_of<Float>(exponent);
}
// The same for x from -104 on (any x below 709 for double); a result below the smallest normal
// number becomes 0.
template <class Float>
ENTROPY_RL_HD inline Float exp_vectorizable(const Float& x) {
  return x < -87.3f ? 0.0f : exp_of_normal(x);
}
ENTROPY_RL_HD inline double exp_vectorizable(double x) { return x < -708.0 ? 0.0 : exp(x); }

// log x with an error under 1 ulp; NaN for x below 0. Subnormal numbers count as 0. x = 2^n m with
// m in [sqrt(1/2), sqrt(2)), and log m is Cephes' polynomial of degree 8.
template <class Float>
ENTROPY_RL_HD inline Float log_vectorizable(const Float& x) {
  const detail::bits_t<Float> bits = detail::bits_of(x);
  const detail::bits_t<Float> n = (bits - 0x3f3504f3u + (128u << 23)) >> 23;  // plus 128
  const Float f = detail::value_of<Float>(bits - ((n - 128u) << 23)) - 1.0f;
  Float p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  // n in the low bits of 1.5 * 2^23 is a conversion to float.
  const Float exponent = detail::value_of<Float>(n + 0x4b400000u) - (12582912.0f + 128.0f);
  const Float square = f * f;
  const Float low = p * f * square - 2.12194440e-4f * exponent - 0.5f * square;
  const Float value = (f + low) + 0.693359375f * exponent;
  const Float small = x < 0.0f ? NAN : -INFINITY;
  const Float finite = x < 1.17549435e-38f ? small : value;
  return x < INFINITY ? finite : x;  // infinity and NaN are returned unchanged
}

}  // namespace entropy_rl
