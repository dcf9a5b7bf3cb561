// The algebra of csrc/kernels/online_softmax.h against its definition.
#include "kernels/online_softmax.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "softmax_reference.h"

namespace entropy_rl {
namespace {

using testing::Real;

template <class Acc>
class OnlineSoftmaxTest : public ::testing::Test {
 protected:
  static constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  static constexpr Acc kNan = std::numeric_limits<Acc>::quiet_NaN();

  static OnlineSoftmax<Acc> state_of(const std::vector<Acc>& x, Acc inverse_temperature = 1) {
    return state_of_chunks<1>(x, inverse_temperature);
  }
  template <int kCount>
  static OnlineSoftmax<Acc> state_of_chunks(const std::vector<Acc>& x, Acc inverse_temperature) {
    const RowScale<Acc> scale(1 / inverse_temperature);
    LogitSums<Acc> sums;
    for (size_t begin = 0; begin < x.size(); begin += kCount) {
      Acc chunk[kCount];
      std::copy_n(x.begin() + begin, kCount, chunk);
      sums.add(chunk, scale);
    }
    return sums.state(scale);
  }
  // Two partial rows as one.
  static OnlineSoftmax<Acc> merge(const OnlineSoftmax<Acc>& a, const OnlineSoftmax<Acc>& b,
                                  Acc inverse_temperature) {
    const Acc max = larger(a.max, b.max);
    OnlineSoftmax<Acc> merged = rescaled(a, max, inverse_temperature);
    const OnlineSoftmax<Acc> other = rescaled(b, max, inverse_temperature);
    merged.sum += other.sum;
    merged.dot += other.dot;
    return merged;
  }

  static void expect_matches_definition(const OnlineSoftmax<Acc>& state, const std::vector<Acc>& x,
                                        Acc inverse_temperature = 1) {
    const auto log_p = testing::log_softmax({x.begin(), x.end()}, Real(1) / inverse_temperature);
    EXPECT_NEAR(entropy(state), testing::entropy_of(log_p), testing::kValueTolerance<Acc>);
    for (size_t j = 0; j < x.size(); j += x.size() / 8 + 1) {
      if (std::isinf(x[j])) continue;
      // A log-probability of -1e4 has the spacing of floats around 1e4.
      const Real tolerance =
          testing::kValueTolerance<Acc> + 4 * testing::rounding_error<Acc>(log_p[j]);
      EXPECT_NEAR((x[j] - state.shift()) * inverse_temperature - log_sum(state), log_p[j],
                  tolerance);
    }
  }

