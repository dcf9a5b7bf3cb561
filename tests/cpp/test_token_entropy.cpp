// The kernels of token_entropy, unmodified, under the SIMT shim. What they share with
// logprob_entropy (loads, masks, strides, temperatures, special values) is tested here.
#include "kernels/token_entropy.cuh"

#include <gtest/gtest.h>

#include "softmax_rows_case.h"

namespace entropy_rl {
namespace {

using testing::kBlocks;
using testing::RowsCase;

template <class T>
class TokenEntropyKernel : public ::testing::Test {
 protected:
  using Acc = accumulate_t<T>;
  static constexpr double kInf = std::numeric_limits<double>::infinity();
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

  struct Forward {
    simt::Buffer<Acc> entropy;     // [rows]
    simt::Buffer<Acc> statistics;  // [rows, 2]

    Forward(RowsCase<T>& rows, int threads = 32) : entropy(rows.rows), statistics(2 * rows.rows) {
      simt::launch(kBlocks, threads, token_entropy_kernel<T>, rows.arguments(false),
                   SoftmaxOutputs<Acc>{nullptr, entropy.data(), statistics.data()});
    }
  };

  struct Backward {
    simt::Buffer<Acc> grad_entropy;  // [rows]
    simt::Buffer<T> grad_logits;     // [rows, vocab]
    int vocab;

