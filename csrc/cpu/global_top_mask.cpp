#include <limits>
#include <memory>
#include <numeric>

#include "../ops/global_top_mask.h"
#include "radix_select.h"

namespace entropy_rl::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;

template <class Element>
void write_keys(const Element* entropy /*[n]*/, const uint8_t* mask /*[n]*/, int64_t n,
                selection_key_t<accumulate_t<Element>>* keys /*[n]*/) {
  ENTROPY_RL_SIMD_CALL(write_keys(entropy, mask, n, keys));
}

// A source of keys, computed from entropies.
template <class Element>
struct EntropyKeys {
  using Key = selection_key_t<accumulate_t<Element>>;
  const Element* entropy;
  const uint8_t* mask;

  const Key* read(int64_t begin, int count, Key* buffer) const {
    write_keys(entropy + begin, mask + begin, count, buffer);
    return buffer;
  }
};

int64_t count_eligible(const uint8_t* mask /*[n]*/, int64_t n) {
  constexpr int64_t kBlock = 1 << 12;
  const Ranges ranges(n);
  std::vector<int64_t> counts(ranges.count);
  ranges.for_each([&](int64_t range, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (; begin < end; begin += kBlock) {
      count += count_nonzero(mask + begin, static_cast<int>(std::min(end - begin, kBlock)));
    }
    counts[range] = count;
  });
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

template <class Source>
void select_segment(const Source& source, int64_t n, int64_t eligible, double ratio, TopRule rule,
                    uint8_t* mask /*[n]*/) {
  using Key = typename Source::Key;
  if (eligible == 0) {
    std::fill_n(mask, n, uint8_t{0});
  } else if (rule == TopRule::kTopK) {
    top_k_mask(source, n, top_count(eligible, ratio), mask);
  } else if (rule == TopRule::kThreshold) {
    const int64_t k = top_count(eligible, ratio);
    const auto cut_of = [k](const auto& kth) { return Cut<Key>{kth(k).key, Cut<Key>::kAll}; };
    select_mask(source, n, k, cut_of, mask);
  } else {
    const QuantilePosition position = quantile_position(eligible, ratio);
    const int64_t k = eligible - position.lower;
    const auto cut_of = [&](const auto& kth) {
      const Key lower = kth(k).key;
      const Key upper = position.weight > 0 ? kth(k - 1).key : lower;
      return Cut<Key>{quantile_key(lower, upper, position.weight), Cut<Key>::kAll};
    };
    select_mask(source, n, k, cut_of, mask);
  }
}

// The rows, ordered so that those of a segment are neighbours, and the position in that order at
// which each segment begins. Rows of one group keep their order, so that ties go to the lowest
// index of the original tensor.
struct RowOrder {
  std::vector<int64_t> rows;
  std::vector<int64_t> begins;  // one more than there are segments

  explicit RowOrder(const TopMaskArguments& in) : rows(in.rows) {
    std::iota(rows.begin(), rows.end(), 0);
    const int64_t* ids = const_data<int64_t>(in.group_ids);
    if (ids) {
      std::stable_sort(rows.begin(), rows.end(),
                       [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    }
    for (int64_t i = 0; i < in.rows; ++i) {
      if (i == 0 || !ids || ids[rows[i]] != ids[rows[i - 1]]) begins.push_back(i);
    }
    begins.push_back(in.rows);
  }
};

// Calls f(segment) for every segment: in parallel if there is a segment for each thread, and
// otherwise one after another, each with all threads.
template <class F>
void for_each_segment(int64_t segments, const F& f) {
  if (segments < torch::stable::get_num_threads()) {
    for (int64_t segment = 0; segment < segments; ++segment) f(segment);
    return;
  }
  torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t segment = begin; segment < end; ++segment) f(segment);
  });
}

