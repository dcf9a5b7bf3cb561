// Exact selection of the k largest keys on the CPU. A source computes keys block by block in the
// first-level cache, so the keys are not stored.
//
// Of many keys a sample gives a window that most probably has the k-th largest. One pass counts the
// keys above the window, writes the mask for all keys outside of it and copies those inside, among
// which the k-th is found. Of few keys, or where the window missed, a radix select over digits of
// 11 bits finds it: the first pass counts the first digit; the second copies the few keys that
// share it, which the passes for the further digits read; the last writes the mask.
//
// Counts are integers, so the result depends neither on the sample nor on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../kernels/selection.h"
#include "simd.h"
#if defined(ENTROPY_RL_X86_SIMD)
#include <immintrin.h>
#endif

namespace entropy_rl::cpu {
// Keys that a source computes at a time.
constexpr int kBlockKeys = 1024;
// How many more keys than it finds split_at_window may write: those of a vector.
constexpr int kWindowSlack = 16;

// For each set of 8 elements, as bits, the permutation that packs its elements to the front: a byte
// for each place, of which AVX2 reads the 3 low bits. The 5 high bits of the last byte are how many
// elements the set has.
struct PackOrders {
  uint64_t of[256] = {};

  constexpr PackOrders() {
    for (int set = 0; set < 256; ++set) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if (set >> i & 1) of[set] |= static_cast<uint64_t>(i) << 8 * count++;
      }
      of[set] |= static_cast<uint64_t>(count) << 59;
    }
  }
};
inline constexpr PackOrders kPackOrders;
}  // namespace entropy_rl::cpu

#define ENTROPY_RL_LOOPS "radix_select_loops.h"
#include "each_simd.h"

namespace entropy_rl::cpu {

// A thread takes at least this many keys.
constexpr int64_t kKeysPerRange = 1 << 14;
// So that no counter of a range overflows.
constexpr int64_t kMaxKeysPerRange = int64_t{1} << 31;

// Contiguous ranges of nearly equal length, one for each thread where n is neither small nor huge.
struct Ranges {
  explicit Ranges(int64_t n)
      : n(n),
        count(std::max(std::clamp<int64_t>(n / kKeysPerRange, 1, torch::stable::get_num_threads()),
                       n / kMaxKeysPerRange + 1)) {}
  int64_t begin(int64_t range) const { return range * (n / count) + std::min(range, n % count); }
  int64_t end(int64_t range) const { return begin(range + 1); }

  // Calls f(range, begin, end) for every range, in parallel unless the caller is.
  template <class F>
  void for_each(const F& f) const {
    simd();
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

// A source of keys in memory. A source has
//   const Key* read(int64_t begin, int count, Key* buffer) const;
// which returns the keys [begin, begin + count), count <= kBlockKeys; it may write them to
// `buffer`.
template <class KeyType>
struct StoredKeys {
  using Key = KeyType;
  const Key* keys;

  const Key* read(int64_t begin, int, Key*) const { return keys + begin; }
};

// Calls f(first index, count, keys) for each block of [begin, end).
template <class Source, class F>
void for_each_block(const Source& source, int64_t begin, int64_t end, const F& f) {
  alignas(64) typename Source::Key buffer[kBlockKeys];
  for (; begin < end; begin += kBlockKeys) {
    const int count = static_cast<int>(std::min<int64_t>(end - begin, kBlockKeys));
    f(begin, count, source.read(begin, count, buffer));
  }
}

// Counters of one digit: 2048 of 4 bytes, so that a thread's histograms stay in its L1 cache.
// Neighbouring keys often have the same digit. Several histograms take turns, so that an increment
// need not wait for the previous one.
struct DigitCounts {
  static constexpr int kHistograms = 4;
  uint32_t counts[kHistograms][kDigits] = {};

  template <class Key>
  void add(const Key* keys, int count, int shift, Key digit_mask) {
    int i = 0;
    for (; i + kHistograms <= count; i += kHistograms) {
      for (int h = 0; h < kHistograms; ++h) ++counts[h][keys[i + h] >> shift & digit_mask];
    }
    for (; i < count; ++i) ++counts[0][keys[i] >> shift & digit_mask];
  }
  void write(uint32_t* histogram /*[kDigits]*/) const {
    for (int digit = 0; digit < kDigits; ++digit) {
      uint32_t sum = 0;
      for (int h = 0; h < kHistograms; ++h) sum += counts[h][digit];
      histogram[digit] = sum;
    }
  }
};

// Copies the keys whose bits from `shift` up are `prefix`, and returns how many they are. Has no
// branch, which would be mispredicted, and so writes one more key than it returns. `out` may be
// `in`.
template <class Key>
int64_t copy_matching(const Key* in /*[n]*/, int64_t n, int shift, Key prefix, Key* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = in[i];
    out[count] = key;
    count += key >> shift == prefix;
  }
  return count;
}

template <class Key>
bool any_matches(const Key* keys, int count, int shift, Key prefix) {
  ENTROPY_RL_SIMD_CALL(any_matches(keys, count, shift, prefix));
}

// For each range, a histogram of the digit at `shift` of the keys whose higher bits are `prefix`.
template <class Source>
std::vector<uint32_t> count_digits(const Source& source, const Ranges& ranges, int shift,
                                   typename Source::Key prefix) {
  using Key = typename Source::Key;
  constexpr int kBits = 8 * sizeof(Key);
  const int unknown_bits = shift + digit_bits(kBits, shift);
  const Key digit_mask = (Key{1} << (unknown_bits - shift)) - 1;
  std::vector<uint32_t> histograms(ranges.count * kDigits);
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    DigitCounts counts;
    Key matching[kBlockKeys + 1];
    for_each_block(source, begin, end, [&](int64_t, int count, const Key* keys) {
      if (unknown_bits < kBits) {
        if (!any_matches(keys, count, unknown_bits, prefix)) return;
        count = static_cast<int>(copy_matching(keys, count, unknown_bits, prefix, matching));
        keys = matching;
      }
      counts.add(keys, count, shift, digit_mask);
    });
    counts.write(histograms.data() + range * kDigits);
  });
  return histograms;
}

