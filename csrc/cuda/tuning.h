// Sizes that decide speed, apart from the algorithms that they tune. None changes what a result
// means; softmax_row_threads also fixes the order in which a row is summed, and so its last bits.
#pragma once

#include <algorithm>
#include <cstdint>

namespace entropy_rl::cuda {

// Threads that share one row of logits, each a few 16-byte packs. A function of the vocabulary
// alone, so that a row gives the same bits in every batch.
inline int softmax_row_threads(int64_t vocab) {
  if (vocab >= 65536) return 512;
  if (vocab >= 4096) return 256;
  if (vocab >= 1024) return 128;
  return 32;
}
// Threads that share a row of a tile of the LM head's logits, at most 8192 of them: each takes four
// rounds of four packs, so that the merge of the threads' sums is a small part of the work.
inline int head_tile_threads(int64_t width) { return width >= 1024 ? 128 : 32; }
// From this many rows on, a block takes a row: three waves of blocks on 132 SMs, two to an SM. With
// fewer rows a block takes a part of a row, and a second kernel merges the parts.
constexpr int64_t kWholeRowsFrom = 768;

// Into how many parts the backward cuts a row, one block each: as many as it takes to have
// kWholeRowsFrom blocks, but each with at least one of the row's `whole_rounds`, so that its
// threads have several loads in flight.
inline int backward_row_parts(int64_t rows, int whole_rounds) {
  const int64_t wanted = (kWholeRowsFrom + rows - 1) / rows;
  if (wanted < whole_rounds) return static_cast<int>(wanted);
  return whole_rounds > 1 ? whole_rounds : 1;
}

// Threads that write the keys, or the mask, of one tile of kTileKeys tokens.
constexpr int kTileThreads = 256;
// Threads that search one sorted segment, each a tile at a time: 2^20 tokens are 256 tiles.
constexpr int kSegmentThreads = 256;

// Up to as many keys as its 32-bit counters hold, radix select is used: for float32 it reads 5
// bytes a token in each of three passes, where CUB's sort moves 8 in each of at least as many.
// Beyond that, the sort.
constexpr int64_t kMaxRadixKeys = (int64_t{1} << 32) - 1;
constexpr int kRadixThreads = 512;

// The most keys of a segment for which one block does everything. Of a larger segment a block takes
// a tile.
//   Rows: any number, where there are enough rows to fill the device; otherwise so few that one
//   block is done before a second kernel would start.
//   Groups: 16,384, which a block reads four to six times, 2048 at a time. The number of groups and
//   their sizes are known on the device alone.
inline int64_t radix_block_keys(int64_t rows, int64_t columns, bool by_group) {
  if (by_group) return 16384;
  return rows >= 128 ? columns : 8192 / rows;
}
// The tiles of larger segments: about 512, two waves of two blocks an SM; at least 4096 keys each,
// also where a process has no token.
inline int radix_tile_keys(int64_t rows, int64_t columns) {
  constexpr int64_t kSmallest = 4096;
  const int64_t tiles_per_row = rows < 512 ? 512 / rows : 1;
  const int64_t keys = (columns + tiles_per_row - 1) / tiles_per_row;
  return static_cast<int>(std::max<int64_t>(1, (keys + kSmallest - 1) / kSmallest) * kSmallest);
}

// Threads that share one tile of kTileTokens tokens of a loss, two packs of tokens each.
constexpr int kLossTileThreads = 256;
// Threads of the one block that sums a batch's rows or tiles.
constexpr int kLossRowThreads = 512;

}  // namespace entropy_rl::cuda
