// The KL penalties of one token: values, gradients, clamps; and one of them through the kernels.
#include "kernels/kl_loss_math.h"

#include <gtest/gtest.h>

#include "token_loss_case.h"

namespace entropy_rl {
namespace {

using testing::kTolerance;
using testing::LossRun;
using testing::normalization;
using testing::numeric_gradient;
using testing::TokenBatch;

template <bool straight_through>
using K1 = K1Penalty<double, straight_through>;
template <bool straight_through>
using Abs = AbsPenalty<double, straight_through>;
template <bool straight_through>
using K3 = K3Penalty<double, straight_through>;

constexpr double kDistances[] = {-4.0, -1.0, -1e-3, 1e-3, 0.5, 2.0, 6.0};

Token<double> token(double d) { return {d - 7, -7, 0, 0, false, 0, 0}; }

TEST(KlPenalty, Values) {
  for (const double d : kDistances) {
    EXPECT_NEAR(K1<false>{}(token(d)).loss, d, 1e-12);
    EXPECT_NEAR(Abs<false>{}(token(d)).loss, std::abs(d), 1e-12);
    EXPECT_NEAR(K2Penalty<double>{}(token(d)).loss, d * d / 2, 1e-12);
    EXPECT_NEAR(K3<false>{}(token(d)).loss, std::min(std::exp(-d) + d - 1, 10.0), 1e-12);
  }
}

TEST(KlPenalty, GradientsAreDerivatives) {
  for (const double d : kDistances) {
    const auto check = [&](const auto& penalty) {
      EXPECT_NEAR(penalty(token(d)).gradient, numeric_gradient(penalty, token(d)), 1e-6) << d;
    };
    check(K1<false>{});
    check(Abs<false>{});
    check(K2Penalty<double>{});
    check(K3<false>{});
  }
}

TEST(KlPenalty, StraightThroughHasTheGradientOfK2) {
  for (const double d : kDistances) {
    const double expected = K2Penalty<double>{}(token(d)).gradient;
    EXPECT_EQ(K1<true>{}(token(d)).gradient, expected);
    EXPECT_EQ(Abs<true>{}(token(d)).gradient, expected);
    EXPECT_EQ(K3<true>{}(token(d)).gradient, expected);
    EXPECT_EQ(K3<true>{}(token(d)).loss, K3<false>{}(token(d)).loss);
  }
}

TEST(KlPenalty, FarPoliciesAreClampedWithoutGradient) {
  for (const double d : {-200.0, -20.5, -5.0, 15.0, 200.0}) {
    EXPECT_EQ(K3<false>{}(token(d)).loss, 10);
    EXPECT_EQ(K3<false>{}(token(d)).gradient, 0);
    const K3Penalty<float, false> narrow;
    EXPECT_TRUE(std::isfinite(narrow({float(d), 0, 0, 0, false, 0, 0}).loss));
  }
}

TEST(KlPenalty, NanIsKept) {
  const Token<double> bad = token(testing::kNan);
  EXPECT_TRUE(std::isnan(K1<false>{}(bad).loss));
  EXPECT_TRUE(std::isnan(Abs<false>{}(bad).loss));
  EXPECT_TRUE(std::isnan(K2Penalty<double>{}(bad).loss));
  EXPECT_TRUE(std::isnan(K3<false>{}(bad).loss));
}

TEST(KlPenalty, ThroughTheKernels) {
  TokenBatch<float> batch(3, 100);
  LossRun<float, K3Penalty<float, false>> run({}, batch.inputs(),
                                              normalization(Aggregation::kTokenMean));
  double sum = 0, selected = 0;
  for (int64_t i = 0; i < 300; ++i) {
    if (!batch.selected(i)) continue;
    sum += K3<false>{}(batch.token(i)).loss * double(batch.weights[i]);
    ++selected;
  }
  EXPECT_NEAR(run.loss[0], sum / selected, kTolerance<float>);
}

}  // namespace
}  // namespace entropy_rl
