#include "../kernels/radix_select.cuh"
#include "../kernels/sort_select.cuh"

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "../ops/global_top_mask.h"
#include "top_k_mask.h"
#include "tuning.h"

namespace entropy_rl::cuda {
namespace {

// Offset of tile `first + i` from tile `first`.
struct TileOffset {
  TileLayout layout;
  int64_t first;
  __host__ __device__ int operator()(int i) const {
    return static_cast<int>(layout.begin(first + i) - layout.begin(first));
  }
};

// Which rows are a segment; both null if every row is one.
struct Segments {
  const int64_t* ids;        // [rows] ascending
  const int64_t* row_order;  // [rows]
};

// Sorts every tile; one call of CUB sorts as many as its 32-bit offsets allow.
template <class Key>
void sort_tiles(const Key* keys, Key* sorted, const TileLayout& layout, const Tensor& on_device_of,
                cudaStream_t stream) {
  constexpr int64_t kTilesPerSort = (int64_t{1} << 30) / kTileKeys;
  const auto sort = [&](void* storage, size_t& bytes, int64_t first) {
    const int tiles = static_cast<int>(std::min(kTilesPerSort, layout.tiles() - first));
    const int64_t begin = layout.begin(first);
    const int count = static_cast<int>(layout.begin(first + tiles) - begin);
    const auto offsets = thrust::make_transform_iterator(thrust::counting_iterator<int>(0),
                                                         TileOffset{layout, first});
    STD_CUDA_CHECK(cub::DeviceSegmentedRadixSort::SortKeys(
        storage, bytes, keys + begin, sorted + begin, count, tiles, offsets, offsets + 1, 0,
        8 * static_cast<int>(sizeof(Key)), stream));
  };
  // One workspace for all calls.
  size_t bytes = 0;
  for (int64_t first = 0; first < layout.tiles(); first += kTilesPerSort) {
    size_t needed = 0;
    sort(nullptr, needed, first);
    bytes = std::max(bytes, needed);
  }
  const DeviceArray<char> storage(on_device_of, static_cast<int64_t>(bytes));
  for (int64_t first = 0; first < layout.tiles(); first += kTilesPerSort) {
    sort(storage.data(), bytes, first);
  }
}

// Rows ordered by group id. DeviceRadixSort is stable, so rows of one group keep their order.
class GroupOrder {
 public:
  GroupOrder(const Tensor& group_ids, cudaStream_t stream)
      : ids_(group_ids, group_ids.numel()), rows_(group_ids, group_ids.numel()) {
    const int64_t count = group_ids.numel();
    const DeviceArray<int64_t> indices(group_ids, count);
    row_indices_kernel<<<grid_size((count + kTileThreads - 1) / kTileThreads), kTileThreads, 0,
                         stream>>>(count, indices.data());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const auto sort = [&](void* storage, size_t& bytes) {
      STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(storage, bytes, const_data<int64_t>(group_ids),
                                                     ids_.data(), indices.data(), rows_.data(),
                                                     count, 0, 64, stream));
    };
    size_t bytes = 0;
    sort(nullptr, bytes);
    const DeviceArray<char> storage(group_ids, static_cast<int64_t>(bytes));
    sort(storage.data(), bytes);
  }
  Segments segments() const { return {ids_.data(), rows_.data()}; }

