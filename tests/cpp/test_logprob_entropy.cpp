// The kernels of logprob_entropy, unmodified, under the SIMT shim; without targets they are those
// of token_entropy.
#include "kernels/logprob_entropy.cuh"

#include <gtest/gtest.h>

#include "softmax_rows_case.h"

namespace entropy_rl {
namespace {

using testing::kBlocks;
using testing::RowsCase;

template <class T>
class LogprobEntropyKernel : public ::testing::Test {
 protected:
  using Acc = accumulate_t<T>;
  static constexpr double kInf = std::numeric_limits<double>::infinity();
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

  struct Forward {
    simt::Buffer<Acc> log_prob;     // [rows]
    simt::Buffer<Acc> entropy;      // [rows]
    simt::Buffer<Acc> max_log_sum;  // [rows, 2]

    Forward(RowsCase<T>& rows, int threads = 32, bool with_targets = true)
        : log_prob(rows.rows), entropy(rows.rows), max_log_sum(2 * rows.rows) {
      simt::launch(kBlocks, threads, logprob_entropy_kernel<T>, rows.arguments(with_targets),
                   SoftmaxOutputs<Acc>{with_targets ? log_prob.data() : nullptr, entropy.data(),
                                       max_log_sum.data()});
    }
  };

  struct Backward {
    simt::Buffer<T> grad_logits;  // [rows, vocab]
    int vocab;

