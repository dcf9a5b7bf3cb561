#include <memory>
#include <numeric>

#include "../top_mask_arguments.h"
#include "selection.h"

namespace entropy_rl::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;

template <class Element>
void write_keys(const Element* entropy /*[n]*/, const bool* mask /*[n]*/, int64_t n,
                selection_key_t<accumulate_t<Element>>* keys /*[n]*/) {
  using Key = selection_key_t<accumulate_t<Element>>;
  static_assert(kIneligibleKey<Key> == 0);
  // A product, so that the loop has no branch and vectorises.
  for (int64_t i = 0; i < n; ++i) keys[i] = selection_key(load_value(entropy[i])) * mask[i];
}

template <class Key>
void select_segment(const Key* keys /*[n]*/, int64_t n, double ratio, TopRule rule,
                    uint8_t* mask /*[n]*/) {
  const int64_t eligible = count_eligible(keys, n);
  if (eligible == 0) {
    std::fill_n(mask, n, uint8_t{0});
  } else if (rule == TopRule::kTopK) {
    top_k_mask(keys, n, top_count(eligible, ratio), mask);
  } else if (rule == TopRule::kThreshold) {
    threshold_mask(keys, n, kth_largest(keys, n, top_count(eligible, ratio)).key, mask);
  } else {
    const QuantilePosition position = quantile_position(eligible, ratio);
    const int64_t k = eligible - position.lower;
    const Key lower = kth_largest(keys, n, k).key;
    const Key upper = position.weight > 0 ? kth_largest(keys, n, k - 1).key : lower;
    threshold_mask(keys, n, quantile_key(lower, upper, position.weight), mask);
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
  const Element* entropy = const_data<Element>(in.entropy);
  const bool* mask = const_data<bool>(in.mask);
  const int64_t columns = in.columns;
  const int64_t n = in.rows * columns;
  const std::unique_ptr<Key[]> keys(new Key[n]);

  if (in.scope != TopScope::kGroup) {
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      write_keys(entropy + begin, mask + begin, end - begin, keys.get() + begin);
    });
    for_each_segment(in.rows, [&](int64_t row) {
      select_segment(keys.get() + row * columns, columns, in.ratio, in.rule, out + row * columns);
    });
    return;
  }

  // A group's rows, which may lie anywhere, are brought together.
  const RowOrder order(in);
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
    select_segment(keys.get() + begin, end - begin, in.ratio, in.rule, ordered.get() + begin);
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
