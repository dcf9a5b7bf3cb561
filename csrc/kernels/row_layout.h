// Where row r of a [..., vocab] tensor begins. Leading dimensions may have any strides, also those
// of expanded (stride 0) and sliced tensors, so logits[:, -response_length - 1 : -1] needs no copy.
#pragma once

#include <cstdint>

#include "macros.h"

namespace entropy_rl {

struct RowLayout {
  static constexpr int kMaxDims = 4;
  int64_t size[kMaxDims] = {1, 1, 1, 1};  // innermost first, after merging neighbours
  int64_t stride[kMaxDims] = {0, 0, 0, 0};

  // Offset in elements of the row's first element.
  ENTROPY_RL_HD int64_t offset(int64_t row) const {
    int64_t offset = 0;
#if defined(__CUDACC__)
    // Not unrolled, the loop would index the kernel's parameters at run time, and so copy them to
    // local memory.
#pragma unroll
#endif
    for (int i = 0; i < kMaxDims; ++i) {
      if (size[i] == 1) continue;
      offset += (row % size[i]) * stride[i];
      row /= size[i];
    }
    return offset;
  }
};

}  // namespace entropy_rl