    // An empty gradient stands for the null pointer.
    Backward(RowsCase<T>& rows, Forward& forward, const std::vector<Acc>& for_log_prob,
             const std::vector<Acc>& for_entropy, int threads = 32, int parts = 1,
             bool with_targets = true)
        : grad_logits(rows.rows * rows.vocab), vocab(rows.vocab) {
      simt::Buffer<Acc> grad_log_prob(for_log_prob), grad_entropy(for_entropy);
      simt::launch(kBlocks, threads, logprob_entropy_backward_kernel<T>,
                   rows.arguments(with_targets), parts,
                   for_log_prob.empty() ? nullptr : grad_log_prob.data(),
                   for_entropy.empty() ? nullptr : grad_entropy.data(), forward.entropy.data(),
                   forward.max_log_sum.data(), grad_logits.data());
    }
    const T* row(int64_t row) { return grad_logits.data() + row * vocab; }
  };
};

TYPED_TEST_SUITE(LogprobEntropyKernel, testing::LogitsTypes);

TYPED_TEST(LogprobEntropyKernel, MatchesDefinitionForEveryVocabulary) {
  using Acc = typename TestFixture::Acc;
  for (int vocab : testing::kVocabSizes) {
    for (int threads : testing::kBlockThreads) {
      RowsCase<TypeParam> rows(3, vocab);
      typename TestFixture::Forward forward(rows, threads);
      for (int64_t row = 0; row < 3; ++row) {
        rows.expect_log_prob(row, forward.log_prob[row]);
        rows.expect_entropy(row, forward.entropy[row]);
      }
      const std::vector<Acc> for_log_prob = {1, -2, 0}, for_entropy = {0, 0.5, -1};
      typename TestFixture::Backward backward(rows, forward, for_log_prob, for_entropy, threads);
      for (int64_t row = 0; row < 3; ++row) {
        rows.expect_gradient(row, backward.row(row), for_log_prob[row], for_entropy[row]);
      }
    }
  }
}

TYPED_TEST(LogprobEntropyKernel, WithoutTargetsTheEntropyAndItsGradientAreTheSame) {
  for (int vocab : testing::kVocabSizes) {
    for (int threads : testing::kBlockThreads) {
      RowsCase<TypeParam> rows(3, vocab);
      typename TestFixture::Forward with(rows, threads), without(rows, threads, false);
      typename TestFixture::Backward with_targets(rows, with, {}, {1, -2, 0.5}, threads);
      typename TestFixture::Backward backward(rows, without, {}, {1, -2, 0.5}, threads, 1, false);
      for (int i = 0; i < 3; ++i) EXPECT_EQ(without.entropy[i], with.entropy[i]);
      for (int i = 0; i < 6; ++i) EXPECT_EQ(without.max_log_sum[i], with.max_log_sum[i]);
      for (int i = 0; i < 3 * vocab; ++i) {
        EXPECT_EQ(load_value(backward.grad_logits[i]), load_value(with_targets.grad_logits[i]));
      }
    }
  }
}

TYPED_TEST(LogprobEntropyKernel, SavesMaxAndLogSum) {
  RowsCase<TypeParam> rows(3, 257);
  typename TestFixture::Forward forward(rows);
  for (int64_t row = 0; row < 3; ++row) {
    const auto log_p = rows.log_probs(row);
    const auto max = std::max_element(log_p.begin(), log_p.end());
    EXPECT_EQ(forward.max_log_sum[2 * row], load_value(rows.logit(row, max - log_p.begin())));
    EXPECT_NEAR(forward.max_log_sum[2 * row + 1], -*max,
                testing::kValueTolerance<typename TestFixture::Acc>);
  }
}

TYPED_TEST(LogprobEntropyKernel, LogitsFarFromZeroCostNoDigits) {
  for (double shift : {-1e4, 1e4}) {
    RowsCase<TypeParam> rows(3, 257);
    for (auto& logit : rows.logits) logit = testing::element<TypeParam>(load_value(logit) + shift);
    typename TestFixture::Forward forward(rows);
    for (int64_t row = 0; row < 3; ++row) rows.expect_entropy(row, forward.entropy[row]);
  }
}

TYPED_TEST(LogprobEntropyKernel, RowsStartAnywhereInMemory) {
  // Every offset from a 16-byte boundary that the type allows. There is a gap between the rows of
  // the logits but not between those of the gradient, so their alignments differ.
  for (int64_t first = 0; first < int64_t(16 / sizeof(TypeParam)); ++first) {
    for (const int vocab : {67, 1100}) {
      const int64_t stride = vocab + 3;
      RowsCase<TypeParam> rows(
          3, vocab, stride,
          testing::normal_values<TypeParam>(first + 2 * stride + vocab, 3.0, first));
      rows.first = first;
      typename TestFixture::Forward forward(rows);
      typename TestFixture::Backward backward(rows, forward, {}, {1, 1, 1});
      for (int64_t row = 0; row < 3; ++row) {
        rows.expect_entropy(row, forward.entropy[row]);
        rows.expect_gradient(row, backward.row(row), 0, 1);
      }
    }
  }
}

TYPED_TEST(LogprobEntropyKernel, ExpandedAndSlicedLeadingDimensions) {
  // [2, 3, vocab] whose outer dimension is expanded and whose inner one is every second row.
  RowsCase<TypeParam> rows(6, 33, 33, testing::normal_values<TypeParam>(5 * 33, 3.0, 1));
  rows.layout.size[0] = 3;
  rows.layout.stride[0] = 2 * 33;
  rows.layout.size[1] = 2;
  rows.layout.stride[1] = 0;
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward, {}, {1, 2, 3, 4, 5, 6});
  for (int64_t row = 0; row < 6; ++row) {
    rows.expect_entropy(row, forward.entropy[row]);
    rows.expect_gradient(row, backward.row(row), 0, row + 1);
  }
  for (int64_t row = 0; row < 3; ++row) EXPECT_EQ(forward.entropy[row], forward.entropy[row + 3]);
}

TYPED_TEST(LogprobEntropyKernel, RowsLeftOutAreNotReadAndGiveZero) {
  RowsCase<TypeParam> rows(3, 100);
  rows.with_mask = true;
  rows.mask[1] = rows.mask[2] = false;
  // Rows 1 and 2 are outside the tensor, so ASan reports a read.
  rows.layout.stride[0] = 1 << 20;
  typename TestFixture::Forward forward(rows);
  rows.expect_entropy(0, forward.entropy[0]);
  EXPECT_EQ(forward.entropy[1], 0);
  EXPECT_EQ(forward.entropy[2], 0);
  typename TestFixture::Backward backward(rows, forward, {}, {1, 1, 1});
  rows.expect_gradient(0, backward.row(0), 0, 1);
  rows.expect_zero(1, backward.row(1));
  rows.expect_zero(2, backward.row(2));
}

TYPED_TEST(LogprobEntropyKernel, RowsWithoutGradientAreNotReadAgain) {
  for (int vocab : testing::kVocabSizes) {
    RowsCase<TypeParam> rows(3, vocab);
    typename TestFixture::Forward forward(rows);
    rows.layout.stride[0] = 1 << 20;
    typename TestFixture::Backward backward(rows, forward, {}, {1, 0, 0});
    rows.expect_gradient(0, backward.row(0), 0, 1);
    rows.expect_zero(1, backward.row(1));
    rows.expect_zero(2, backward.row(2));
  }
}

TYPED_TEST(LogprobEntropyKernel, ABlockForEachPartOfARowGivesTheSameBits) {
  using Acc = typename TestFixture::Acc;
  // 17000: more rounds of the block than a row has parts, for 4-byte and 8-byte types.
  for (const int vocab : {33, 2101, 17000}) {
    RowsCase<TypeParam> rows(3, vocab);
    rows.with_mask = true;
    rows.mask[1] = false;
    typename TestFixture::Forward expected(rows);
    const RowParts parts = row_parts<TypeParam>(vocab, 32);
    ASSERT_LE(parts.count, kMaxRowParts);
    ASSERT_GE(parts.packs, 2 * kPacksInFlight<TypeParam> * 32);
    simt::Buffer<OnlineSoftmax<Acc>> states(3 * parts.count);
    simt::Buffer<Acc> log_prob(3), entropy(3), max_log_sum(6);
    simt::launch(3 * parts.count, 32, softmax_parts_kernel<TypeParam>, rows.arguments(true),
                 states.data());
    simt::launch(3, kWarpSize, softmax_merge_kernel<TypeParam>, rows.arguments(true), states.data(),
                 parts.count,
                 SoftmaxOutputs<Acc>{log_prob.data(), entropy.data(), max_log_sum.data()});
    for (int i = 0; i < 3; ++i) EXPECT_EQ(log_prob[i], expected.log_prob[i]);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(entropy[i], expected.entropy[i]);
    for (int i = 0; i < 6; ++i) EXPECT_EQ(max_log_sum[i], expected.max_log_sum[i]);
    for (const int backward_parts : {1, 2, 5}) {
      typename TestFixture::Backward backward(rows, expected, {}, {1, 1, 0}, 32, backward_parts);
      rows.expect_gradient(0, backward.row(0), 0, 1);
      rows.expect_zero(1, backward.row(1));
      rows.expect_zero(2, backward.row(2));
    }
  }
}

TYPED_TEST(LogprobEntropyKernel, ARowGivesTheSameBitsAtEveryAlignment) {
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
    EXPECT_EQ(forward.max_log_sum[1], expected.max_log_sum[1]);
  }
}