template <class Element>
void select(const TopMaskArguments& in, uint8_t* out /*[rows, columns]*/) {
  using Key = selection_key_t<accumulate_t<Element>>;
  simd();
  const Element* entropy = const_data<Element>(in.entropy);
  const uint8_t* mask = const_data<uint8_t>(in.mask);
  const int64_t columns = in.columns;

  if (in.scope != TopScope::kGroup) {
    for_each_segment(in.rows, [&](int64_t row) {
      const int64_t begin = row * columns;
      select_segment(EntropyKeys<Element>{entropy + begin, mask + begin}, columns,
                     count_eligible(mask + begin, columns), in.ratio, in.rule, out + begin);
    });
    return;
  }

  // Keys are stored in an order in which the rows of a group are neighbours.
  const RowOrder order(in);
  const int64_t n = in.rows * columns;
  const std::unique_ptr<Key[]> keys(new Key[n]);
  const std::unique_ptr<uint8_t[]> ordered(new uint8_t[n]);
  const int64_t row_grain = std::max<int64_t>(1, kGrain / columns);
  torch::stable::parallel_for(0, in.rows, row_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t source = order.rows[i] * columns;
      write_keys(entropy + source, mask + source, columns, keys.get() + i * columns);
    }
  });
  for_each_segment(static_cast<int64_t>(order.begins.size()) - 1, [&](int64_t segment) {
    const int64_t begin = order.begins[segment] * columns;
    const int64_t end = order.begins[segment + 1] * columns;
    int64_t eligible = 0;
    for (int64_t i = order.begins[segment]; i < order.begins[segment + 1]; ++i) {
      eligible += count_eligible(mask + order.rows[i] * columns, columns);
    }
    select_segment(StoredKeys<Key>{keys.get() + begin}, end - begin, eligible, in.ratio, in.rule,
                   ordered.get() + begin);
  });
  torch::stable::parallel_for(0, in.rows, row_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(ordered.get() + i * columns, columns, out + order.rows[i] * columns);
    }
  });
}

Tensor global_top_mask_forward(const Tensor& entropy, const Tensor& response_mask,
                               const Tensor& top_ratio, std::string rule, std::string scope,
                               std::optional<Tensor> group_ids, std::string algorithm) {
  const TopMaskArguments in(entropy, response_mask, top_ratio, rule, scope, group_ids, algorithm);
  Tensor result = in.new_mask();
  if (result.numel() == 0) return result;
  dispatch_floating(in.entropy.scalar_type(), [&](auto element) {
    select<decltype(element)>(in, mutable_data<uint8_t>(result));
  });
  return result;
}

// ---- Steps for values that several processes hold ----

// The sum of counts, each 0 or above; an error if they are not, or if int64 cannot hold it.
int64_t sum_of_counts(const char* name, const int64_t* counts, int64_t size) {
  int64_t total = 0;
  for (int64_t i = 0; i < size; ++i) {
    check(counts[i] >= 0 && counts[i] <= std::numeric_limits<int64_t>::max() - total, name, "[", i,
          "] is ", counts[i], "; it must be 0 or above, and the sum of ", name, " below 2^63");
    total += counts[i];
  }
  return total;
}

Tensor new_number(const Tensor& like, ScalarType dtype) { return new_tensor(like, {}, dtype); }

Tensor global_top_mask_counts(const Tensor& values, const Tensor& mask, std::optional<Tensor> key,
                              int64_t shift) {
  const ProcessValues in(values, mask);
  const DigitArguments digit(shift, in.key_bits(), key, in.values);
  const int64_t n = in.values.numel();
  Tensor result = new_zero_tensor(in.values, {int64_t{1} << digit.bits}, ScalarType::Long);
  int64_t* counts = mutable_data<int64_t>(result);
  dispatch_floating(in.values.scalar_type(), [&](auto element) {
    using Keys = EntropyKeys<decltype(element)>;
    using Key = typename Keys::Key;
    const Keys keys{const_data<decltype(element)>(in.values), const_data<uint8_t>(in.mask)};
    const Key prefix =
        key ? static_cast<Key>(*const_data<int64_t>(key)) >> (digit.shift + digit.bits) : 0;
    const Ranges ranges(n);
    const std::vector<uint32_t> histograms = count_digits(keys, ranges, digit.shift, prefix);
    for (int64_t range = 0; range < ranges.count; ++range) {
      for (int64_t i = 0; i < result.numel(); ++i) counts[i] += histograms[range * kDigits + i];
    }
    // kIneligibleKey is counted as digit 0.
    if (prefix == 0) counts[0] -= n - count_eligible(keys.mask, n);
  });
  return result;
}

