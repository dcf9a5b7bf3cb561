#include "../kernels/global_top_mask.cuh"

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "../top_mask_arguments.h"
#include "selection.h"
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

// Sorts every tile, as many at a time as CUB's 32-bit offsets hold.
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
  // One workspace for all, as large as the largest needs.
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

// Rows ordered by group id; within a group as they were, which DeviceRadixSort, being stable,
// keeps.
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

Tensor global_top_mask_forward(const Tensor& entropy, const Tensor& response_mask,
                               const Tensor& top_ratio, std::string rule, std::string scope,
                               std::optional<Tensor> group_ids) {
  const TopMaskArguments in(entropy, response_mask, top_ratio, rule, scope, group_ids);
  const DeviceScope device(in.entropy);
  Tensor result = in.new_mask();
  if (result.numel() == 0) return result;
  std::optional<GroupOrder> order;
  if (in.group_ids) order.emplace(*in.group_ids, device.stream());
  const Segments segments = order ? order->segments() : Segments{nullptr, nullptr};
  const TileLayout layout(in.rows, in.columns);
  dispatch_floating(in.entropy.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    using Key = selection_key_t<accumulate_t<Element>>;
    const DeviceArray<Key> keys(in.entropy, in.entropy.numel());
    selection_keys_kernel<Element><<<grid_size(layout.tiles()), kTileThreads, 0, device.stream()>>>(
        const_data<Element>(in.entropy), const_data<bool>(in.mask), segments.row_order, layout,
        keys.data());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    selection_mask<Key>(keys.data(), layout, segments, {in.rule, in.ratio, nullptr},
                        mutable_data<uint8_t>(result), in.entropy, device.stream());
  });
  return result;
}

}  // namespace

template <class Key>
void selection_mask(const Key* keys /*[rows, columns]*/, const TileLayout& layout,
                    const Segments& segments, const SelectionRule& rule,
                    uint8_t* mask /*[rows, columns]*/, const Tensor& on_device_of,
                    cudaStream_t stream) {
  if (layout.tiles() == 0) return;
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

template void selection_mask(const uint32_t*, const TileLayout&, const Segments&,
                             const SelectionRule&, uint8_t*, const Tensor&, cudaStream_t);
template void selection_mask(const uint64_t*, const TileLayout&, const Segments&,
                             const SelectionRule&, uint8_t*, const Tensor&, cudaStream_t);

}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  m.impl("global_top_mask_forward", TORCH_BOX(&entropy_rl::cuda::global_top_mask_forward));
}