    Backward(RowsCase<T>& rows, Forward& forward, const std::vector<Acc>& gradient,
             int threads = 32, int parts = 1)
        : grad_entropy(gradient), grad_logits(rows.rows * rows.vocab), vocab(rows.vocab) {
      simt::launch(kBlocks, threads, token_entropy_backward_kernel<T>, rows.arguments(false), parts,
                   grad_entropy.data(), forward.entropy.data(), forward.statistics.data(),
                   grad_logits.data());
    }
    const T* row(int64_t row) { return grad_logits.data() + row * vocab; }
  };
};

TYPED_TEST_SUITE(TokenEntropyKernel, testing::LogitsTypes);

TYPED_TEST(TokenEntropyKernel, MatchesDefinitionForEveryVocabulary) {
  for (int vocab : testing::kVocabSizes) {
    for (int threads : testing::kBlockThreads) {
      RowsCase<TypeParam> rows(3, vocab);
      typename TestFixture::Forward forward(rows, threads);
      for (int64_t row = 0; row < 3; ++row) rows.expect_entropy(row, forward.entropy[row]);
      typename TestFixture::Backward backward(rows, forward, {1, -2, 0.5}, threads);
      for (int64_t row = 0; row < 3; ++row) {
        rows.expect_gradient(row, backward.row(row), 0, backward.grad_entropy[row]);
      }
    }
  }
}

TYPED_TEST(TokenEntropyKernel, StatisticsAreMaxAndLogSum) {
  RowsCase<TypeParam> rows(3, 257);
  typename TestFixture::Forward forward(rows);
  for (int64_t row = 0; row < 3; ++row) {
    const auto log_p = rows.log_probs(row);
    const auto max = std::max_element(log_p.begin(), log_p.end());
    EXPECT_EQ(forward.statistics[2 * row], load_value(rows.logit(row, max - log_p.begin())));
    EXPECT_NEAR(forward.statistics[2 * row + 1], -*max,
                testing::kValueTolerance<typename TestFixture::Acc>);
  }
}

TYPED_TEST(TokenEntropyKernel, LogitsFarFromZeroCostNoDigits) {
  for (double shift : {-1e4, 1e4}) {
    RowsCase<TypeParam> rows(3, 257);
    for (auto& logit : rows.logits) logit = testing::element<TypeParam>(load_value(logit) + shift);
    typename TestFixture::Forward forward(rows);
    for (int64_t row = 0; row < 3; ++row) rows.expect_entropy(row, forward.entropy[row]);
  }
}

TYPED_TEST(TokenEntropyKernel, RowsStartAnywhereInMemory) {
  // Every offset from a 16-byte boundary that the type allows, and rows a gap apart: the gradient,
  // which has no gap, is then aligned otherwise than the logits.
  for (int64_t first = 0; first < int64_t(16 / sizeof(TypeParam)); ++first) {
    for (const int vocab : {67, 1100}) {
      const int64_t stride = vocab + 3;
      RowsCase<TypeParam> rows(
          3, vocab, stride,
          testing::normal_values<TypeParam>(first + 2 * stride + vocab, 3.0, first));
      rows.first = first;
      typename TestFixture::Forward forward(rows);
      typename TestFixture::Backward backward(rows, forward, {1, 1, 1});
      for (int64_t row = 0; row < 3; ++row) {
        rows.expect_entropy(row, forward.entropy[row]);
        rows.expect_gradient(row, backward.row(row), 0, 1);
      }
    }
  }
}

TYPED_TEST(TokenEntropyKernel, ExpandedAndSlicedLeadingDimensions) {
  // [2, 3, vocab] whose outer dimension is expanded and whose inner one is every second row.
  RowsCase<TypeParam> rows(6, 33, 33, testing::normal_values<TypeParam>(5 * 33, 3.0, 1));
  rows.layout.size[0] = 3;
  rows.layout.stride[0] = 2 * 33;
  rows.layout.size[1] = 2;
  rows.layout.stride[1] = 0;
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward, {1, 2, 3, 4, 5, 6});
  for (int64_t row = 0; row < 6; ++row) {
    rows.expect_entropy(row, forward.entropy[row]);
    rows.expect_gradient(row, backward.row(row), 0, backward.grad_entropy[row]);
  }
  for (int64_t row = 0; row < 3; ++row) EXPECT_EQ(forward.entropy[row], forward.entropy[row + 3]);
}

TYPED_TEST(TokenEntropyKernel, RowsLeftOutAreNotReadAndGiveZero) {
  RowsCase<TypeParam> rows(3, 100);
  rows.with_mask = true;
  rows.mask[1] = rows.mask[2] = false;
  // Rows 1 and 2 lie outside the tensor: ASan reports a read.
  rows.layout.stride[0] = 1 << 20;
  typename TestFixture::Forward forward(rows);
  rows.expect_entropy(0, forward.entropy[0]);
  EXPECT_EQ(forward.entropy[1], 0);
  EXPECT_EQ(forward.entropy[2], 0);
  typename TestFixture::Backward backward(rows, forward, {1, 1, 1});
  rows.expect_gradient(0, backward.row(0), 0, 1);
  rows.expect_zero(1, backward.row(1));
  rows.expect_zero(2, backward.row(2));
}

TYPED_TEST(TokenEntropyKernel, RowsWithoutGradientAreNotReadAgain) {
  for (int vocab : testing::kVocabSizes) {
    RowsCase<TypeParam> rows(3, vocab);
    typename TestFixture::Forward forward(rows);
    rows.layout.stride[0] = 1 << 20;
    typename TestFixture::Backward backward(rows, forward, {1, 0, 0});
    rows.expect_gradient(0, backward.row(0), 0, 1);
    rows.expect_zero(1, backward.row(1));
    rows.expect_zero(2, backward.row(2));
  }
}

TYPED_TEST(TokenEntropyKernel, PartsOfARowInBlocksOfTheirOwnGiveTheSameBits) {
  using Acc = typename TestFixture::Acc;
  // 17000: more rounds of the block than a row has parts, for 4-byte and 8-byte types.
  for (const int vocab : {33, 2101, 17000}) {
    RowsCase<TypeParam> rows(3, vocab);
    rows.with_mask = true;
    rows.mask[1] = false;
    typename TestFixture::Forward whole(rows);
    const RowParts parts = row_parts<TypeParam>(vocab, 32);
    ASSERT_LE(parts.count, kMaxRowParts);
    simt::Buffer<OnlineSoftmax<Acc>> states(3 * parts.count);
    simt::Buffer<Acc> entropy(3), statistics(6);
    simt::launch(kBlocks, 32, softmax_parts_kernel<TypeParam>, rows.arguments(false),
                 states.data());
    simt::launch(1, 64, softmax_merge_kernel<TypeParam>, rows.arguments(false), states.data(),
                 parts.count, SoftmaxOutputs<Acc>{nullptr, entropy.data(), statistics.data()});
    for (int i = 0; i < 3; ++i) EXPECT_EQ(entropy[i], whole.entropy[i]);
    for (int i = 0; i < 6; ++i) EXPECT_EQ(statistics[i], whole.statistics[i]);
    for (const int backward_parts : {1, 2, 5}) {
      typename TestFixture::Backward backward(rows, whole, {1, 1, 0}, 32, backward_parts);
      rows.expect_gradient(0, backward.row(0), 0, 1);
      rows.expect_zero(1, backward.row(1));
      rows.expect_zero(2, backward.row(2));
    }
  }
}

TYPED_TEST(TokenEntropyKernel, ARowGivesTheSameBitsAtEveryAlignment) {
  const auto values = testing::normal_values<TypeParam>(2101, 3.0, 1);
  RowsCase<TypeParam> alone(1, 2101, 2101, values);
  typename TestFixture::Forward expected(alone);
  for (int64_t first = 1; first < int64_t(16 / sizeof(TypeParam)); ++first) {
    std::vector<TypeParam> shifted(first, testing::element<TypeParam>(100));
    shifted.insert(shifted.end(), values.begin(), values.end());
    RowsCase<TypeParam> rows(1, 2101, 2101, shifted);
    rows.first = first;
    typename TestFixture::Forward forward(rows);
    EXPECT_EQ(forward.entropy[0], expected.entropy[0]);
    EXPECT_EQ(forward.statistics[1], expected.statistics[1]);
  }
}

TYPED_TEST(TokenEntropyKernel, TemperatureIsOneNumberOrOneARow) {
  using Acc = typename TestFixture::Acc;
  RowsCase<TypeParam> rows(5, 100);
  rows.temperature = Acc(0.7);
  const auto expect_match = [&] {
    typename TestFixture::Forward forward(rows);
    typename TestFixture::Backward backward(rows, forward, {1, 1, 1, 1, 1});
    for (int64_t row = 0; row < 5; ++row) {
      rows.expect_entropy(row, forward.entropy[row]);
      rows.expect_gradient(row, backward.row(row), 0, 1);
    }
  };
  expect_match();
  rows.with_row_temperature = true;
  const Acc temperatures[] = {0.5, 1, 2, 1, 100};
  std::copy(temperatures, temperatures + 5, rows.row_temperature.begin());
  expect_match();
}

TYPED_TEST(TokenEntropyKernel, TemperatureThatIsNotPositiveGivesNanForItsRow) {
  RowsCase<TypeParam> rows(4, 40);
  rows.with_row_temperature = true;
  rows.row_temperature[1] = 0;
  rows.row_temperature[2] = -1;
  rows.row_temperature[3] = this->kNan;
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward, {1, 1, 1, 1});
  rows.expect_entropy(0, forward.entropy[0]);
  rows.expect_gradient(0, backward.row(0), 0, 1);
  for (int64_t row = 1; row < 4; ++row) {
    EXPECT_TRUE(std::isnan(forward.entropy[row]));
    rows.expect_nan(row, backward.row(row));
  }
}