TYPED_TEST(LogprobEntropyKernel, TemperatureIsOneNumberOrOneARow) {
  using Acc = typename TestFixture::Acc;
  RowsCase<TypeParam> rows(5, 100);
  rows.temperature = Acc(0.7);
  const auto expect_match = [&] {
    typename TestFixture::Forward forward(rows);
    typename TestFixture::Backward backward(rows, forward, {}, {1, 1, 1, 1, 1});
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

TYPED_TEST(LogprobEntropyKernel, TemperatureThatIsNotPositiveGivesNanForItsRow) {
  RowsCase<TypeParam> rows(4, 40);
  rows.with_row_temperature = true;
  rows.row_temperature[1] = 0;
  rows.row_temperature[2] = -1;
  rows.row_temperature[3] = this->kNan;
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward, {}, {1, 1, 1, 1});
  rows.expect_entropy(0, forward.entropy[0]);
  rows.expect_gradient(0, backward.row(0), 0, 1);
  for (int64_t row = 1; row < 4; ++row) {
    EXPECT_TRUE(std::isnan(forward.entropy[row]));
    rows.expect_nan(row, backward.row(row));
  }
}

TYPED_TEST(LogprobEntropyKernel, MinusInfinityHasNoProbabilityAndNoGradient) {
  // In the head, body and tail of a row, and everywhere but in one entry.
  const auto minus_inf = testing::element<TypeParam>(-this->kInf);
  RowsCase<TypeParam> rows(2, 257);
  for (int j : {0, 1, 100, 101, 102, 103, 255, 256}) rows.logit(0, j) = minus_inf;
  for (int j = 0; j < 257; ++j) {
    if (j != 130) rows.logit(1, j) = minus_inf;
  }
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward, {}, {1, 1});
  rows.expect_entropy(0, forward.entropy[0]);
  EXPECT_EQ(forward.entropy[1], 0);
  rows.expect_gradient(0, backward.row(0), 0, 1);
  EXPECT_EQ(load_value(backward.row(0)[100]), 0);
  rows.expect_zero(1, backward.row(1));
}

