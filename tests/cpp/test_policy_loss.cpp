// The policy losses of one token against their formulas, and the kernels of policy_loss,
// unmodified, under the SIMT shim.
#include "kernels/policy_loss.cuh"

#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "token_loss_case.h"

namespace entropy_rl {
namespace {

using testing::kBlocks;
using testing::kNan;
using testing::kThreads;
using testing::kTolerance;
using testing::LossRun;
using testing::normalization;
using testing::numeric_gradient;
using testing::TokenBatch;

constexpr double kLow = 0.8, kHigh = 1.28;

Token<double> token(double d, double advantage, double old_log_prob = -1.5) {
  return {old_log_prob + d, old_log_prob, advantage, 0, false, 0, 0};
}

// Ratios inside, below and above the clip range and the dual clip, for either sign of the
// advantage.
std::vector<Token<double>> tokens() {
  std::vector<Token<double>> all;
  for (const double d : {-3.0, -0.4, -0.05, 0.1, 0.4, 1.4}) {
    for (const double advantage : {-1.5, -0.2, 0.7, 2.0}) all.push_back(token(d, advantage));
  }
  return all;
}

double clipped(double ratio) { return std::min(std::max(ratio, kLow), kHigh); }
double ratio_of(const Token<double>& t) { return std::exp(t.log_prob - t.old_log_prob); }

using Formula = std::function<double(const Token<double>&)>;

template <class TokenLoss>
void expect_formula(const TokenLoss& loss, const Formula& formula) {
  for (const Token<double>& t : tokens()) {
    EXPECT_NEAR(loss(t).loss, formula(t), 1e-12) << t.log_prob << " " << t.advantage;
  }
}

template <class TokenLoss>
void expect_derivative(const TokenLoss& loss) {
  for (const Token<double>& t : tokens()) {
    EXPECT_NEAR(loss(t).gradient, numeric_gradient(loss, t), 1e-6)
        << t.log_prob << " " << t.advantage;
  }
}

TEST(PolicyLoss, Vanilla) {
  const VanillaLoss<double> loss{kLow, kHigh, 3.0};
  expect_formula(loss, [](const Token<double>& t) {
    const double surrogate =
        std::max(-t.advantage * ratio_of(t), -t.advantage * clipped(ratio_of(t)));
    return t.advantage < 0 ? std::min(surrogate, -t.advantage * 3.0) : surrogate;
  });
  expect_derivative(loss);
  EXPECT_EQ(loss(token(0.4, 1)).clipped, 1);
  EXPECT_EQ(loss(token(0.4, -1)).clipped, 0);
  EXPECT_EQ(loss(token(-0.4, -1)).clipped, 1);
  EXPECT_EQ(loss(token(1.4, -1)).clipped_lower, 1);
  EXPECT_EQ(loss(token(1.0, -1)).clipped_lower, 0);
  EXPECT_DOUBLE_EQ(loss(token(30, 1)).kl, -20);
}

TEST(PolicyLoss, VanillaBeyondTheClampHasNoGradient) {
  const VanillaLoss<double> loss{kLow, kHigh, 1e30};
  EXPECT_EQ(loss(token(-25, 1)).gradient, 0);
  EXPECT_EQ(loss(token(25, -1)).gradient, 0);
  EXPECT_NEAR(loss(token(25, -1)).loss, std::exp(20), 1e-3);
}

TEST(PolicyLoss, Gpg) {
  expect_formula(GpgLoss<double>{}, [](const auto& t) { return -t.log_prob * t.advantage; });
  expect_derivative(GpgLoss<double>{});
}

TEST(PolicyLoss, ClipCov) {
  const ClipCovLoss<double> loss{kLow, kHigh};
  expect_formula(loss, [](const Token<double>& t) {
    return std::max(-t.advantage * ratio_of(t), -t.advantage * clipped(ratio_of(t)));
  });
  expect_derivative(loss);
  Token<double> chosen = token(0.1, 1);
  chosen.chosen = true;
  EXPECT_EQ(loss(chosen).loss, 0);
  EXPECT_EQ(loss(chosen).gradient, 0);
  EXPECT_EQ(loss(chosen).clipped, 1);
  EXPECT_EQ(loss(token(0.4, 1)).clipped, 0);
}

TEST(PolicyLoss, KlCov) {
  const KlCovLoss<double> loss{0.7};
  expect_formula(loss, [](const auto& t) { return -t.advantage * ratio_of(t); });
  expect_derivative(loss);
  for (Token<double> t : tokens()) {
    t.chosen = true;
    const double d = t.log_prob - t.old_log_prob;
    EXPECT_NEAR(loss(t).loss, -t.advantage * ratio_of(t) + 0.7 * std::abs(d), 1e-12);
    EXPECT_NEAR(loss(t).gradient, numeric_gradient(loss, t), 1e-6);
    EXPECT_DOUBLE_EQ(loss(t).kl, std::abs(d));
  }
}

TEST(PolicyLoss, Gspo) {
  const GspoLoss<double> loss{kLow, kHigh};
  for (const double log_ratio : {-0.5, 0.1, 0.5, 12.0}) {
    for (Token<double> t : tokens()) {
      t.sequence_log_ratio = log_ratio;
      const double s = std::exp(std::min(log_ratio, 10.0));
      const double free = -t.advantage * s, bound = -t.advantage * clipped(s);
      EXPECT_DOUBLE_EQ(loss(t).loss, std::max(free, bound));
      EXPECT_DOUBLE_EQ(loss(t).gradient, bound > free || log_ratio > 10 ? 0 : free);
    }
  }
}

TEST(PolicyLoss, GeoMean) {
  const GeoMeanLoss<double> loss{-0.2, 0.28};
  expect_formula(loss, [](const Token<double>& t) {
    const double sign = t.advantage > 0 ? 1 : -1, d = t.log_prob - t.old_log_prob;
    return sign * std::min(sign * d, sign * std::min(std::max(d, -0.2), 0.28));
  });
  expect_derivative(loss);
  EXPECT_EQ(loss(token(0.1, 0)).loss, 0);
  EXPECT_EQ(loss(token(0.1, 0)).gradient, 0);
  EXPECT_EQ(loss(token(-0.4, 1)).clipped, 1);
  EXPECT_EQ(loss(token(-0.4, -1)).clipped_lower, 1);
}

TEST(PolicyLoss, Dppo) {
  const DppoTvLoss<double> tv{0.05, 0.1, 1.2};
  const DppoKlLoss<double> kl{0.05, 0.1, 1.2};
  for (const Token<double>& t : tokens()) {
    const double p = std::exp(t.log_prob), q = std::exp(t.old_log_prob);
    const double divergence =
        q * (t.old_log_prob - t.log_prob) + (1 - q) * std::log((1 - q + 1e-8) / (1 - p + 1e-8));
    const bool tv_valid = t.advantage > 0 ? p - q <= 0.1 : p - q >= -0.05;
    const bool kl_valid =
        t.advantage > 0 ? divergence <= 0.1 || p <= q : divergence <= 0.05 || p >= q;
    const double factor = -t.advantage * std::min(ratio_of(t), 1.2);
    EXPECT_NEAR(tv(t).loss, tv_valid ? factor * t.log_prob : 0, 1e-12);
    EXPECT_NEAR(tv(t).gradient, tv_valid ? factor : 0, 1e-12);
    EXPECT_NEAR(kl(t).loss, kl_valid ? factor * t.log_prob : 0, 1e-12);
    EXPECT_NEAR(kl(t).gradient, kl_valid ? factor : 0, 1e-12);
    EXPECT_EQ(kl(t).clipped, kl_valid ? 0 : 1);
    EXPECT_EQ(kl(t).clipped_lower, kl_valid && ratio_of(t) > 1.2 ? 1 : 0);
  }
}

TEST(PolicyLoss, Sapo) {
  const SapoLoss<double> loss{1.0, 1.05};
  expect_formula(loss, [](const Token<double>& t) {
    const double tau = t.advantage > 0 ? 1.0 : 1.05;
    return -t.advantage * 4 / tau / (1 + std::exp(-tau * (ratio_of(t) - 1)));
  });
  expect_derivative(loss);
  for (const double d : {-20.0, 20.0}) {  // a steep gate saturates; it does not overflow
    const TokenResult<float> result = SapoLoss<float>{1e4f, 1e4f}({float(d), 0, 1, 0, false, 0, 0});
    EXPECT_TRUE(std::isfinite(result.loss) && std::isfinite(result.gradient));
  }
}

TEST(PolicyLoss, Dro) {
  expect_formula(DroLoss<double>{0.3}, [](const Token<double>& t) {
    const double d = t.log_prob - t.old_log_prob;
    return -(t.log_prob * t.advantage - 0.15 * d * d);
  });
  expect_derivative(DroLoss<double>{0.3});
}

TEST(PolicyLoss, Cispo) {
  const CispoLoss<double> loss{kLow, kHigh};
  expect_formula(loss, [](const Token<double>& t) {
    return -clipped(ratio_of(t)) * t.advantage * t.log_prob;
  });
  for (const Token<double>& t : tokens()) {
    EXPECT_NEAR(loss(t).gradient, -clipped(ratio_of(t)) * t.advantage, 1e-12);
    EXPECT_EQ(loss(t).clipped, ratio_of(t) < kLow || ratio_of(t) > kHigh ? 1 : 0);
  }
}

// Every loss with the clip ratios of a token is the loss with those two numbers.
template <class Loss>
void expect_clip_ratios(const Loss& with_numbers, Loss any) {
  any.low = any.high = kNan;  // not used
  const ClippedByToken<double, Loss> by_token{any};
  for (Token<double> t : tokens()) {
    t.sequence_log_ratio = t.log_prob - t.old_log_prob;
    t.clip_low = 0.125;
    t.clip_high = 0.25;
    EXPECT_EQ(by_token(t).loss, with_numbers(t).loss);
    EXPECT_EQ(by_token(t).gradient, with_numbers(t).gradient);
    EXPECT_EQ(by_token(t).clipped, with_numbers(t).clipped);
    for (const double wrong : {-0.1, kNan, double(INFINITY)}) {
      for (const bool low : {false, true}) {
        Token<double> bad = t;
        (low ? bad.clip_low : bad.clip_high) = wrong;
        EXPECT_TRUE(std::isnan(by_token(bad).loss) && std::isnan(by_token(bad).gradient));
      }
    }
  }
}

TEST(PolicyLoss, ClipRatiosOfEachToken) {
  expect_clip_ratios(VanillaLoss<double>{0.875, 1.25, 3}, {0, 0, 3});
  expect_clip_ratios(ClipCovLoss<double>{0.875, 1.25}, {});
  expect_clip_ratios(GspoLoss<double>{0.875, 1.25}, {});
  expect_clip_ratios(GeoMeanLoss<double>{-0.125, 0.25}, {});
  expect_clip_ratios(DppoTvLoss<double>{0.125, 0.25, 1.2}, {0, 0, 1.2});
  expect_clip_ratios(DppoKlLoss<double>{0.125, 0.25, 1.2}, {0, 0, 1.2});
  expect_clip_ratios(CispoLoss<double>{0.875, 1.25}, {});
}

TEST(PolicyLoss, NanIsKept) {
  const Token<double> bad{kNan, -1, 1, kNan, false, 0, 0};
  EXPECT_TRUE(std::isnan(VanillaLoss<double>({kLow, kHigh, 3})(bad).loss));
  EXPECT_TRUE(std::isnan(GpgLoss<double>()(bad).loss));
  EXPECT_TRUE(std::isnan(ClipCovLoss<double>({kLow, kHigh})(bad).loss));
  EXPECT_TRUE(std::isnan(KlCovLoss<double>({1})(bad).loss));
  EXPECT_TRUE(std::isnan(GspoLoss<double>({kLow, kHigh})(bad).loss));
  EXPECT_TRUE(std::isnan(GeoMeanLoss<double>({-0.2, 0.28})(bad).loss));
  EXPECT_TRUE(std::isnan(SapoLoss<double>({1, 1})(bad).loss));
  EXPECT_TRUE(std::isnan(DroLoss<double>({1})(bad).loss));
  EXPECT_TRUE(std::isnan(CispoLoss<double>({kLow, kHigh})(bad).loss));
}

TEST(RatioExp, IsExpOverItsWholeRange) {
  for (float x = -87.0f; x < 88.0f; x += 0.0371f) {
    const double expected = std::exp(double(x));
    EXPECT_NEAR(ratio_exp(x), expected, 2.5e-7 * expected) << x;
  }
  EXPECT_EQ(ratio_exp(0.0f), 1.0f);
  EXPECT_EQ(ratio_exp(200.0f), std::numeric_limits<float>::infinity());
  EXPECT_EQ(ratio_exp(-200.0f), 0.0f);
  EXPECT_EQ(ratio_exp(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_TRUE(std::isnan(ratio_exp(std::numeric_limits<float>::quiet_NaN())));
}

TEST(RatioLog, IsLogOverItsWholeRange) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto expect_log = [](float x) {
    const double expected = std::log(double(x));
    EXPECT_NEAR(ratio_log(x), expected, 1.2e-7 * std::abs(expected)) << x;
  };
  for (float x = std::numeric_limits<float>::min(); x < kInfinity; x *= 1.0037f) expect_log(x);
  // Around 1 the logarithm is close to 0, where its relative error could be large.
  float below = 1, above = 1;
  for (int i = 0; i < 2000; ++i) {
    expect_log(below = std::nextafter(below, 0.0f));
    expect_log(above = std::nextafter(above, 2.0f));
  }
  EXPECT_EQ(ratio_log(1.0f), 0.0f);
  EXPECT_EQ(ratio_log(0.0f), -kInfinity);
  EXPECT_EQ(ratio_log(kInfinity), kInfinity);
  EXPECT_TRUE(std::isnan(ratio_log(-1.0f)));
  EXPECT_TRUE(std::isnan(ratio_log(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Mixed, IsSplitmix64) {
  // The first outputs of the generator with seed 1234567, from its author's reference code.
  EXPECT_EQ(mixed(1234567), 6457827717110365317u);
  EXPECT_EQ(mixed(1234567 + 0x9e3779b97f4a7c15u), 3203168211198807973u);
}

// ---- Kernels ----

template <class T>
class PolicyLossKernels : public ::testing::Test {};
TYPED_TEST_SUITE(PolicyLossKernels, testing::ValueTypes);

// Rows of one tile, and of slightly more than one.
constexpr int64_t kCols[] = {1, 100, kTileTokens + 53};

TYPED_TEST(PolicyLossKernels, LossGradientAndMetricsOfVanilla) {
  using T = TypeParam;
  const VanillaLoss<double> wide{kLow, kHigh, 1.5};
  for (const int64_t cols : kCols) {
    TokenBatch<T> batch(3, cols);
    LossRun<T, VanillaLoss<T>> run({T(kLow), T(kHigh), T(1.5)}, batch.inputs(),
                                   normalization(Aggregation::kTokenMean));
    double loss = 0, selected = 0, response = 0, clipped = 0, lower = 0, kl = 0;
    for (int64_t i = 0; i < 3 * cols; ++i) {
      if (!batch.response(i)) {
        EXPECT_EQ(run.gradient[i], 0);
        continue;
      }
      const TokenResult<double> expected = wide(batch.token(i));
      const double weight = batch.selected(i) ? double(batch.weights[i]) : 0;
      EXPECT_NEAR(run.gradient[i], expected.gradient * weight, 10 * kTolerance<T>);
      loss += expected.loss * weight;
      selected += batch.selected(i);
      response += 1;
      clipped += expected.clipped;
      lower += expected.clipped_lower;
      kl += expected.kl;
    }
    EXPECT_NEAR(run.loss[0], selected > 0 ? loss / selected : 0, 10 * kTolerance<T>);
    const double count = response + 1e-8;
    EXPECT_NEAR(run.metrics[0], clipped / count, kTolerance<T>);
    EXPECT_NEAR(run.metrics[1], kl / count, kTolerance<T>);
    EXPECT_NEAR(run.metrics[2], lower / count, kTolerance<T>);
  }
}

TYPED_TEST(PolicyLossKernels, SequenceRatioIsTheMeanOverTheRow) {
  using T = TypeParam;
  for (const int64_t cols : kCols) {
    TokenBatch<T> batch(3, cols);
    const TokenInputs<T> in = batch.inputs();
    simt::Buffer<Moments<T>> moments(in.tiles());
    simt::Buffer<T> ratios(in.rows);
    simt::launch(kBlocks, kThreads, moments_kernel<T>, in, moments.data());
    const int rows_per_block = 32 / lanes_per_row(in.tiles_per_row());
    simt::launch((in.rows - 1) / rows_per_block + 1, 32, sequence_log_ratio_kernel<T>,
                 moments.data(), in.rows, in.tiles_per_row(), ratios.data());
    for (int64_t row = 0; row < 3; ++row) {
      double sum = 0, count = 0;
      for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
        if (!batch.response(i)) continue;
        sum += double(batch.log_prob[i]) - double(batch.old_log_prob[i]);
        ++count;
      }
      EXPECT_NEAR(ratios[row], sum / std::max(count, 1.0), kTolerance<T>);
    }
  }
}

TYPED_TEST(PolicyLossKernels, GeoMeanIsAFunctionOfRowSums) {
  using T = TypeParam;
  for (const int64_t cols : kCols) {
    TokenBatch<T> batch(3, cols);
    TokenInputs<T> in = batch.inputs();
    in.entropy_mask = nullptr;
    for (int64_t i = cols; i < 2 * cols; ++i) batch.response_mask[i] = 0;
    LossRun<T, GeoMeanLoss<T>> run({T(-0.2), T(0.28)}, in, normalization(Aggregation::kTokenSum));
    double loss = 0;
    for (int64_t row = 0; row < 3; ++row) {
      double d = 0, advantage = 0, log_weight = 0, count = 1e-8;
      for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
        if (!batch.response(i)) continue;
        d += GeoMeanLoss<double>{-0.2, 0.28}(batch.token(i)).loss;
        advantage += double(batch.advantages[i]);
        log_weight += std::log(double(batch.weights[i]) + 1e-10);
        count += 1;
      }
      if (count < 1) {
        EXPECT_EQ(run.row_scale[row], 0);
        continue;
      }
      const double row_loss =
          -advantage / count * std::exp(d / count) * std::exp(log_weight / count) / 3;
      loss += row_loss;
      EXPECT_NEAR(run.row_scale[row], row_loss / count, kTolerance<T>);
    }
    EXPECT_NEAR(run.loss[0], loss, kTolerance<T>);
  }
}

// Aligned rows and others, where the packs of the clip ratios are loaded one by one.
TYPED_TEST(PolicyLossKernels, ClipRatiosOfEachToken) {
  using T = TypeParam;
  for (const int64_t cols : {int64_t{1}, int64_t{100}, int64_t{101}, kTileTokens + 53}) {
    TokenBatch<T> batch(3, cols);
    simt::Buffer<T> low(3 * cols + 1), high(3 * cols + 1);
    for (int64_t i = 0; i <= 3 * cols; ++i) {
      low[i] = static_cast<T>(i % 3 == 0 ? 0.05 : 0.3);
      high[i] = static_cast<T>(i % 2 == 0 ? 0.05 : 0.5);
    }
    TokenInputs<T> in = batch.inputs();
    for (const int64_t misaligned : {0, 1}) {
      in.clip_low = low.data() + misaligned;
      in.clip_high = high.data();
      using Loss = ClippedByToken<T, VanillaLoss<T>>;
      LossRun<T, Loss> run({{T(0), T(0), T(1.5)}}, in, normalization(Aggregation::kTokenSum));
      double loss = 0;
      for (int64_t i = 0; i < 3 * cols; ++i) {
        double gradient = 0;
        if (batch.selected(i)) {
          const double below = low[i + misaligned], above = high[i];
          const TokenResult<double> result =
              VanillaLoss<double>{1 - below, 1 + above, 1.5}(batch.token(i));
          loss += result.loss * double(batch.weights[i]);
          gradient = result.gradient * double(batch.weights[i]);
        }
        EXPECT_NEAR(run.gradient[i], gradient, kTolerance<T>) << i;
      }
      EXPECT_NEAR(run.loss[0], loss, kTolerance<T> * std::max<double>(1, cols));
    }
  }
}

template <class T, class CovarianceKey>
struct KeysRun {
  simt::Buffer<Moments<T>> moments;
  simt::Buffer<CovarianceMoments> batch;
  simt::Buffer<int64_t> seed;
  simt::Buffer<typename CovarianceKey::Key> keys;

  KeysRun(const CovarianceKey& key, const TokenInputs<T>& in, int64_t seed_value)
      : moments(in.tiles()),
        batch(1),
        seed(std::vector<int64_t>{seed_value}),
        keys(in.rows * in.cols) {
    simt::launch(kBlocks, kThreads, moments_kernel<T>, in, moments.data());
    simt::launch(1, kThreads, covariance_moments_kernel<T, CovarianceKey>, key, moments.data(),
                 in.tiles(), batch.data());
    simt::launch(kBlocks, kThreads, covariance_keys_kernel<T, CovarianceKey>, key, in, batch.data(),
                 seed.data(), keys.data());
  }
};

TYPED_TEST(PolicyLossKernels, KlCovKeysOrderByCovariance) {
  using T = TypeParam;
  TokenBatch<T> batch(3, 100);
  KeysRun<T, KlCovKey<T>> run({0.1}, batch.inputs(), 0);
  double log_prob = 0, advantage = 0, count = 0;
  for (int64_t i = 0; i < 300; ++i) {
    if (!batch.response(i)) continue;
    log_prob += double(batch.log_prob[i]);
    advantage += double(batch.advantages[i]);
    ++count;
  }
  EXPECT_EQ(run.batch[0].count, int64_t(count * 0.1));
  for (int64_t i = 0; i < 300; ++i) {
    if (!batch.response(i)) {
      EXPECT_EQ(run.keys[i], kIneligibleKey<typename KlCovKey<T>::Key>);
      continue;
    }
    const double covariance = (double(batch.advantages[i]) - advantage / count) *
                              (double(batch.log_prob[i]) - log_prob / count);
    EXPECT_NEAR(selection_value(run.keys[i]), covariance, 10 * kTolerance<T>);
  }
}

TYPED_TEST(PolicyLossKernels, ClipCovKeysAreDistinctAndForEligibleTokensAlone) {
  using T = TypeParam;
  TokenBatch<T> batch(3, 100);
  const ClipCovKey<T> key{{T(kLow), T(kHigh)}, T(-0.5), T(1), 0.1};
  KeysRun<T, ClipCovKey<T>> run(key, batch.inputs(), 5), other(key, batch.inputs(), 6);
  std::set<uint32_t> seen;
  int eligible = 0, changed = 0;
  for (int64_t i = 0; i < 300; ++i) {
    bool expected = batch.response(i);
    if (expected) {
      const T covariance = run.batch[0].covariance(batch.log_prob[i], batch.advantages[i]);
      expected = covariance > T(-0.5) && covariance < T(1) &&
                 ClipCovLoss<double>{kLow, kHigh}(batch.token(i)).loss ==
                     -double(batch.advantages[i]) * ratio_of(batch.token(i));
    }
    EXPECT_EQ(run.keys[i] != 0, expected) << i;
    if (run.keys[i] == 0) continue;
    ++eligible;
    seen.insert(run.keys[i]);
    changed += run.keys[i] != other.keys[i];
  }
  EXPECT_GT(eligible, 20);
  EXPECT_EQ(seen.size(), eligible);
  EXPECT_EQ(changed, eligible);
}

TEST(CovarianceMoments, AtLeastOneTokenAndNoDivisionByZero) {
  const CovarianceMoments none(Moments<double>{}, 0.5, 0);
  EXPECT_EQ(none.count, 1);
  EXPECT_EQ(none.mean_log_prob, 0);
  EXPECT_EQ(CovarianceMoments(Moments<double>{9, 0, 0, 0}, 1e-9, 0).count, 1);
  EXPECT_EQ(CovarianceMoments(Moments<double>{9, 0, 0, 0}, 0.5, 0).count, 4);
}

}  // namespace
}  // namespace entropy_rl