  static void expect_same_bits(const OnlineSoftmax<Acc>& a, const OnlineSoftmax<Acc>& b) {
    EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0)
        << a.max << " " << a.sum << " " << a.dot << " against " << b.max << " " << b.sum << " "
        << b.dot;
  }
};

using AccumulateTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(OnlineSoftmaxTest, AccumulateTypes);

TYPED_TEST(OnlineSoftmaxTest, TemperaturesAreThoseThatFloatInverts) {
  using Acc = TypeParam;
  const Acc least = std::ldexp(Acc(1), -126), largest = std::ldexp(Acc(1), 126);
  for (const Acc value : {least, Acc(1), largest}) {
    EXPECT_TRUE(is_temperature(value));
    EXPECT_TRUE(std::isnormal(static_cast<float>(value)));
    EXPECT_TRUE(std::isnormal(1 / static_cast<float>(value)));
  }
  const Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  const Acc infinity = std::numeric_limits<Acc>::infinity();
  for (const Acc value : {least / 2, 2 * largest, Acc(0), Acc(-1), infinity, nan}) {
    EXPECT_FALSE(is_temperature(value));
  }
}

TYPED_TEST(OnlineSoftmaxTest, MatchesDefinitionForNormalRows) {
  using Acc = TypeParam;
  for (int vocab : {1, 2, 7, 1000}) {
    for (double scale : {0.01, 1.0, 10.0}) {
      for (Acc inverse_temperature : {Acc(0.5), Acc(1), Acc(4)}) {
        const auto x = testing::normal_values<Acc>(vocab, scale, vocab);
        this->expect_matches_definition(this->state_of(x, inverse_temperature), x,
                                        inverse_temperature);
      }
    }
  }
}

TYPED_TEST(OnlineSoftmaxTest, LogitsFarFromZeroCostNoDigits) {
  using Acc = TypeParam;
  for (Acc shift : {Acc(-1e4), Acc(1e4)}) {
    auto x = testing::normal_values<Acc>(1000, 3.0, 1);
    for (Acc& value : x) value += shift;
    this->expect_matches_definition(this->state_of(x), x);
  }
}

TYPED_TEST(OnlineSoftmaxTest, OneHotRowsHaveNoEntropy) {
  using Acc = TypeParam;
  for (size_t hot : {0, 3, 6}) {
    for (Acc cold : {Acc(-1e4), -this->kInf}) {
      std::vector<Acc> x(7, cold);
      x[hot] = 1e4;
      const auto state = this->state_of(x);
      EXPECT_EQ(entropy(state), 0);
      EXPECT_EQ(log_sum(state), 0);
    }
  }
}

TYPED_TEST(OnlineSoftmaxTest, UniformRowsHaveTheLogOfTheirSize) {
  using Acc = TypeParam;
  const std::vector<Acc> x(1000, Acc(-7));
  EXPECT_NEAR(entropy(this->state_of(x)), std::log(1000.0), testing::kValueTolerance<Acc>);
}

TYPED_TEST(OnlineSoftmaxTest, EntropyIsNeverNegative) {
  using Acc = TypeParam;
  for (unsigned seed = 0; seed < 200; ++seed) {
    const auto x = testing::normal_values<Acc>(5, 30.0, seed);
    EXPECT_GE(entropy(this->state_of(x)), 0);
  }
}

TYPED_TEST(OnlineSoftmaxTest, ChunksAgreeWithSingleElements) {
  using Acc = TypeParam;
  const auto x = testing::normal_values<Acc>(64, 10.0, 2);
  this->expect_matches_definition(this->template state_of_chunks<8>(x, Acc(1)), x);
}

TYPED_TEST(OnlineSoftmaxTest, MergeIsAssociativeAndCommutativeUpToRounding) {
  using Acc = TypeParam;
  const Acc inverse_temperature = 2;
  for (double scale : {1.0, 1000.0}) {
    const auto x = testing::normal_values<Acc>(300, scale, 3);
    // Parts of unequal size, an empty one among them.
    std::vector<OnlineSoftmax<Acc>> parts;
    const std::vector<int> cuts = {0, 1, 1, 40, 255, 300};
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      parts.push_back(
          this->state_of({x.begin() + cuts[i], x.begin() + cuts[i + 1]}, inverse_temperature));
    }
    const auto join = [&](const OnlineSoftmax<Acc>& a, const OnlineSoftmax<Acc>& b) {
      return this->merge(a, b, inverse_temperature);
    };
    const auto left = join(join(join(join(parts[0], parts[1]), parts[2]), parts[3]), parts[4]);
    const auto right = join(parts[0], join(parts[1], join(parts[2], join(parts[3], parts[4]))));
    const auto tree = join(join(parts[4], parts[1]), join(parts[3], join(parts[0], parts[2])));
    for (const auto& state : {left, right, tree}) {
      this->expect_matches_definition(state, x, inverse_temperature);
    }
    this->expect_same_bits(join(parts[2], parts[3]), join(parts[3], parts[2]));
  }
}

TYPED_TEST(OnlineSoftmaxTest, NeutralChangesNothing) {
  using Acc = TypeParam;
  const auto neutral = OnlineSoftmax<Acc>::neutral();
  for (const auto& state : {this->state_of({Acc(-2), Acc(3), Acc(3)}), neutral}) {
    this->expect_same_bits(this->merge(neutral, state, Acc(1)), state);
    this->expect_same_bits(this->merge(state, neutral, Acc(1)), state);
  }
}

TYPED_TEST(OnlineSoftmaxTest, MinusInfinityAddsNothing) {
  using Acc = TypeParam;
  const Acc inf = this->kInf;
  const auto state = this->state_of({Acc(-2), Acc(3), Acc(1)});
  this->expect_same_bits(this->state_of({-inf, Acc(-2), Acc(3), Acc(1)}), state);
  this->expect_same_bits(this->state_of({Acc(-2), -inf, Acc(3), -inf, Acc(1), -inf}), state);
  this->expect_same_bits(this->merge(this->state_of({-inf, -inf}), state, Acc(1)), state);
  this->expect_same_bits(this->template state_of_chunks<4>({-inf, Acc(2), -inf, -inf}, Acc(1)),
                         this->state_of({Acc(2)}));
}