std::tuple<Tensor, Tensor> global_top_mask_key(const Tensor& counts, std::optional<Tensor> key,
                                               const Tensor& k, int64_t shift) {
  const CountsArguments in(counts, key, k, shift);
  const int64_t* count = const_data<int64_t>(in.counts);
  Tensor found = new_number(in.counts, ScalarType::Long);
  Tensor k_left = new_number(in.counts, ScalarType::Long);
  const int64_t total = sum_of_counts("counts", count, in.digits);
  int64_t left = std::min(*const_data<int64_t>(k), total);
  uint64_t bits = ~uint64_t{0};
  if (left <= 0) {
    left = 0;
  } else {
    uint64_t digit = in.digits - 1;
    for (; left > count[digit]; --digit) left -= count[digit];
    bits = (key ? *const_data<uint64_t>(key) : 0) | digit << shift;
  }
  *mutable_data<uint64_t>(found) = bits;
  *mutable_data<int64_t>(k_left) = left;
  return {found, k_left};
}

Tensor global_top_mask_next_key(const Tensor& values, const Tensor& mask, const Tensor& key) {
  const ProcessValues in(values, mask);
  check_number("key", key, ScalarType::Long, "values", in.values);
  Tensor result = new_number(in.values, in.key_bits() == 64 ? ScalarType::Long : ScalarType::Int);
  dispatch_floating(in.values.scalar_type(), [&](auto element) {
    using Keys = EntropyKeys<decltype(element)>;
    using Key = typename Keys::Key;
    const Keys keys{const_data<decltype(element)>(in.values), const_data<uint8_t>(in.mask)};
    *mutable_data<signed_key_t<Key>>(result) =
        signed_key(next_key(keys, in.values.numel(), static_cast<Key>(*const_data<int64_t>(key))));
  });
  return result;
}

std::tuple<Tensor, Tensor> global_top_mask_at_key(const Tensor& values, const Tensor& mask,
                                                  const Tensor& key, const Tensor& k,
                                                  std::optional<Tensor> ties, int64_t process,
                                                  std::optional<Tensor> next_key,
                                                  std::optional<Tensor> weight) {
  const ProcessValues in(values, mask);
  check_found(in, key, k, ties, process, next_key, weight);
  const FoundKey found{*const_data<int64_t>(key), *const_data<int64_t>(k)};
  const int64_t n = in.values.numel();
  Tensor result = new_tensor(in.values, shape_of(in.values), ScalarType::Bool);
  Tensor lowest = new_number(in.values, accumulate_dtype(in.values.scalar_type()));
  dispatch_floating(in.values.scalar_type(), [&](auto element) {
    using Keys = EntropyKeys<decltype(element)>;
    using Key = typename Keys::Key;
    ProcessCut<Key> cut = cut_at<Key>(found);
    if (ties) {
      const Tensor all = contiguous_tensor(*ties);
      const int64_t* of_process = const_data<int64_t>(all);
      sum_of_counts("ties", of_process, all.numel());
      cut = cut_ties<Key>(found, sum_of_counts("ties", of_process, process), of_process[process]);
    } else if (next_key) {
      const Key next = unsigned_key<Key>(*const_data<signed_key_t<Key>>(next_key));
      cut = cut_quantile(found, next, *const_data<double>(weight));
    }
    *mutable_data<typename KeyTraits<Key>::Value>(lowest) = cut.lowest;
    const Keys keys{const_data<decltype(element)>(in.values), const_data<uint8_t>(in.mask)};
    uint8_t* out = mutable_data<uint8_t>(result);
    if (cut.keeps_all_ties) {
      threshold_mask(keys, n, cut.key, out);
    } else {
      first_ties_mask(keys, n, cut.key, cut.ties, out);
    }
  });
  return {result, lowest};
}

}  // namespace
}  // namespace entropy_rl::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("global_top_mask_forward", TORCH_BOX(&entropy_rl::cpu::global_top_mask_forward));
  m.impl("global_top_mask_counts", TORCH_BOX(&entropy_rl::cpu::global_top_mask_counts));
  m.impl("global_top_mask_key", TORCH_BOX(&entropy_rl::cpu::global_top_mask_key));
  m.impl("global_top_mask_next_key", TORCH_BOX(&entropy_rl::cpu::global_top_mask_next_key));
  m.impl("global_top_mask_at_key", TORCH_BOX(&entropy_rl::cpu::global_top_mask_at_key));
}
