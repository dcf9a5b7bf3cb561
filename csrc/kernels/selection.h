// Exact selection of the largest values; host and device.
//
// Values are compared as unsigned integer keys of the same order: NaN (of either sign) has the
// highest key, -0.0 equals +0.0, and key 0, below the key of -inf, marks an element that is not
// eligible. The choice depends on integers alone, so it is the same on every device and for every
// split of the work. The few float64 operations (rank and threshold) are not contracted to fused
// multiply-adds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "macros.h"

namespace entropy_rl {

enum class TopRule { kTopK, kThreshold, kQuantile };

// The value type of a key type, and the bits of its sign and of its infinity.
template <class Key>
struct KeyTraits;
template <>
struct KeyTraits<uint32_t> {
  using Key = uint32_t;
  using Value = float;
  static constexpr Key kSign = 0x80000000u;
  static constexpr Key kInfinity = 0x7f800000u;
};
template <>
struct KeyTraits<uint64_t> {
  using Key = uint64_t;
  using Value = double;
  static constexpr Key kSign = 0x8000000000000000u;
  static constexpr Key kInfinity = 0x7ff0000000000000u;
};

template <class Value>
using selection_key_t = std::conditional_t<sizeof(Value) == sizeof(uint64_t), uint64_t, uint32_t>;

template <class Key>
inline constexpr Key kIneligibleKey = 0;
template <class Key>
inline constexpr Key kNaNKey = ~Key{0};

// A key is found digit by digit from its highest bits down. A digit has kDigitBits bits; the last
// one has those that are left.
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// Bits of the digit that begins `shift` bits from the lowest.
constexpr int digit_bits(int key_bits, int shift) {
  return shift > 0 ? kDigitBits : (key_bits - 1) % kDigitBits + 1;
}

// Keys as signed integers of the same order, which torch and atomicMin can compare.
template <class Key>
using signed_key_t = std::conditional_t<sizeof(Key) == sizeof(int64_t), long long, int>;

template <class Key>
ENTROPY_RL_HD inline signed_key_t<Key> signed_key(Key key) {
  return static_cast<signed_key_t<Key>>(key ^ KeyTraits<Key>::kSign);
}
template <class Key>
ENTROPY_RL_HD inline Key unsigned_key(signed_key_t<Key> key) {
  return static_cast<Key>(key) ^ KeyTraits<Key>::kSign;
}

// Order-preserving key of a float or double; never kIneligibleKey. Integer operations only, because
// a comparison of floats treats subnormal numbers as zero where the host or the compiler flushes
// them.
template <class Value>
ENTROPY_RL_HD inline selection_key_t<Value> selection_key(Value value) {
  using Key = selection_key_t<Value>;
  using Traits = KeyTraits<Key>;
  Key bits;
  memcpy(&bits, &value, sizeof(bits));
  const Key magnitude = bits & ~Traits::kSign;
  const bool negative = magnitude != 0 && magnitude != bits;
  const Key ordered = negative ? ~bits : magnitude | Traits::kSign;
  return magnitude > Traits::kInfinity ? kNaNKey<Key> : ordered;
}

// The value whose key it is. `key` is not kIneligibleKey.
template <class Key>
ENTROPY_RL_HD inline typename KeyTraits<Key>::Value selection_value(Key key) {
  using Traits = KeyTraits<Key>;
  const Key bits = key & Traits::kSign ? key ^ Traits::kSign : ~key;
  typename Traits::Value value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Returns `value`, and keeps the compiler from fusing the operation that computed it with the next.
ENTROPY_RL_HD inline double rounded(double value) {
#if defined(__CUDA_ARCH__)
  // A volatile variable would be in local memory. This addition changes nothing and is never fused.
  return __dadd_rn(value, -0.0);
#else
  volatile double result = value;
  return result;
#endif
}

// How many of n > 0 eligible elements are kept at `ratio` in (0, 1]: max(1, int(n * ratio +
// 0.9999)), the expression of the paper's authors, and at most n.
ENTROPY_RL_HD inline int64_t top_count(int64_t n, double ratio) {
  const double product = rounded(static_cast<double>(n) * ratio);
  const int64_t count = static_cast<int64_t>(product + 0.9999);
  return count < 1 ? 1 : count > n ? n : count;
}

// The (1 - ratio) quantile of n > 0 ascending values is `weight` of the way from value number
// `lower`, counted from 0, to the next one. If weight > 0, there is a next one.
struct QuantilePosition {
  int64_t lower;
  double weight;
};

ENTROPY_RL_HD inline QuantilePosition quantile_position(int64_t n, double ratio) {
  const double position = rounded((1.0 - ratio) * static_cast<double>(n - 1));
  const double lower = floor(position);
  return {static_cast<int64_t>(lower), position - lower};
}

// Key of the value `weight` of the way between two neighbours, interpolated in float64 and rounded
// to their type. Equal neighbours give their value, also if it is infinite. A lower neighbour of
// -inf gives -inf, an upper neighbour of NaN gives NaN.
template <class Key>
ENTROPY_RL_HD inline Key quantile_key(Key lower, Key upper, double weight) {
  using Value = typename KeyTraits<Key>::Value;
  if (weight == 0.0 || lower == upper) return lower;
  if (upper == kNaNKey<Key>) return kNaNKey<Key>;
  const double low = static_cast<double>(selection_value(lower));
  const double high = static_cast<double>(selection_value(upper));
  if (low == -INFINITY) return lower;
  const double step = rounded(weight * rounded(high - low));
  const Key key = selection_key(static_cast<Value>(low + step));
  // Rounding must not lift the threshold above the upper neighbour.
  return key < upper ? key : upper;
}

// ---- Keys that several processes hold ----

// One process's part of the choice: it keeps its keys above `key`, and of the keys equal to `key`
// all, or the first `ties`.
template <class Key>
struct ProcessCut {
  Key key;
  bool keeps_all_ties;
  int64_t ties;                           // not used if all are kept
  typename KeyTraits<Key>::Value lowest;  // value kept by any process; inf for NaN, 0 for none
};

// The k-th largest key over all processes.
struct FoundKey {
  int64_t bits;  // the key
  int64_t k;  // how many of the keys equal to it are among the k largest; <= 0: nothing is selected
};

template <class Key>
ENTROPY_RL_HD inline ProcessCut<Key> no_cut() {
  return {kNaNKey<Key>, false, 0, 0};
}

// Keeps the keys from `key` up in every process; `lowest` is the smallest of these.
template <class Key>
ENTROPY_RL_HD inline ProcessCut<Key> cut_at(Key key, Key lowest) {
  const auto infinity = static_cast<typename KeyTraits<Key>::Value>(INFINITY);
  return {key, true, 0, lowest == kNaNKey<Key> ? infinity : selection_value(lowest)};
}
template <class Key>
ENTROPY_RL_HD inline ProcessCut<Key> cut_at(const FoundKey& found) {
  const Key key = static_cast<Key>(found.bits);
  return found.k > 0 ? cut_at(key, key) : no_cut<Key>();
}

// Keeps k of the equal keys, those of the first processes. This process holds `ties` of them, and
// the processes before it hold `ties_before`.
template <class Key>
ENTROPY_RL_HD inline ProcessCut<Key> cut_ties(const FoundKey& found, int64_t ties_before,
                                              int64_t ties) {
  ProcessCut<Key> cut = cut_at<Key>(found);
  if (found.k <= 0) return cut;
  const int64_t left = found.k - ties_before;
  if (left < ties) {
    cut.keeps_all_ties = false;
    cut.ties = left > 0 ? left : 0;
  }
  return cut;
}

// Cuts `weight` of the way from the found key to the next value up. That value is the same one if
// the key occurs more than once, and otherwise `next`, the smallest larger key.
template <class Key>
ENTROPY_RL_HD inline ProcessCut<Key> cut_quantile(const FoundKey& found, Key next, double weight) {
  if (found.k <= 0) return no_cut<Key>();
  const Key lower = static_cast<Key>(found.bits);
  const Key upper = found.k > 1 ? lower : next;
  const Key cut = quantile_key(lower, upper, weight);
  return cut_at(cut, cut > lower ? upper : lower);
}

}  // namespace entropy_rl
