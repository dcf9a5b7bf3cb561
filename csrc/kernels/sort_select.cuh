// global_top_mask by sorting (global_top_mask.cuh has the rule). k stays on the device: no launch
// waits for a result.
//   selection_keys_kernel  a block a tile: keys of the entropies; CUB then sorts each tile
//   selection_cut_kernel   a block a segment, whose threads share its tiles: counts n, computes k,
//                          and finds the k-th largest key bit by bit, by binary search in each tile
//   selection_mask_kernel  a block a tile
// Counts are int64. Bytes for a float32 token: 9 for its key, 8 for each of CUB's passes, 5 for the
// mask; the search reads some 200 of the 4096 keys of a tile.
#pragma once

#include "global_top_mask.cuh"

namespace entropy_rl {

// The positions [begin, end) of a sorted tile among which a search goes on, and where it splits
// them.
struct TileRange {
  int begin;
  int end;
  int split;
};

// What a tile keeps: its keys above `key`, and the first `kept` of its `ties` keys equal to it.
template <class Key>
struct TileCut {
  Key key;
  int kept;
  int ties;
};

// First position in [begin, end) whose key, in ascending order, is not below `key`; `end` if there
// is none.
template <class Key>
__device__ __forceinline__ int lower_bound(const Key* keys, int begin, int end, Key key) {
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Writes the keys row by row in `row_order`, so that the rows of a segment are neighbours.
template <class Element>
__global__ void selection_keys_kernel(
    const Element* entropy /*[rows, columns]*/, const bool* mask /*[rows, columns]*/,
    const int64_t* row_order /*[rows] or null*/, TileLayout layout,
    selection_key_t<accumulate_t<Element>>* keys /*[rows, columns]*/) {
  using Key = selection_key_t<accumulate_t<Element>>;
  for (int64_t tile = blockIdx.x; tile < layout.tiles(); tile += gridDim.x) {
    const int64_t row = layout.row(tile);
    const int64_t source =
        (row_order ? row_order[row] : row) * layout.columns + layout.column(tile);
    const int64_t target = layout.begin(tile);
    const int size = layout.size(tile);
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      keys[target + i] =
          mask[source + i] ? selection_key(load_value(entropy[source + i])) : kIneligibleKey<Key>;
    }
  }
}

// The search of one block over the tiles of one segment. All threads call every method. Tile t
// belongs to thread t % blockDim.x, which alone reads and writes that tile's range.
template <class Key>
struct SegmentSearch {
  const Key* sorted;  // [rows, columns], ascending within each tile
  TileRange* ranges;  // [tiles]
  const TileLayout& layout;
  int64_t first;  // tile
  int64_t last;
  int64_t* shared_counts;  // [kMaxWarps]
  Key* shared_keys;        // [kMaxWarps]

  // Calls f(tile's keys, its size, its range) for every tile of this thread.
  template <class F>
  __device__ __forceinline__ void for_each_tile(F f) const {
    for (int64_t tile = first + threadIdx.x; tile < last; tile += blockDim.x) {
      f(sorted + layout.begin(tile), layout.size(tile), ranges[tile]);
    }
  }

  // Restricts every tile's range to its eligible keys; returns how many there are.
  __device__ int64_t count_eligible() const {
    int64_t count = 0;
    for_each_tile([&](const Key* keys, int size, TileRange& range) {
      range.begin = lower_bound(keys, 0, size, Key{1});
      range.end = size;
      count += range.end - range.begin;
    });
    return block_reduce(count, int64_t{0}, Plus{}, shared_counts);
  }

  struct Found {
    Key key;
    int64_t above;  // how many keys are larger
  };

  // The k-th largest of the keys in range, 1 <= k <= their number. Afterwards each range holds the
  // keys equal to it. From the highest bit down, a bit is set if k keys are at least as large as
  // the bits found so far with this one set.
  __device__ Found kth_largest(int64_t k) const {
    Found found{0, 0};
    for (int bit = 8 * static_cast<int>(sizeof(Key)) - 1; bit >= 0; --bit) {
      const Key candidate = found.key | Key{1} << bit;
      int64_t count = 0;
      for_each_tile([&](const Key* keys, int, TileRange& range) {
        range.split = lower_bound(keys, range.begin, range.end, candidate);
        count += range.end - range.split;
      });
      count = block_reduce(count, int64_t{0}, Plus{}, shared_counts);
      const bool set = found.above + count >= k;
      for_each_tile([&](const Key*, int, TileRange& range) {
        (set ? range.begin : range.end) = range.split;
      });
      if (set) {
        found.key = candidate;
      } else {
        found.above += count;
      }
    }
    return found;
  }

  // The smallest key above all ranges.
  __device__ Key next_larger() const {
    const Key highest = kNaNKey<Key>;
    Key next = highest;
    for_each_tile([&](const Key* keys, int size, TileRange& range) {
      if (range.end < size) next = SmallerKey{}(next, keys[range.end]);
    });
    return block_reduce(next, highest, SmallerKey{}, shared_keys);
  }

