#include <memory>
#include <numeric>

#include "../top_mask_arguments.h"
#include "selection.h"

namespace entropy_rl::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;

template <class Element>
void write_keys(const Element* entropy /*[n]*/, const uint8_t* mask /*[n]*/, int64_t n,
                selection_key_t<accumulate_t<Element>>* keys /*[n]*/) {
  ENTROPY_RL_SIMD_CALL(write_keys(entropy, mask, n, keys));
}

int count_nonzero(const uint8_t* mask, int n) { ENTROPY_RL_SIMD_CALL(count_nonzero(mask, n)); }

// Keys made of entropies as they are read.
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
  if (eligible == 0) {
    std::fill_n(mask, n, uint8_t{0});
  } else if (rule == TopRule::kTopK) {
    top_k_mask(source, n, top_count(eligible, ratio), mask);
  } else if (rule == TopRule::kThreshold) {
    threshold_mask(source, n, kth_largest(source, n, top_count(eligible, ratio)).key, mask);
  } else {
    const QuantilePosition position = quantile_position(eligible, ratio);
    const int64_t k = eligible - position.lower;
    const auto lower = kth_largest(source, n, k).key;
    const auto upper = position.weight > 0 ? kth_largest(source, n, k - 1).key : lower;
    threshold_mask(source, n, quantile_key(lower, upper, position.weight), mask);
  }
}

// Rows in the order in which segments take them, and where in that order each segment begins. Rows
// of one group keep their order, so that ties go to the lowest index of the original tensor.
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

// Calls f(segment) for every segment: on all threads where there are segments enough, else one
// after another with all threads inside each.
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

  // A group's rows, which may lie anywhere, are brought together.
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

}  // namespace
}  // namespace entropy_rl::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("global_top_mask_forward", TORCH_BOX(&entropy_rl::cpu::global_top_mask_forward));
}
