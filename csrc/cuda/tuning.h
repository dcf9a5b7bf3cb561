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

}  // namespace entropy_rl::cuda
