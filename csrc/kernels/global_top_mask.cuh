// What the two algorithms of global_top_mask share: tiles, segments and the rule. Both keep, of
// each segment, the keys (selection.h) above the k-th largest, and as many of those equal to it, in
// index order, as make up k.
//   sort_select.cuh   CUB sorts tiles of keys; a bisection over the sorted tiles
//   radix_select.cuh  histograms of 11 bits of the keys at a time
// Both count in integers and compare keys, so they give the same bits in any order of the work.
#pragma once

#include "dtypes.h"
#include "selection.h"
#include "warp.cuh"

namespace entropy_rl {

// One block of CUB's segmented sort takes one tile.
constexpr int kTileKeys = 4096;

// [rows, columns] as tiles: a row's tiles are consecutive, and all but its last are full.
struct TileLayout {
  int64_t rows;
  int64_t columns;
  int tile_keys;
  int64_t tiles_per_row;

  TileLayout(int64_t rows, int64_t columns, int tile_keys = kTileKeys)
      : rows(rows),
        columns(columns),
        tile_keys(tile_keys),
        tiles_per_row((columns + tile_keys - 1) / tile_keys) {}

  ENTROPY_RL_HD int64_t tiles() const { return rows * tiles_per_row; }
  ENTROPY_RL_HD int64_t row(int64_t tile) const { return tile / tiles_per_row; }
  ENTROPY_RL_HD int64_t column(int64_t tile) const { return tile % tiles_per_row * tile_keys; }
  ENTROPY_RL_HD int64_t begin(int64_t tile) const { return row(tile) * columns + column(tile); }
  ENTROPY_RL_HD int size(int64_t tile) const {
    const int64_t left = columns - column(tile);
    return static_cast<int>(left < tile_keys ? left : tile_keys);
  }
};

struct SmallerKey {
  template <class Key>
  __device__ Key operator()(Key a, Key b) const {
    return a < b ? a : b;
  }
};

// One past the last row of the segment that begins at `row`: the rows with the same id. ids ascend.
__device__ __forceinline__ int64_t segment_end(const int64_t* ids, int64_t row, int64_t rows) {
  int64_t begin = row + 1;
  int64_t end = rows;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] == ids[row]) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Which of a segment's n eligible keys are kept.
struct SelectionRule {
  TopRule rule;
  double ratio;
  const int64_t* count;  // k, in place of top_count(n, ratio); on the device, or null; kTopK only
};

// The rows in their own order, for CUB to sort by group id. A template, so that every file that
// includes it may hold it.
template <class Index>
__global__ void row_indices_kernel(int64_t count, Index* values /*[count]*/) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) values[i] = i;
}

}  // namespace entropy_rl