  // Keeps the keys from `key` up.
  __device__ void cut_at(Key key, TileCut<Key>* cuts /*[tiles]*/) const {
    for (int64_t tile = first + threadIdx.x; tile < last; tile += blockDim.x) {
      cuts[tile] = {key, 1, 1};
    }
  }

  // Keeps the keys above `key`, and the first `ties` of the keys in range, which equal it.
  __device__ void cut_ties(Key key, int64_t ties, TileCut<Key>* cuts /*[tiles]*/) const {
    int64_t before_round = 0;
    for (int64_t round = first; round < last; round += blockDim.x) {
      const int64_t tile = round + threadIdx.x;
      const int64_t own = tile < last ? ranges[tile].end - ranges[tile].begin : 0;
      int64_t total;
      const int64_t before = before_round + block_exclusive_scan(own, &total, shared_counts);
      const int64_t left = ties > before ? ties - before : 0;
      if (tile < last) {
        cuts[tile] = {key, static_cast<int>(left < own ? left : own), static_cast<int>(own)};
      }
      before_round += total;
    }
  }
};

// Segments are runs of rows with one id, or each row by itself where `ids` is null.
template <class Key>
__global__ void selection_cut_kernel(const Key* sorted /*[rows, columns]*/,
                                     const int64_t* ids /*[rows] ascending, or null*/,
                                     TileLayout layout, SelectionRule rule,
                                     TileRange* ranges /*[tiles]*/,
                                     TileCut<Key>* cuts /*[tiles]*/) {
  __shared__ int64_t shared_counts[kMaxWarps];
  __shared__ Key shared_keys[kMaxWarps];
  for (int64_t row = blockIdx.x; row < layout.rows; row += gridDim.x) {
    if (ids && row > 0 && ids[row] == ids[row - 1]) continue;  // another block's segment
    const int64_t end = ids ? segment_end(ids, row, layout.rows) : row + 1;
    const SegmentSearch<Key> search{
        sorted,        ranges,     layout, row * layout.tiles_per_row, end * layout.tiles_per_row,
        shared_counts, shared_keys};
    const int64_t n = search.count_eligible();
    if (rule.rule == TopRule::kQuantile && n > 0) {
      const QuantilePosition position = quantile_position(n, rule.ratio);
      const int64_t k = n - position.lower;
      const auto lower = search.kth_largest(k);
      // If the value occurs more than once, the next value up is the same.
      const bool tied = lower.above < k - 1;
      const Key upper = position.weight == 0.0 || tied ? lower.key : search.next_larger();
      search.cut_at(quantile_key(lower.key, upper, position.weight), cuts);
      continue;
    }
    int64_t k = n > 0 && !rule.count ? top_count(n, rule.ratio) : 0;
    if (rule.count) k = *rule.count < n ? *rule.count : n;
    if (k <= 0) {
      search.cut_ties(kNaNKey<Key>, 0, cuts);
      continue;
    }
    const auto found = search.kth_largest(k);
    if (rule.rule == TopRule::kThreshold) {
      search.cut_at(found.key, cuts);
    } else {
      search.cut_ties(found.key, k - found.above, cuts);
    }
  }
}

template <class Key>
__global__ void selection_mask_kernel(const Key* keys /*[rows, columns]*/,
                                      const TileCut<Key>* cuts /*[tiles]*/,
                                      const int64_t* row_order /*[rows] or null*/,
                                      TileLayout layout, uint8_t* mask /*[rows, columns]*/) {
  __shared__ int shared_counts[kMaxWarps];
  for (int64_t tile = blockIdx.x; tile < layout.tiles(); tile += gridDim.x) {
    const int64_t row = layout.row(tile);
    const Key* tile_keys = keys + layout.begin(tile);
    uint8_t* out = mask + (row_order ? row_order[row] : row) * layout.columns + layout.column(tile);
    const int size = layout.size(tile);
    const TileCut<Key> cut = cuts[tile];
    if (cut.kept == 0 || cut.kept == cut.ties) {
      for (int i = threadIdx.x; i < size; i += blockDim.x) {
        out[i] = tile_keys[i] > cut.key || (cut.kept > 0 && tile_keys[i] == cut.key);
      }
      continue;
    }
    // At most one tile of a segment keeps some of its ties and not others.
    int ties_before = 0;
    for (int round = 0; round < size; round += blockDim.x) {
      const int i = round + threadIdx.x;
      const Key key = i < size ? tile_keys[i] : kIneligibleKey<Key>;
      const int tie = i < size && key == cut.key;
      int total;
      const int rank = ties_before + block_exclusive_scan(tie, &total, shared_counts);
      if (i < size) out[i] = key > cut.key || (tie && rank < cut.kept);
      ties_before += total;
    }
  }
}

}  // namespace entropy_rl