// Requires 1 <= k <= n.
template <class Source>
KthLargest<typename Source::Key> kth_largest(const Source& source, int64_t n, int64_t k) {
  using Key = typename Source::Key;
  constexpr int kBits = 8 * sizeof(Key);
  const Ranges ranges(n);
  constexpr int kFirstShift = kBits - kDigitBits;
  std::vector<uint32_t> histograms(ranges.count * kDigits);
  KthLargest<Key> result{0, 0, n};
  const auto descend = [&](int digit_bits) {
    for (Key digit = (Key{1} << digit_bits) - 1;; --digit) {
      result.equal = 0;
      for (int64_t range = 0; range < ranges.count; ++range) {
        result.equal += histograms[range * kDigits + digit];
      }
      if (result.above + result.equal >= k) {
        result.key = result.key << digit_bits | digit;
        return;
      }
      result.above += result.equal;
    }
  };
  // Not count_digits, because this pass is faster with a constant shift.
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    DigitCounts counts;
    for_each_block(source, begin, end, [&](int64_t, int count, const Key* keys) {
      counts.add(keys, count, kFirstShift, Key{kDigits - 1});
    });
    counts.write(histograms.data() + range * kDigits);
  });
  descend(kDigitBits);

  // The keys of a range that share the digits found so far, with room for one more.
  struct Candidates {
    Key* keys;
    int64_t count;
  };
  const std::unique_ptr<Key[]> copies(new Key[result.equal + ranges.count]);
  std::vector<Candidates> candidates;
  for (int64_t range = 0, offset = 0; range < ranges.count; ++range) {
    candidates.push_back({copies.get() + offset, 0});
    offset += histograms[range * kDigits + result.key] + 1;
  }
  for (int unknown_bits = kFirstShift; unknown_bits > 0;) {
    const int digit_bits = std::min(kDigitBits, unknown_bits);
    const int shift = unknown_bits - digit_bits;
    const Key digit_mask = (Key{1} << digit_bits) - 1;
    ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
      Candidates& own = candidates[range];
      if (unknown_bits == kFirstShift) {
        for_each_block(source, begin, end, [&](int64_t, int count, const Key* keys) {
          own.count += copy_matching(keys, count, unknown_bits, result.key, own.keys + own.count);
        });
      } else {
        own.count = copy_matching(own.keys, own.count, unknown_bits, result.key, own.keys);
      }
      uint32_t* histogram = histograms.data() + range * kDigits;
      std::fill_n(histogram, kDigits, 0);
      for (int64_t i = 0; i < own.count; ++i) ++histogram[own.keys[i] >> shift & digit_mask];
    });
    descend(digit_bits);
    unknown_bits = shift;
  }
  return result;
}

template <class Key>
void write_at_least(const Key* keys, int count, Key key, uint8_t* mask) {
  ENTROPY_RL_SIMD_CALL(write_at_least(keys, count, key, mask));
}

