// Sizes that decide speed and never results' meaning, apart from the algorithms they tune.
#pragma once

#include <cstdint>

namespace entropy_rl::cuda {

// Threads that share one row of logits, for a few 16-byte packs each. Of the vocabulary alone: it
// is part of what fixes the order of a row's sums.
inline int softmax_row_threads(int64_t vocab) {
  if (vocab >= 65536) return 512;
  if (vocab >= 4096) return 256;
  if (vocab >= 1024) return 128;
  return 32;
}
// Rows from which on a block takes a whole row: two waves of blocks on 132 SMs at three an SM. With
// fewer, a row's parts are blocks, and a second kernel merges them.
constexpr int64_t kWholeRowsFrom = 768;

// Parts of a row that the backward gives a block each, of those that it could have.
inline int backward_row_parts(int64_t rows, int row_parts) {
  const int64_t wanted = (kWholeRowsFrom + rows - 1) / rows;
  return wanted < row_parts ? static_cast<int>(wanted) : row_parts;
}

// Threads that write the keys, or the mask, of one tile of kTileKeys tokens.
constexpr int kTileThreads = 256;
// Threads that search one segment, each a tile at a time: 2^20 tokens are 256 tiles.
constexpr int kSegmentThreads = 256;

// Radix select takes all that its 32-bit counters hold: it moves 5 bytes a token and pass, and
// three passes, where CUB's sort moves 8 a pass and as many passes. Beyond, the sort.
constexpr int64_t kMaxRadixKeys = (int64_t{1} << 32) - 1;
constexpr int kRadixThreads = 512;

// Whether a block takes a whole segment: where rows are enough to fill the device, or tokens so few
// that one block is done before a second kernel would start.
inline bool radix_block_a_segment(int64_t rows, int64_t columns) {
  return rows >= 128 || rows * columns <= 8192;
}
// Else blocks take tiles: some 512 of them, two waves of two an SM, none below 4096 keys.
inline int radix_tile_keys(int64_t rows, int64_t columns) {
  constexpr int64_t kSmallest = 4096;
  const int64_t tiles_per_row = rows < 512 ? 512 / rows : 1;
  const int64_t keys = (columns + tiles_per_row - 1) / tiles_per_row;
  return static_cast<int>((keys + kSmallest - 1) / kSmallest * kSmallest);
}

// Threads that share one tile of kTileTokens tokens of a loss: two quads each.
constexpr int kLossTileThreads = 256;
// Threads of the one block that sums a batch's rows or tiles.
constexpr int kLossRowThreads = 512;

}  // namespace entropy_rl::cuda
