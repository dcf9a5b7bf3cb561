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

// Threads that share one tile of kTileTokens tokens of a loss: eight tokens each.
constexpr int kLossTileThreads = 256;
// Threads of the one block that sums a batch's rows or tiles.
constexpr int kLossRowThreads = 512;

}  // namespace entropy_rl::cuda
