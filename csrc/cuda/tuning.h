// Sizes that decide speed and never results' meaning, apart from the algorithms they tune.
#pragma once

#include <cstdint>

namespace entropy_rl::cuda {

// Threads that share one row of logits: enough to give each a few 16-byte packs.
inline int softmax_row_threads(int64_t vocab) {
  if (vocab >= 8192) return 512;
  if (vocab >= 2048) return 256;
  if (vocab >= 512) return 128;
  return 32;
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