 private:
  DeviceArray<int64_t> ids_;
  DeviceArray<int64_t> rows_;
};

// The mask by CUB's sort of all tiles and a search over them (../kernels/sort_select.cuh).
template <class Key>
void sort_select(const Key* keys /*[rows, columns]*/, const TileLayout& layout,
                 const Segments& segments, const SelectionRule& rule,
                 uint8_t* mask /*[rows, columns]*/, const Tensor& on_device_of,
                 cudaStream_t stream) {
  const DeviceArray<Key> sorted(on_device_of, layout.rows * layout.columns);
  const DeviceArray<TileRange> ranges(on_device_of, layout.tiles());
  const DeviceArray<TileCut<Key>> cuts(on_device_of, layout.tiles());
  sort_tiles(keys, sorted.data(), layout, on_device_of, stream);
  selection_cut_kernel<Key><<<grid_size(layout.rows), kSegmentThreads, 0, stream>>>(
      sorted.data(), segments.ids, layout, rule, ranges.data(), cuts.data());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  selection_mask_kernel<Key><<<grid_size(layout.tiles()), kTileThreads, 0, stream>>>(
      keys, cuts.data(), segments.row_order, layout, mask);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The mask by radix select (../kernels/radix_select.cuh).
template <class Keys>
void radix_select(const Keys& keys, int64_t rows, int64_t columns, const Segments& segments,
                  const SelectionRule& rule, uint8_t* mask /*[rows, columns]*/,
                  const Tensor& on_device_of, cudaStream_t stream) {
  using Key = typename Keys::Key;
  const bool by_group = segments.ids != nullptr;
  const DeviceArray<SegmentRows> groups(on_device_of, by_group ? rows : 0);
  const SegmentRows* segment_rows = by_group ? groups.data() : nullptr;
  if (by_group) {
    const int64_t blocks = (rows + kTileThreads - 1) / kTileThreads;
    segment_rows_kernel<<<grid_size(blocks), kTileThreads, 0, stream>>>(segments.ids, rows,
                                                                        groups.data());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t block_keys = radix_block_keys(rows, columns, by_group);
  if (columns <= block_keys) {
    const RadixInputs<Keys> in{keys, segment_rows, segments.row_order, TileLayout(rows, columns),
                               rule, block_keys};
    radix_segment_kernel<Keys><<<grid_size(rows), kRadixThreads, 0, stream>>>(in, mask);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if ((by_group ? rows * columns : columns) <= block_keys) return;
  const TileLayout layout(rows, columns, radix_tile_keys(rows, columns));
  const RadixInputs<Keys> in{keys, segment_rows, segments.row_order, layout, rule, block_keys};
  constexpr int kPasses = Digit<Key>::kPasses;
  const int64_t places = in.places();
  const int64_t tiles = layout.tiles();
  const int64_t counts = kPasses * places * kDigits + places + tiles;
  const DeviceArray<uint32_t> zeros(on_device_of, counts);
  const DeviceArray<RadixCut<Key>> cuts(on_device_of, kPasses * places);
  const DeviceArray<Key> next_keys(on_device_of, rule.rule == TopRule::kQuantile ? tiles : 0);
  uint32_t* turns = zeros.data() + kPasses * places * kDigits;
  const RadixState<Key> state{zeros.data(), cuts.data(),    next_keys.data(),
                              turns,        turns + places, places};
  STD_CUDA_CHECK(cudaMemsetAsync(zeros.data(), 0, counts * sizeof(uint32_t), stream));
  for (int pass = 0; pass < kPasses; ++pass) {
    radix_histogram_kernel<Keys><<<grid_size(tiles), kRadixThreads, 0, stream>>>(in, state, pass);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  radix_mask_kernel<Keys><<<grid_size(tiles), kRadixThreads, 0, stream>>>(in, state, mask);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void check_fits_radix(const char* name, int64_t tokens) {
  check(tokens <= kMaxRadixKeys, name, " has ", tokens, " elements; radix select takes up to ",
        kMaxRadixKeys);
}

bool use_radix(TopAlgorithm algorithm, int64_t tokens) {
  if (algorithm == TopAlgorithm::kRadix) check_fits_radix("entropy", tokens);
  const bool fits = tokens <= kMaxRadixKeys;
  return algorithm == TopAlgorithm::kRadix || (algorithm == TopAlgorithm::kAuto && fits);
}

Tensor global_top_mask_forward(const Tensor& entropy, const Tensor& response_mask,
                               const Tensor& top_ratio, std::string rule, std::string scope,
                               std::optional<Tensor> group_ids, std::string algorithm) {
  const TopMaskArguments in(entropy, response_mask, top_ratio, rule, scope, group_ids, algorithm);
  const DeviceScope device(in.entropy);
  Tensor result = in.new_mask();
  if (result.numel() == 0) return result;
  std::optional<GroupOrder> order;
  if (in.group_ids) order.emplace(*in.group_ids, device.stream());
  const Segments segments = order ? order->segments() : Segments{nullptr, nullptr};
  const SelectionRule selection{in.rule, in.ratio, nullptr};
  uint8_t* mask = mutable_data<uint8_t>(result);
  dispatch_floating(in.entropy.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    const EntropyKeys<Element> entropies{const_data<Element>(in.entropy),
                                         const_data<bool>(in.mask)};
    if (use_radix(in.algorithm, result.numel())) {
      radix_select(entropies, in.rows, in.columns, segments, selection, mask, in.entropy,
                   device.stream());
      return;
    }
    using Key = typename EntropyKeys<Element>::Key;
    const TileLayout layout(in.rows, in.columns);
    const DeviceArray<Key> keys(in.entropy, result.numel());
    selection_keys_kernel<Element><<<grid_size(layout.tiles()), kTileThreads, 0, device.stream()>>>(
        entropies.entropy, entropies.mask, segments.row_order, layout, keys.data());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    sort_select<Key>(keys.data(), layout, segments, selection, mask, in.entropy, device.stream());
  });
  return result;
}

// ---- Steps for values that several processes hold ----

TileLayout process_layout(int64_t n) { return TileLayout(1, n, radix_tile_keys(1, n)); }

template <class Element>
EntropyKeys<Element> process_keys(const ProcessValues& in) {
  return {const_data<Element>(in.values), const_data<bool>(in.mask)};
}

Tensor global_top_mask_counts(const Tensor& values, const Tensor& mask, std::optional<Tensor> key,
                              int64_t shift) {
  const ProcessValues in(values, mask);
  const DigitArguments digit(shift, in.key_bits(), key, in.values);
  const DeviceScope device(in.values);
  const int64_t n = in.values.numel();
  check_fits_radix("values", n);
  Tensor result = new_zero_tensor(in.values, {int64_t{1} << digit.bits}, ScalarType::Long);
  if (n == 0) return result;
  const TileLayout layout = process_layout(n);
  dispatch_floating(in.values.scalar_type(), [&](auto element) {
    using Keys = EntropyKeys<decltype(element)>;
    radix_counts_kernel<Keys><<<grid_size(layout.tiles()), kRadixThreads, 0, device.stream()>>>(
        process_keys<decltype(element)>(in), layout, digit.pass, const_data<int64_t>(key),
        mutable_data<unsigned long long>(result));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

std::tuple<Tensor, Tensor> global_top_mask_key(const Tensor& counts, std::optional<Tensor> key,
                                               const Tensor& k, int64_t shift) {
  const CountsArguments in(counts, key, k, shift);
  const DeviceScope device(in.counts);
  Tensor found = new_tensor(in.counts, {}, ScalarType::Long);
  Tensor k_left = new_tensor(in.counts, {}, ScalarType::Long);
  radix_key_kernel<int64_t><<<1, kRadixThreads, 0, device.stream()>>>(
      const_data<int64_t>(in.counts), in.digits, static_cast<int>(shift), const_data<int64_t>(key),
      const_data<int64_t>(k), mutable_data<int64_t>(found), mutable_data<int64_t>(k_left));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {found, k_left};
}

Tensor global_top_mask_next_key(const Tensor& values, const Tensor& mask, const Tensor& key) {
  const ProcessValues in(values, mask);
  check_number("key", key, ScalarType::Long, "values", in.values);
  const DeviceScope device(in.values);
  const int64_t n = in.values.numel();
  const bool wide = in.key_bits() == 64;
  Tensor result = new_tensor(in.values, {}, wide ? ScalarType::Long : ScalarType::Int);
  dispatch_floating(in.values.scalar_type(), [&](auto element) {
    using Keys = EntropyKeys<decltype(element)>;
    using Key = typename Keys::Key;
    auto* next = mutable_data<signed_key_t<Key>>(result);
    set_kernel<<<1, 1, 0, device.stream()>>>(signed_key(kNaNKey<Key>), next);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (n == 0) return;
    const TileLayout layout = process_layout(n);
    radix_next_key_kernel<Keys><<<grid_size(layout.tiles()), kRadixThreads, 0, device.stream()>>>(
        process_keys<decltype(element)>(in), layout, const_data<int64_t>(key), next);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  const DeviceScope device(in.values);
  const int64_t n = in.values.numel();
  check_fits_radix("values", n);
  if (ties) ties = contiguous_tensor(*ties);
  const FoundOnDevice found{const_data<int64_t>(key),
                            const_data<int64_t>(k),
                            const_data<int64_t>(ties),
                            process,
                            next_key ? next_key->const_data_ptr() : nullptr,
                            const_data<double>(weight)};
  Tensor result = new_tensor(in.values, shape_of(in.values), ScalarType::Bool);
  Tensor lowest = new_tensor(in.values, {}, accumulate_dtype(in.values.scalar_type()));
  dispatch_floating(in.values.scalar_type(), [&](auto element) {
    using Keys = EntropyKeys<decltype(element)>;
    using Key = typename Keys::Key;
    constexpr int kPasses = Digit<Key>::kPasses;
    const TileLayout layout = process_layout(n);
    const DeviceArray<RadixCut<Key>> cuts(in.values, kPasses);  // only the last is used
    const DeviceArray<uint32_t> turns(in.values, 1 + layout.tiles());
    const RadixState<Key> state{nullptr, cuts.data(), nullptr, turns.data(), turns.data() + 1, 1};
    radix_process_cut_kernel<Key><<<1, kTileThreads, 0, device.stream()>>>(
        found, state, layout.tiles(), mutable_data<typename KeyTraits<Key>::Value>(lowest));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (n == 0) return;
    const RadixInputs<Keys> inputs{process_keys<decltype(element)>(in), nullptr, nullptr, layout,
                                   SelectionRule{TopRule::kTopK, 0.0, nullptr}};
    radix_mask_kernel<Keys><<<grid_size(layout.tiles()), kRadixThreads, 0, device.stream()>>>(
        inputs, state, mutable_data<uint8_t>(result));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {result, lowest};
}

}  // namespace

template <class Key>
void top_k_mask(const Key* keys /*[n]*/, int64_t n, const int64_t* k /*[1]*/, uint8_t* mask /*[n]*/,
                const Tensor& on_device_of, cudaStream_t stream) {
  if (n == 0) return;
  const Segments rows{nullptr, nullptr};
  const SelectionRule rule{TopRule::kTopK, 0.0, k};
  if (use_radix(TopAlgorithm::kAuto, n)) {
    radix_select(GivenKeys<Key>{keys}, 1, n, rows, rule, mask, on_device_of, stream);
  } else {
    sort_select(keys, TileLayout(1, n), rows, rule, mask, on_device_of, stream);
  }
}

template void top_k_mask(const uint32_t*, int64_t, const int64_t*, uint8_t*, const Tensor&,
                         cudaStream_t);
template void top_k_mask(const uint64_t*, int64_t, const int64_t*, uint8_t*, const Tensor&,
                         cudaStream_t);

}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  m.impl("global_top_mask_forward", TORCH_BOX(&entropy_rl::cuda::global_top_mask_forward));
  m.impl("global_top_mask_counts", TORCH_BOX(&entropy_rl::cuda::global_top_mask_counts));
  m.impl("global_top_mask_key", TORCH_BOX(&entropy_rl::cuda::global_top_mask_key));
  m.impl("global_top_mask_next_key", TORCH_BOX(&entropy_rl::cuda::global_top_mask_next_key));
  m.impl("global_top_mask_at_key", TORCH_BOX(&entropy_rl::cuda::global_top_mask_at_key));
}
