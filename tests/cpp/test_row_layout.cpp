// Row offsets of csrc/kernels/row_layout.h.
#include "kernels/row_layout.h"

#include <gtest/gtest.h>

namespace entropy_rl {
namespace {

TEST(RowLayout, OneRowStartsAtTheBeginning) { EXPECT_EQ(RowLayout{}.offset(0), 0); }

TEST(RowLayout, DimensionsOfAnyStrides) {
  // Innermost first: 5 rows 7 apart, a dimension of size 1, 3 expanded rows, 2 with a negative
  // stride.
  RowLayout layout;
  const int64_t size[] = {5, 1, 3, 2};
  const int64_t stride[] = {7, 1000, 0, -100};
  std::copy(size, size + 4, layout.size);
  std::copy(stride, stride + 4, layout.stride);
  int64_t row = 0;
  for (int64_t outer = 0; outer < 2; ++outer) {
    for (int64_t middle = 0; middle < 3; ++middle) {
      for (int64_t inner = 0; inner < 5; ++inner) {
        EXPECT_EQ(layout.offset(row++), inner * 7 - outer * 100);
      }
    }
  }
}

TEST(RowLayout, OffsetsPassTwoToThe31) {
  RowLayout layout;
  layout.size[0] = 1 << 20;
  layout.stride[0] = 151936;
  EXPECT_EQ(layout.offset((1 << 20) - 1), int64_t{151936} * ((1 << 20) - 1));
}

}  // namespace
}  // namespace entropy_rl
