// The 16-bit floats of csrc/kernels/dtypes.h, over all their bit patterns, against the definition
// of the formats: sign, exponent, fraction.
#include "kernels/dtypes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace entropy_rl {
namespace {

template <class T>
struct Format;
template <>
struct Format<Half> {
  static constexpr int kFractionBits = 10, kMaxExponent = 31, kBias = 15;
};
template <>
struct Format<BFloat16> {
  static constexpr int kFractionBits = 7, kMaxExponent = 255, kBias = 127;
};

template <class T>
double value_of(uint16_t bits) {
  using F = Format<T>;
  const int exponent = bits >> F::kFractionBits & F::kMaxExponent;
  const int fraction = bits & ((1 << F::kFractionBits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == F::kMaxExponent) return fraction ? std::nan("") : sign * INFINITY;
  const int implicit = exponent == 0 ? 0 : 1 << F::kFractionBits;
  return sign *
         std::ldexp(implicit + fraction, std::max(exponent, 1) - F::kBias - F::kFractionBits);
}

template <class T>
uint16_t stored(float value) {
  T out;
  store_value(value, &out);
  return out.bits;
}

template <class T>
class Dtypes : public ::testing::Test {};
using SixteenBitTypes = ::testing::Types<Half, BFloat16>;
TYPED_TEST_SUITE(Dtypes, SixteenBitTypes);

TYPED_TEST(Dtypes, EveryPatternLoadsAsItsValueAndStoresAsItself) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = value_of<TypeParam>(bits);
    const float loaded = load_value(TypeParam{uint16_t(bits)});
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(loaded)) << bits;
      ASSERT_TRUE(std::isnan(value_of<TypeParam>(stored<TypeParam>(loaded)))) << bits;
    } else {
      ASSERT_EQ(loaded, value) << bits;
      ASSERT_EQ(stored<TypeParam>(loaded), bits);
    }
  }
}

TYPED_TEST(Dtypes, StoreRoundsToNearestEven) {
  // Between each finite pattern and the next: below, at and above the middle. The one above the
  // largest finite value is infinity.
  const uint32_t infinity = Format<TypeParam>::kMaxExponent << Format<TypeParam>::kFractionBits;
  const double beyond = 2 * value_of<TypeParam>(infinity - 1) - value_of<TypeParam>(infinity - 2);
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const double low = value_of<TypeParam>(bits);
    const double high = bits + 1 == infinity ? beyond : value_of<TypeParam>(bits + 1);
    const float middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(middle, (low + high) / 2) << "the middle of " << bits << " is not a float";
    const uint16_t even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(stored<TypeParam>(middle), even) << bits;
    ASSERT_EQ(stored<TypeParam>(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(stored<TypeParam>(std::nextafter(middle, INFINITY)), bits + 1);
    ASSERT_EQ(stored<TypeParam>(-middle), even | 0x8000);
  }
  ASSERT_EQ(stored<TypeParam>(std::numeric_limits<float>::max()), infinity);
  ASSERT_EQ(stored<TypeParam>(-std::numeric_limits<float>::max()), infinity | 0x8000);
}

}  // namespace
}  // namespace entropy_rl
