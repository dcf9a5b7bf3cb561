// What the softmax tests compare with: the definitions, in long double, one line each.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/dtypes.h"

namespace entropy_rl::testing {

using Real = long double;

template <class T>
T element(double value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<T>(value);
  } else {
    T result;
    store_value(static_cast<float>(value), &result);
    return result;
  }
}

// `count` normal values times `scale`, rounded to T.
template <class T>
std::vector<T> normal_values(size_t count, double scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<T> values(count);
  for (T& value : values) value = element<T>(normal(random));
  return values;
}

// log softmax(x / temperature) of a row with at least one finite and no infinite positive logit.
inline std::vector<Real> log_softmax(const std::vector<Real>& x, Real temperature = 1) {
  const Real max = *std::max_element(x.begin(), x.end());
  Real sum = 0;
  for (Real value : x) sum += std::exp((value - max) / temperature);
  std::vector<Real> result;
  for (Real value : x) result.push_back((value - max) / temperature - std::log(sum));
  return result;
}

// -sum p log p, where 0 log 0 is 0.
inline Real entropy_of(const std::vector<Real>& log_p) {
  Real entropy = 0;
  for (Real value : log_p) entropy -= std::isinf(value) ? 0 : std::exp(value) * value;
  return entropy;
}

// d(grad_log_prob * log p_target + grad_entropy * H) / dx_j, by the derivative of each term.
inline std::vector<Real> softmax_gradient(const std::vector<Real>& log_p, int64_t target,
                                          Real grad_log_prob, Real grad_entropy,
                                          Real temperature = 1) {
  const Real entropy = entropy_of(log_p);
  std::vector<Real> gradient;
  for (size_t j = 0; j < log_p.size(); ++j) {
    const Real p = std::exp(log_p[j]);
    const Real of_log_prob = (static_cast<int64_t>(j) == target ? 1 : 0) - p;
    const Real of_entropy = p == 0 ? 0 : -p * (log_p[j] + entropy);
    gradient.push_back((grad_log_prob * of_log_prob + grad_entropy * of_entropy) / temperature);
  }
  return gradient;
}

// Absolute bound on entropy and log-probability, and on a gradient for a unit incoming gradient, of
// sums kept in Acc: the project's promise for float, and as many roundings in double.
template <class Acc>
constexpr double kValueTolerance = 1e-5;
template <>
inline constexpr double kValueTolerance<double> = 1e-13;
template <class Acc>
constexpr double kGradientTolerance = 1e-6;
template <>
inline constexpr double kGradientTolerance<double> = 1e-14;

// Bits of T's significand, and the exponent of its smallest normal number.
template <class T>
constexpr int kDigits = std::numeric_limits<T>::digits;
template <>
inline constexpr int kDigits<BFloat16> = 8;
template <>
inline constexpr int kDigits<Half> = 11;
template <class T>
constexpr int kMinExponent = std::numeric_limits<T>::min_exponent - 1;
template <>
inline constexpr int kMinExponent<BFloat16> = -126;
template <>
inline constexpr int kMinExponent<Half> = -14;

// How far rounding to T moves `value` at most: half a unit in the last place.
template <class T>
Real rounding_error(Real value) {
  return std::ldexp(std::max(std::abs(value), std::ldexp(Real(1), kMinExponent<T>)), -kDigits<T>);
}

}  // namespace entropy_rl::testing