template <class Key>
Key smallest_above(const Key* keys, int count, Key key) {
  ENTROPY_RL_SIMD_CALL(smallest_above(keys, count, key));
}

// mask[i] = keys[i] >= key
template <class Source, class Key>
void threshold_mask(const Source& source, int64_t n, Key key, uint8_t* mask /*[n]*/) {
  Ranges(n).for_each([&](int64_t, int64_t begin, int64_t end) {
    for_each_block(source, begin, end, [&](int64_t first, int count, const Key* keys) {
      write_at_least(keys, count, key, mask + first);
    });
  });
}

// Sets mask to 1 for the keys above `key` and the first `ties` that equal it, and to 0 elsewhere.
template <class Source, class Key>
void first_ties_mask(const Source& source, int64_t n, Key key, int64_t ties,
                     uint8_t* mask /*[n]*/) {
  const Ranges ranges(n);
  std::vector<int64_t> ties_before(ranges.count + 1, 0);
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    int64_t equal = 0;
    for_each_block(source, begin, end, [&](int64_t, int count, const Key* keys) {
      equal += std::count(keys, keys + count, key);
    });
    ties_before[range + 1] = equal;
  });
  for (int64_t range = 0; range < ranges.count; ++range) {
    ties_before[range + 1] += ties_before[range];
  }
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    int64_t rank = ties_before[range];
    for_each_block(source, begin, end, [&](int64_t first, int count, const Key* keys) {
      for (int i = 0; i < count; ++i) {
        const bool tie = keys[i] == key;
        mask[first + i] = (keys[i] > key) | (tie & (rank < ties));
        rank += tie;
      }
    });
  });
}

// What a selection keeps: the keys above `key`, and the first `ties` of those that equal it.
template <class Key>
struct Cut {
  static constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  Key key;
  int64_t ties;

  // Keeps the k largest keys, or all eligible ones if these are fewer.
  static Cut largest(int64_t k, const KthLargest<Key>& kth) {
    if (kth.key == kIneligibleKey<Key>) return {Key{1}, kAll};
    const int64_t ties = k - kth.above;
    return {kth.key, ties == kth.equal ? kAll : ties};
  }
};

// The keys of one range that lie within a window of keys, and their places in the range.
template <class Key>
struct WindowPart {
  std::unique_ptr<Key[]> keys;
  std::unique_ptr<uint32_t[]> places;
  int64_t count = 0;
  int64_t above = 0;  // keys of the range above the window
  bool complete = true;
};

template <class Key>
int split_at_window(const Key* keys, int count, Key low, Key high, uint32_t first, uint8_t* above,
                    Key* inside, uint32_t* places) {
  ENTROPY_RL_SIMD_CALL(split_at_window(keys, count, low, high, first, above, inside, places));
}

inline int count_nonzero(const uint8_t* mask, int n) {
  ENTROPY_RL_SIMD_CALL(count_nonzero(mask, n));
}

// Keys [low, high] that most probably include the k-th largest of n, from a sample of them.
template <class Key>
struct Window {
  Key low, high;

  template <class Source>
  Window(const Source& source, int64_t n, int64_t k) {
    constexpr int kNeighbours = 16;  // keys that are read at a time, a cache line of floats
    const int64_t stride = std::max<int64_t>(n / 1024, 4 * kNeighbours);
    std::vector<Key> sample;
    sample.reserve(n / stride * kNeighbours);
    for (int64_t i = 0; i < n / stride; ++i) {
      Key buffer[kNeighbours];
      // Not the same place in every row of a batch.
      const int64_t offset = i * 37 % (stride / kNeighbours) * kNeighbours;
      const Key* keys = source.read(i * stride + offset, kNeighbours, buffer);
      sample.insert(sample.end(), keys, keys + kNeighbours);
    }
    const int64_t size = sample.size();
    const StoredKeys<Key> keys{sample.data()};
    // Four standard deviations of the k-th largest key's rank in a sample of independent keys.
    const double share = static_cast<double>(k) / n;
    const double margin = 4 * std::sqrt(size * share * (1 - share)) + 2;
    const auto first = static_cast<int64_t>(size * share - margin);
    const auto last = static_cast<int64_t>(size * share + margin) + 1;
    high = first < 1 ? kNaNKey<Key> : kth_largest(keys, size, first).key;
    low = last > size ? kIneligibleKey<Key> : kth_largest(keys, size, last).key;
    // Keys that are not eligible are never copied.
    low = std::max(low, Key{1});
    high = std::max(high, low);
  }
};