TYPED_TEST(TokenEntropyKernel, MinusInfinityHasNoProbabilityAndNoGradient) {
  // In the head, body and tail of a row, and everywhere but in one place.
  const auto minus_inf = testing::element<TypeParam>(-this->kInf);
  RowsCase<TypeParam> rows(2, 257);
  for (int j : {0, 1, 100, 101, 102, 103, 255, 256}) rows.logit(0, j) = minus_inf;
  for (int j = 0; j < 257; ++j) {
    if (j != 130) rows.logit(1, j) = minus_inf;
  }
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward, {1, 1});
  rows.expect_entropy(0, forward.entropy[0]);
  EXPECT_EQ(forward.entropy[1], 0);
  rows.expect_gradient(0, backward.row(0), 0, 1);
  EXPECT_EQ(load_value(backward.row(0)[100]), 0);
  rows.expect_zero(1, backward.row(1));
}

TYPED_TEST(TokenEntropyKernel, NanStaysInItsRow) {
  // A NaN, a +inf, a row of only -inf; rows around them are as they would be without.
  for (int at : {0, 128, 256}) {
    RowsCase<TypeParam> rows(5, 257);
    rows.logit(1, at) = testing::element<TypeParam>(this->kNan);
    rows.logit(2, at) = testing::element<TypeParam>(this->kInf);
    for (int j = 0; j < 257; ++j) rows.logit(3, j) = testing::element<TypeParam>(-this->kInf);
    typename TestFixture::Forward forward(rows);
    typename TestFixture::Backward backward(rows, forward, {1, 1, 1, 1, 1});
    for (int64_t row : {1, 2, 3}) {
      EXPECT_TRUE(std::isnan(forward.entropy[row]));
      rows.expect_nan(row, backward.row(row));
    }
    for (int64_t row : {0, 4}) {
      rows.expect_entropy(row, forward.entropy[row]);
      rows.expect_gradient(row, backward.row(row), 0, 1);
    }
  }
}

}  // namespace
}  // namespace entropy_rl
