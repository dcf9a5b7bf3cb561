// Where row r of a [..., vocab] tensor begins: leading dimensions of any strides, expanded (stride 0)
// and sliced ones included, so that logits[:, -response_length - 1 : -1] needs no copy.
#pragma once

#include <cstdint>

#include "macros.h"

namespace entropy_rl {

struct RowLayout {
  static constexpr int kMaxDims = 4;
  int dims = 0;                 // leading dimensions left after merging neighbours
  int64_t size[kMaxDims] = {};  // outermost first
  int64_t stride[kMaxDims] = {};

  // Offset in elements of the row's first element.
  ENTROPY_RL_HD int64_t offset(int64_t row) const {
    int64_t offset = 0;
    for (int i = dims - 1; i > 0; --i) {
      offset += (row % size[i]) * stride[i];
      row /= size[i];
    }
    return dims > 0 ? offset + row * stride[0] : offset;
  }
};

}  // namespace entropy_rl