TYPED_TEST(OnlineSoftmaxTest, RowOfOnlyMinusInfinityIsNan) {
  using Acc = TypeParam;
  const auto state = this->state_of({-this->kInf, -this->kInf});
  EXPECT_TRUE(std::isnan(entropy(state)));
  EXPECT_TRUE(std::isnan(clamp_exponent(-this->kInf - state.shift()) - log_sum(state)) ||
              std::isinf(log_sum(state)));
  EXPECT_TRUE(std::isnan(entropy(OnlineSoftmax<Acc>::neutral())));
}

TYPED_TEST(OnlineSoftmaxTest, PlusInfinityAndNanGiveNanWhereverTheyStand) {
  using Acc = TypeParam;
  for (Acc bad : {this->kInf, this->kNan}) {
    for (size_t at : {0, 1, 2, 3}) {
      std::vector<Acc> x = {Acc(1), Acc(-1), -this->kInf, Acc(5)};
      x[at] = bad;
      const auto state = this->state_of(x);
      EXPECT_TRUE(std::isnan(entropy(state)));
      EXPECT_TRUE(std::isnan(Acc(1) - state.shift() - log_sum(state)));
      const auto good = this->state_of({Acc(100)});
      EXPECT_TRUE(std::isnan(entropy(this->merge(state, good, Acc(1)))));
      EXPECT_TRUE(std::isnan(entropy(this->merge(good, state, Acc(1)))));
      EXPECT_TRUE(std::isnan(entropy(this->merge(state, OnlineSoftmax<Acc>::neutral(), Acc(1)))));
    }
  }
}

TYPED_TEST(OnlineSoftmaxTest, ExponentialAtTheFloorIsZero) {
  using Acc = TypeParam;
  EXPECT_EQ(exp_shifted(ExpFloor<Acc>::value), 0);
  // and the floor is not so high that it would cut off what the type can hold
  EXPECT_GT(exp_shifted(ExpFloor<Acc>::value + Acc(2)), 0);
}

TYPED_TEST(OnlineSoftmaxTest, GradientMatchesDefinition) {
  using Acc = TypeParam;
  const Acc temperature = 2;
  const int target = 17;
  for (double scale : {0.1, 3.0, 30.0}) {
    const auto x = testing::normal_values<Acc>(100, scale, 4);
    const auto state = this->state_of(x, 1 / temperature);
    const auto log_p = testing::log_softmax({x.begin(), x.end()}, temperature);
    for (Acc grad_log_prob : {Acc(0), Acc(1), Acc(-2)}) {
      for (Acc grad_entropy : {Acc(0), Acc(0.5)}) {
        const RowGradient<Acc> gradient(SoftmaxGradient<Acc>{state.shift(), log_sum(state),
                                                             entropy(state), 1 / temperature,
                                                             grad_log_prob, grad_entropy});
        const auto expected =
            testing::softmax_gradient(log_p, target, grad_log_prob, grad_entropy, temperature);
        const double tolerance =
            testing::kGradientTolerance<Acc> * (std::abs(grad_log_prob) + std::abs(grad_entropy));
        for (int j = 0; j < 100; ++j)
          EXPECT_NEAR(gradient(x[j]) + (j == target ? gradient.pull : 0), expected[j], tolerance);
      }
    }
  }
}

TYPED_TEST(OnlineSoftmaxTest, GradientOfMinusInfinityIsZero) {
  using Acc = TypeParam;
  const std::vector<Acc> x = {Acc(1), -this->kInf, Acc(2)};
  const auto state = this->state_of(x);
  const RowGradient<Acc> gradient(
      SoftmaxGradient<Acc>{state.shift(), log_sum(state), entropy(state), 1, 1, 1});
  EXPECT_EQ(gradient(x[1]), 0);
}

TEST(LogitSums, TheLargestTemperatureGivesTheUniformDistribution) {
  const RowScale<float> scale(0x1p126f);
  LogitSums<float> sums;
  sums.add({1.0f, 2.0f, 3.0f, 4.0f}, scale);
  EXPECT_NEAR(entropy(sums.state(scale)), std::log(4.0f), 1e-6f);
}

}  // namespace

}  // namespace entropy_rl