// Writes the mask of select_mask, or returns false if the deciding keys are not in the window or
// the window has too many.
template <class Source, class CutOf>
bool windowed_mask(const Source& source, int64_t n, int64_t k, const CutOf& cut_of,
                   uint8_t* mask /*[n]*/) {
  using Key = typename Source::Key;
  const Window<Key> window(source, n, k);
  const Ranges ranges(n);
  std::vector<WindowPart<Key>> parts(ranges.count);
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    WindowPart<Key> part;
    // Twice the share of the keys that a window takes most often, unless many keys are equal.
    const int64_t capacity = (end - begin) / 12;
    part.keys.reset(new Key[capacity + kBlockKeys + kWindowSlack]);
    part.places.reset(new uint32_t[capacity + kBlockKeys + kWindowSlack]);
    for_each_block(source, begin, end, [&](int64_t first, int count, const Key* keys) {
      part.complete = part.complete && part.count <= capacity;
      if (!part.complete) return;
      part.count += split_at_window(keys, count, window.low, window.high,
                                    static_cast<uint32_t>(first - begin), mask + first,
                                    part.keys.get() + part.count, part.places.get() + part.count);
      part.above += count_nonzero(mask + first, count);
    });
    parts[range] = std::move(part);
  });
  int64_t above = 0;
  std::vector<Key> inside;
  for (const WindowPart<Key>& part : parts) {
    if (!part.complete) return false;
    above += part.above;
    inside.insert(inside.end(), part.keys.get(), part.keys.get() + part.count);
  }
  const int64_t size = inside.size();
  bool found = true;
  const Cut<Key> cut = cut_of([&](int64_t rank) {
    if (rank <= above || rank > above + size) {
      found = false;
      return KthLargest<Key>{};
    }
    KthLargest<Key> kth = kth_largest(StoredKeys<Key>{inside.data()}, size, rank - above);
    kth.above += above;
    return kth;
  });
  if (!found) return false;
  int64_t ties = 0;
  for (int64_t range = 0; range < ranges.count; ++range) {
    const WindowPart<Key>& part = parts[range];
    uint8_t* of_range = mask + ranges.begin(range);
    for (int64_t i = 0; i < part.count; ++i) {
      const bool tie = part.keys[i] == cut.key;
      of_range[part.places[i]] = (part.keys[i] > cut.key) | (tie & (ties < cut.ties));
      ties += tie;
    }
  }
  return true;
}

// Fewer keys are selected faster without a window.
constexpr int64_t kWindowedKeys = 1 << 16;

// Sets mask to 1 for the keys of a cut, and to 0 elsewhere. cut_of(kth) makes the cut from the key
// of rank k, and perhaps k - 1, where kth(rank) is the KthLargest of all keys. Requires
// 1 <= k <= n.
template <class Source, class CutOf>
void select_mask(const Source& source, int64_t n, int64_t k, const CutOf& cut_of,
                 uint8_t* mask /*[n]*/) {
  using Key = typename Source::Key;
  if (n >= kWindowedKeys && windowed_mask(source, n, k, cut_of, mask)) return;
  const Cut<Key> cut = cut_of([&](int64_t rank) { return kth_largest(source, n, rank); });
  if (cut.ties == Cut<Key>::kAll) {
    threshold_mask(source, n, cut.key, mask);
  } else {
    first_ties_mask(source, n, cut.key, cut.ties, mask);
  }
}

// Sets mask to 1 for the k largest eligible keys, equal keys in order of their index, and to 0
// elsewhere. If fewer than k keys are eligible, all of them are set; if k <= 0, none.
template <class Source>
void top_k_mask(const Source& source, int64_t n, int64_t k, uint8_t* mask /*[n]*/) {
  using Key = typename Source::Key;
  if (k <= 0 || n == 0) {
    std::fill_n(mask, n, uint8_t{0});
    return;
  }
  k = std::min(k, n);
  select_mask(source, n, k, [k](const auto& kth) { return Cut<Key>::largest(k, kth(k)); }, mask);
}

// The smallest key above `key`.
template <class Source, class Key>
Key next_key(const Source& source, int64_t n, Key key) {
  const Ranges ranges(n);
  std::vector<Key> smallest(ranges.count, kNaNKey<Key>);
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    for_each_block(source, begin, end, [&](int64_t, int count, const Key* keys) {
      smallest[range] = std::min(smallest[range], smallest_above(keys, count, key));
    });
  });
  return *std::min_element(smallest.begin(), smallest.end());
}

}  // namespace entropy_rl::cpu
