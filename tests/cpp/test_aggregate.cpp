// How tokens add up: the arithmetic of rows and batch, and the kernels of aggregate, unmodified,
// under the SIMT shim.
#include "kernels/aggregate_math.h"

#include <gtest/gtest.h>

#include "token_loss_case.h"

namespace entropy_rl {
namespace {

using testing::kInfinity;
using testing::kNan;
using testing::kTolerance;
using testing::LossRun;
using testing::normalization;
using testing::TokenBatch;

// Two rows: losses 6 over 2 of 4 response tokens, and 3 over 1 of 1; a third without response
// tokens.
const LossSums<double> kRows[] = {{6, 2, 4, 1, 0, 2, 0, 0}, {3, 1, 1, 1, 1, 3, 0, 0}, {}};

double total(const Normalization& by) {
  BatchSums batch{};
  for (const auto& row : kRows) batch.add_row(row, by);
  double loss = 0;
  for (const auto& row : kRows) {
    const RowLoss result = sum_loss(row, batch, by);
    EXPECT_DOUBLE_EQ(result.loss, row.loss * result.scale);
    loss += result.loss;
  }
  return loss;
}

TEST(Aggregation, OverSelectedTokens) {
  EXPECT_DOUBLE_EQ(total(normalization(Aggregation::kTokenMean)), 9.0 / 3);
  EXPECT_DOUBLE_EQ(total(normalization(Aggregation::kTokenSum)), 9);
  EXPECT_DOUBLE_EQ(total(normalization(Aggregation::kSeqMeanTokenSum)), 9.0 / 2);
  EXPECT_DOUBLE_EQ(total(normalization(Aggregation::kSeqMeanTokenSumNorm)), 9.0 / 2 / 10);
  EXPECT_NEAR(total(normalization(Aggregation::kSeqMeanTokenMean)), (3.0 + 3.0) / 2, 1e-7);
}

TEST(Aggregation, OverResponseTokens) {
  EXPECT_DOUBLE_EQ(total(normalization(Aggregation::kTokenMean, true)), 9.0 / 5);
  EXPECT_NEAR(total(normalization(Aggregation::kSeqMeanTokenMean, true)), (1.5 + 3.0) / 2, 1e-7);
}

TEST(Aggregation, GivenDivisorStandsInForTheCount) {
  const double divisor = 12;
  for (const Aggregation aggregation : {Aggregation::kTokenMean, Aggregation::kSeqMeanTokenSum}) {
    Normalization by = normalization(aggregation);
    by.given_divisor = &divisor;
    by.dp_size = 4;
    EXPECT_DOUBLE_EQ(total(by), 9.0 / 12 * 4);
  }
}

TEST(Aggregation, NothingCountedGivesZero) {
  const double zero = 0;
  Normalization by = normalization(Aggregation::kTokenMean);
  const RowLoss empty = sum_loss({}, BatchSums{}, by);
  EXPECT_EQ(empty.loss, 0);
  EXPECT_EQ(empty.scale, 0);
  by.given_divisor = &zero;
  EXPECT_EQ(total(by), 0);
}

TEST(Metrics, AreMeansOverResponseTokens) {
  BatchSums batch{};
  for (const auto& row : kRows) batch.add_row(row, normalization(Aggregation::kTokenMean));
  double metrics[kMetrics];
  write_metrics(batch, metrics);
  EXPECT_NEAR(metrics[0], 2.0 / 5, 1e-8);
  EXPECT_NEAR(metrics[1], 5.0 / 5, 1e-8);
  EXPECT_NEAR(metrics[2], 1.0 / 5, 1e-8);
  EXPECT_DOUBLE_EQ(metrics[3], 3.0 / 5);
  write_metrics(BatchSums{}, metrics);
  for (const double metric : metrics) EXPECT_EQ(metric, 0);
}

TEST(TokenGradient, OfATokenThatIsOutStaysZero) {
  EXPECT_EQ(token_gradient(0.0, kNan), 0);
  EXPECT_EQ(token_gradient(0.0, kInfinity), 0);
  EXPECT_EQ(token_gradient(2.0, 3.0), 6);
}

template <class T>
class AggregateKernels : public ::testing::Test {};
TYPED_TEST_SUITE(AggregateKernels, testing::ValueTypes);

// One token; fewer than a warp; not a multiple of a warp; slightly more than a tile.
constexpr int64_t kCols[] = {1, 7, 300, kTileTokens + 53};

TYPED_TEST(AggregateKernels, SumSelectedTokensAndDivide) {
  for (const int64_t cols : kCols) {
    TokenBatch<TypeParam> batch(5, cols);
    for (int64_t i = 2 * cols; i < 3 * cols; ++i) batch.entropy_mask[i] = 0;
    LossRun<TypeParam, PlainValue<TypeParam>> run({}, batch.inputs(),
                                                  normalization(Aggregation::kTokenMean));
    double sum = 0, selected = 0, response = 0;
    for (int64_t i = 0; i < 5 * cols; ++i) {
      if (batch.selected(i)) sum += double(batch.log_prob[i]) * double(batch.weights[i]);
      selected += batch.selected(i);
      response += batch.response(i);
      EXPECT_EQ(run.gradient[i], batch.selected(i) ? batch.weights[i] : TypeParam(0));
    }
    EXPECT_NEAR(run.loss[0], selected > 0 ? sum / selected : 0, 4 * kTolerance<TypeParam>);
    EXPECT_NEAR(run.metrics[3], response > 0 ? selected / response : 0, kTolerance<TypeParam>);
    for (int64_t row = 0; row < 5; ++row) {
      double counted = 0;
      for (int64_t i = row * cols; i < (row + 1) * cols; ++i) counted += batch.selected(i);
      EXPECT_NEAR(run.row_scale[row], counted > 0 ? 1 / selected : 0, kTolerance<TypeParam>);
    }
  }
}

TYPED_TEST(AggregateKernels, AbsentInputsReadAsTheirDefaults) {
  TokenBatch<TypeParam> batch(2, 40);
  TokenInputs<TypeParam> in{};
  in.log_prob = batch.log_prob.data();
  in.response_mask = batch.response_mask.data();
  in.rows = 2;
  in.cols = 40;
  LossRun<TypeParam, PlainValue<TypeParam>> run({}, in, normalization(Aggregation::kTokenSum));
  double sum = 0;
  for (int64_t i = 0; i < 80; ++i) sum += batch.response(i) ? double(batch.log_prob[i]) : 0;
  EXPECT_NEAR(run.loss[0], sum, 80 * kTolerance<TypeParam>);
  EXPECT_EQ(run.metrics[3], TypeParam(1));
}

TYPED_TEST(AggregateKernels, MoreRowsThanThreadsAddUp) {
  // More rows a thread than it has in flight.
  TokenBatch<TypeParam> batch(5 * kWarpSize + 5, 3);
  LossRun<TypeParam, PlainValue<TypeParam>> run(
      {}, batch.inputs(), normalization(Aggregation::kSeqMeanTokenSum), kWarpSize);
  double sum = 0, rows = 0;
  std::vector<bool> has_tokens;
  for (int64_t row = 0; row < batch.rows; ++row) {
    bool counted = false;
    for (int64_t i = 3 * row; i < 3 * row + 3; ++i) {
      if (!batch.selected(i)) continue;
      sum += double(batch.log_prob[i]) * double(batch.weights[i]);
      counted = true;
    }
    rows += counted;
    has_tokens.push_back(counted);
  }
  EXPECT_NEAR(run.loss[0], sum / rows, 10 * kTolerance<TypeParam>);
  for (int64_t row = 0; row < batch.rows; ++row) {
    EXPECT_NEAR(run.row_scale[row], has_tokens[row] ? 1 / rows : 0, kTolerance<TypeParam>) << row;
  }
}

template <class T>
class ScaleRowsKernel : public ::testing::Test {};
using BackwardTypes = ::testing::Types<float, double, BFloat16, Half>;
TYPED_TEST_SUITE(ScaleRowsKernel, BackwardTypes);

TYPED_TEST(ScaleRowsKernel, MultipliesGradientByRowAndIncomingGradient) {
  using Acc = accumulate_t<TypeParam>;
  const int64_t rows = 5, cols = 130;
  std::vector<Acc> gradient(rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i) gradient[i] = Acc(i % 7);
  simt::Buffer<Acc> grad_loss(std::vector<Acc>{2}), gradients(gradient);
  simt::Buffer<Acc> row_scale(std::vector<Acc>{1, 0.5, Acc(kNan), 0, -1});
  simt::Buffer<TypeParam> out(rows * cols);
  simt::launch(testing::kBlocks, testing::kThreads, scale_rows_kernel<TypeParam>, grad_loss.data(),
               gradients.data(), row_scale.data(), rows, cols, out.data());
  for (int64_t i = 0; i < rows * cols; ++i) {
    const Acc value = load_value(out[i]);
    if (gradient[i] == 0) {
      EXPECT_EQ(value, 0);
    } else if (i / cols == 2) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      EXPECT_EQ(value, 2 * row_scale[i / cols] * gradient[i]);
    }
  }
}

}  // namespace
}  // namespace entropy_rl
