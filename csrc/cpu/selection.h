// Exact selection of the k largest keys on the CPU: a histogram radix select, 11 bits a digit, each
// pass over the keys that share the digits found before it, then one pass that writes the mask.
// Bytes moved: all keys three times, few of them again for each further digit, and the mask once.
// Counts are integers, so the result does not depend on how many threads share the work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../kernels/selection.h"

namespace entropy_rl::cpu {

// 2048 counters of 8 bytes: a thread's histogram stays in its L1 cache.
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
// Below this many keys a range is not worth a thread of its own.
constexpr int64_t kKeysPerRange = 1 << 14;

// Contiguous ranges of nearly equal length, at most one for each thread.
struct Ranges {
  explicit Ranges(int64_t n)
      : n(n), count(std::clamp<int64_t>(n / kKeysPerRange, 1, torch::stable::get_num_threads())) {}
  int64_t begin(int64_t range) const { return range * (n / count) + std::min(range, n % count); }
  int64_t end(int64_t range) const { return begin(range + 1); }

  // Calls f(range, begin, end) for every range, in parallel where the caller is not parallel
  // itself.
  template <class F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t range = first; range < last; ++range) f(range, begin(range), end(range));
    });
  }

  int64_t n;
  int64_t count;
};

// The k-th largest of a set of keys, how many are larger, and how many are equal to it.
template <class Key>
struct KthLargest {
  Key key;
  int64_t above;
  int64_t equal;
};

// Copies the keys whose bits from `shift` up are `prefix`, without a branch that would be
// mispredicted; returns how many. `out` may be `in`.
template <class Key>
int64_t copy_matching(const Key* in /*[n]*/, int64_t n, int shift, Key prefix, Key* out /*[n]*/) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = in[i];
    out[count] = key;
    count += key >> shift == prefix;
  }
  return count;
}

// Requires 1 <= k <= n.
template <class Key>
KthLargest<Key> kth_largest(const Key* keys /*[n]*/, int64_t n, int64_t k) {
  // The keys of a range that share the digits found so far: at first all, where they lie.
  struct Candidates {
    const Key* keys;
    int64_t count;
  };
  const Ranges ranges(n);
  std::vector<Candidates> candidates;
  for (int64_t range = 0; range < ranges.count; ++range) {
    candidates.push_back({keys + ranges.begin(range), ranges.end(range) - ranges.begin(range)});
  }
  const std::unique_ptr<Key[]> copies(new Key[n]);
  std::vector<int64_t> histograms(ranges.count * kDigits);
  KthLargest<Key> result{0, 0, n};
  constexpr int kBits = 8 * sizeof(Key);
  for (int unknown_bits = kBits; unknown_bits > 0;) {
    const int digit_bits = std::min(kDigitBits, unknown_bits);
    const int shift = unknown_bits - digit_bits;
    const Key digit_mask = (Key{1} << digit_bits) - 1;
    ranges.for_each([&](int64_t range, int64_t begin, int64_t) {
      Candidates& own = candidates[range];
      if (unknown_bits < kBits) {
        Key* copy = copies.get() + begin;
        own = {copy, copy_matching(own.keys, own.count, unknown_bits, result.key, copy)};
      }
      int64_t* histogram = histograms.data() + range * kDigits;
      std::fill_n(histogram, kDigits, 0);
      for (int64_t i = 0; i < own.count; ++i) ++histogram[own.keys[i] >> shift & digit_mask];
    });
    for (Key digit = digit_mask;; --digit) {
      result.equal = 0;
      for (int64_t range = 0; range < ranges.count; ++range) {
        result.equal += histograms[range * kDigits + digit];
      }
      if (result.above + result.equal >= k) {
        result.key = result.key << digit_bits | digit;
        break;
      }
      result.above += result.equal;
    }
    unknown_bits = shift;
  }
  return result;
}

template <class Key>
int64_t count_eligible(const Key* keys /*[n]*/, int64_t n) {
  const Ranges ranges(n);
  std::vector<int64_t> counts(ranges.count);
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    counts[range] = (end - begin) - std::count(keys + begin, keys + end, kIneligibleKey<Key>);
  });
  int64_t total = 0;
  for (const int64_t count : counts) total += count;
  return total;
}

// mask[i] = keys[i] >= key
template <class Key>
void threshold_mask(const Key* keys /*[n]*/, int64_t n, Key key, uint8_t* mask /*[n]*/) {
  Ranges(n).for_each([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) mask[i] = keys[i] >= key;
  });
}

// Sets mask to 1 for the k largest eligible keys, equal keys in order of their index, and to 0
// elsewhere. Where fewer than k keys are eligible, all of these; none where k <= 0.
template <class Key>
void top_k_mask(const Key* keys /*[n]*/, int64_t n, int64_t k, uint8_t* mask /*[n]*/) {
  if (k <= 0 || n == 0) {
    std::fill_n(mask, n, uint8_t{0});
    return;
  }
  const KthLargest<Key> cut = kth_largest(keys, n, std::min(k, n));
  if (cut.key == kIneligibleKey<Key>) return threshold_mask(keys, n, Key{1}, mask);
  const int64_t ties = k - cut.above;
  if (ties == cut.equal) return threshold_mask(keys, n, cut.key, mask);

  const Ranges ranges(n);
  std::vector<int64_t> ties_before(ranges.count + 1, 0);
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    ties_before[range + 1] = std::count(keys + begin, keys + end, cut.key);
  });
  for (int64_t range = 0; range < ranges.count; ++range) {
    ties_before[range + 1] += ties_before[range];
  }
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    int64_t rank = ties_before[range];
    for (int64_t i = begin; i < end; ++i) {
      const bool tie = keys[i] == cut.key;
      mask[i] = keys[i] > cut.key || (tie && rank < ties);
      rank += tie;
    }
  });
}

}  // namespace entropy_rl::cpu