TYPED_TEST(LogprobEntropyKernel, NanStaysInItsRow) {
  // A NaN, a +inf, a row of only -inf; the rows around them do not change.
  for (int at : {0, 128, 256}) {
    RowsCase<TypeParam> rows(5, 257);
    rows.logit(1, at) = testing::element<TypeParam>(this->kNan);
    rows.logit(2, at) = testing::element<TypeParam>(this->kInf);
    for (int j = 0; j < 257; ++j) rows.logit(3, j) = testing::element<TypeParam>(-this->kInf);
    typename TestFixture::Forward forward(rows);
    typename TestFixture::Backward backward(rows, forward, {}, {1, 1, 1, 1, 1});
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

TYPED_TEST(LogprobEntropyKernel, TargetAnywhereInTheRow) {
  // In the head, a pack and the tail of a row that does not start at a 16-byte boundary.
  RowsCase<TypeParam> rows(67, 67, 67, testing::normal_values<TypeParam>(1 + 67 * 67, 3.0, 1));
  rows.first = 1;
  for (int64_t row = 0; row < 67; ++row) rows.targets[row] = row;
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward,
                                          std::vector<typename TestFixture::Acc>(67, 1), {});
  for (int64_t row = 0; row < 67; ++row) {
    rows.expect_log_prob(row, forward.log_prob[row]);
    rows.expect_gradient(row, backward.row(row), 1, 0);
  }
}

TYPED_TEST(LogprobEntropyKernel, EitherGradientMayBeAbsent) {
  RowsCase<TypeParam> rows(3, 100);
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward of_log_prob(rows, forward, {1, 0, -1}, {});
  typename TestFixture::Backward of_entropy(rows, forward, {}, {1, 0, -1});
  typename TestFixture::Backward of_nothing(rows, forward, {}, {});
  for (int64_t row = 0; row < 3; ++row) {
    rows.expect_gradient(row, of_log_prob.row(row), 1 - row, 0);
    rows.expect_gradient(row, of_entropy.row(row), 0, 1 - row);
    rows.expect_zero(row, of_nothing.row(row));
  }
}

TYPED_TEST(LogprobEntropyKernel, TargetOutsideTheVocabularyGivesNanForItsRow) {
  RowsCase<TypeParam> rows(5, 40);
  rows.targets[1] = 40;
  rows.targets[2] = -1;
  rows.targets[3] = int64_t{1} << 32;  // its low 32 bits are 0, a valid target
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward of_log_prob(rows, forward, {1, 1, 1, 1, 1}, {});
  typename TestFixture::Backward of_entropy(rows, forward, {}, {1, 1, 1, 1, 1});
  for (int64_t row = 0; row < 5; ++row) {
    // The entropy does not depend on the target.
    rows.expect_entropy(row, forward.entropy[row]);
    rows.expect_gradient(row, of_entropy.row(row), 0, 1);
    if (row == 0 || row == 4) {
      rows.expect_log_prob(row, forward.log_prob[row]);
      rows.expect_gradient(row, of_log_prob.row(row), 1, 0);
    } else {
      EXPECT_TRUE(std::isnan(forward.log_prob[row]));
      rows.expect_nan(row, of_log_prob.row(row));
    }
  }
}

TYPED_TEST(LogprobEntropyKernel, RowsLeftOutMayHaveAnyTarget) {
  RowsCase<TypeParam> rows(3, 100);
  rows.with_mask = true;
  rows.mask[1] = rows.mask[2] = false;
  rows.targets[1] = -100;           // the usual label of a padded token
  rows.layout.stride[0] = 1 << 20;  // rows 1 and 2 are outside the tensor, so ASan reports a read
  typename TestFixture::Forward forward(rows);
  typename TestFixture::Backward backward(rows, forward, {1, 1, 1}, {1, 1, 1});
  rows.expect_log_prob(0, forward.log_prob[0]);
  rows.expect_gradient(0, backward.row(0), 1, 1);
  for (int64_t row : {1, 2}) {
    EXPECT_EQ(forward.log_prob[row], 0);
    EXPECT_EQ(forward.entropy[row], 0);
    rows.expect_zero(row, backward.row(row));
  }
}

TYPED_TEST(LogprobEntropyKernel, TargetWithLogitMinusInfinityHasLogProbMinusInfinity) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  RowsCase<TypeParam> rows(1, 100);
  rows.logit(0, 50) = testing::element<TypeParam>(-kInf);
  rows.targets[0] = 50;
  typename TestFixture::Forward forward(rows);
  EXPECT_EQ(forward.log_prob[0], -kInf);
  rows.expect_entropy(0, forward.entropy[0]);
  // Zero for the entropy and 1 - p = 1 for the log-probability.
  typename TestFixture::Backward backward(rows, forward, {1}, {1});
  EXPECT_EQ(load_value(backward.row(0)[50]), 1);
}

}  // namespace
}  // namespace entropy_rl
