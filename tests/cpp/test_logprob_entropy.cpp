// The kernels of logprob_entropy, unmodified, under the SIMT shim: what targets and the two
// gradients add to token_entropy.
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

  struct Forward {
    simt::Buffer<Acc> log_prob;    // [rows]
    simt::Buffer<Acc> entropy;     // [rows]
    simt::Buffer<Acc> statistics;  // [rows, 2]

    Forward(RowsCase<T>& rows, int threads = 32)
        : log_prob(rows.rows), entropy(rows.rows), statistics(2 * rows.rows) {
      simt::launch(kBlocks, threads, logprob_entropy_kernel<T>, rows.arguments(true),
                   SoftmaxOutputs<Acc>{log_prob.data(), entropy.data(), statistics.data()});
    }
  };

  struct Backward {
    simt::Buffer<T> grad_logits;  // [rows, vocab]
    int vocab;

    // An empty gradient stands for the null pointer.
    Backward(RowsCase<T>& rows, Forward& forward, const std::vector<Acc>& for_log_prob,
             const std::vector<Acc>& for_entropy, int threads = 32)
        : grad_logits(rows.rows * rows.vocab), vocab(rows.vocab) {
      simt::Buffer<Acc> grad_log_prob(for_log_prob), grad_entropy(for_entropy);
      simt::launch(kBlocks, threads, logprob_entropy_backward_kernel<T>, rows.arguments(true), 1,
                   for_log_prob.empty() ? nullptr : grad_log_prob.data(),
                   for_entropy.empty() ? nullptr : grad_entropy.data(), forward.entropy.data(),
                   forward.statistics.data(), grad_logits.data());
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

TYPED_TEST(LogprobEntropyKernel, TargetAnywhereInTheRow) {
  // In the head, a pack and the tail of a row that starts off a 16-byte boundary.
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
  rows.targets[3] = int64_t{1} << 32;  // 0, were it cut to 32 bits
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

TYPED_TEST(LogprobEntropyKernel, RowsLeftOutGiveZeroWhateverTheirTarget) {
  RowsCase<TypeParam> rows(3, 100);
  rows.with_mask = true;
  rows.mask[1] = rows.mask[2] = false;
  rows.targets[1] = -100;           // the usual label of a padded token
  rows.layout.stride[0] = 1 << 20;  // rows 1 and 2 lie outside the tensor: ASan reports a read
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
