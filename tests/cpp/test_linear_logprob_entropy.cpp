// What linear_logprob_entropy_math.h adds to a row's state, and the tile kernels, unmodified, under
// the SIMT shim: a row's vocabulary comes in several tiles, through bias, scale and soft-cap.
#include "kernels/linear_logprob_entropy.cuh"

#include <gtest/gtest.h>

#include <limits>
#include <type_traits>

#include "simt.h"
#include "softmax_reference.h"

namespace entropy_rl {
namespace {

using testing::Real;

TEST(LogitTransform, TanhHasAFewUlpEverywhere) {
  for (double y = -45; y <= 45; y += 0.0137) {
    const float x = static_cast<float>(y);
    const double exact = std::tanh(static_cast<double>(x));
    EXPECT_NEAR(tanh_vectorizable(x), exact, 4e-7 * std::abs(exact)) << x;
  }
  EXPECT_EQ(tanh_vectorizable(0.0f), 0.0f);
  EXPECT_EQ(tanh_vectorizable(INFINITY), 1.0f);
  EXPECT_EQ(tanh_vectorizable(-INFINITY), -1.0f);
  EXPECT_TRUE(std::isnan(tanh_vectorizable(NAN)));
}

TEST(LogitTransform, SlopeIsTheDerivative) {
  const double bias[] = {0.5, -1.0};
  const LogitTransform<double> transform{bias, 0.8, 3.0};
  for (double x : {-9.0, -0.3, 0.0, 1.0, 4.0}) {
    const double h = 1e-6;
    const double numeric = (transform(x + h, 1) - transform(x - h, 1)) / (2 * h);
    EXPECT_NEAR(transform.slope(transform(x, 1)), numeric, 1e-8);
  }
}

TEST(ColumnOfTarget, IsOutsideTheTileForTargetsOfOthersAndGarbage) {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(column_of_target(12, 10), 2);
  EXPECT_EQ(column_of_target(10, 10), 0);
  for (const int64_t target : {int64_t{9}, int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
    EXPECT_LT(column_of_target(target, 10), 0);
    EXPECT_LT(column_of_target(target, kLargest), 0);
  }
  EXPECT_EQ(column_of_target(kLargest, 0), kLargest);
}

TEST(VocabPart, MergesInAnyOrder) {
  const auto part_of = [](std::vector<double> z) {
    const RowScale<double> scale(0.5);
    LogitSums<double> sums;
    for (double value : z) sums.add<true>({value}, scale);
    return VocabPart<double>{sums.state(scale), sums.squares, z[0]};
  };
  const auto all = part_of({1, 7, -3, 7, 2});
  for (const auto& merged : {merge(part_of({1, 7}), part_of({-3, 7, 2}), 2.0),
                             merge(part_of({-3, 7, 2}), part_of({1, 7}), 2.0),
                             merge(VocabPart<double>::neutral(), part_of({1, 7, -3, 7, 2}), 2.0)}) {
    EXPECT_EQ(merged.softmax.max, all.softmax.max);
    EXPECT_NEAR(merged.softmax.sum, all.softmax.sum, 1e-14);
    EXPECT_NEAR(merged.softmax.dot, all.softmax.dot, 1e-14);
    EXPECT_NEAR(merged.squares, all.squares, 1e-14);
    EXPECT_EQ(merged.before_target, 1);
  }
}

// Three rows of products of a vocabulary that is cut into tiles.
template <class Acc>
struct HeadCase {
  static constexpr int64_t kRows = 3;
  int vocab;
  int64_t stride;  // of a tile's rows: wider than the tile, as in a buffer that the last one shares
  simt::Buffer<Acc> products, bias;
  simt::Buffer<int64_t> targets;
  Acc temperature = Acc(0.7), scale = Acc(0.9), softcap = 0;
  bool with_bias = false;

  explicit HeadCase(int vocab)
      : vocab(vocab),
        stride(vocab + 5),
        products(testing::normal_values<Acc>(kRows * (vocab + 5), 3.0, vocab)),
        bias(testing::normal_values<Acc>(vocab, 1.0, vocab + 1)),
        targets(kRows) {
    for (int64_t row = 0; row < kRows; ++row) targets[row] = row * 12345 % vocab;
  }

  LogitTile<Acc> tile(int begin, int end) {
    return {products.data() + begin,
            stride,
            kRows,
            end - begin,
            begin,
            targets.data(),
            temperature,
            nullptr,
            {with_bias ? bias.data() + begin : nullptr, scale, softcap}};
  }

  std::vector<Real> z(int64_t row) {
    std::vector<Real> values;
    for (int j = 0; j < vocab; ++j) {
      Real y = products[row * stride + j];
      if (with_bias) y += bias[j];
      y *= scale;
      values.push_back(softcap > 0 ? softcap * std::tanh(y / softcap) : y);
    }
    return values;
  }

  template <bool kStatistics>
  std::vector<VocabState> fold(int width, int threads) {
    simt::Buffer<VocabState> state(std::vector<VocabState>(
        kRows, VocabState{VocabPart<double>::neutral(), std::numeric_limits<double>::quiet_NaN()}));
    for (int begin = 0; begin < vocab; begin += width) {
      simt::launch(kRows, threads, linear_logprob_entropy_tile_kernel<Acc, kStatistics>,
                   tile(begin, std::min(begin + width, vocab)), state.data());
    }
    return std::vector<VocabState>(state.data(), state.data() + kRows);
  }
};

template <class Acc>
class LinearLogprobEntropyKernel : public ::testing::Test {};
using TileTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(LinearLogprobEntropyKernel, TileTypes);

TYPED_TEST(LinearLogprobEntropyKernel, TilesFoldToTheirRow) {
  using Acc = TypeParam;
  for (int vocab : {1, 33, 257, 1301}) {
    for (int width : {vocab, (vocab + 1) / 2, 100}) {
      for (double softcap : {0.0, 4.0}) {
        HeadCase<Acc> head(vocab);
        head.softcap = static_cast<Acc>(softcap);
        head.with_bias = softcap > 0;
        const auto plain = head.template fold<false>(width, 64);
        const auto with_statistics = head.template fold<true>(width, 96);
        for (int64_t row = 0; row < HeadCase<Acc>::kRows; ++row) {
          const auto z = head.z(row);
          const auto log_p = testing::log_softmax(z, head.temperature);
          Real squares = 0;
          for (Real value : log_p) squares += std::exp(2 * value);
          for (const VocabState& state : {plain[row], with_statistics[row]}) {
            const auto& softmax = state.part.softmax;
            EXPECT_NEAR(entropy(softmax), testing::entropy_of(log_p),
                        testing::kValueTolerance<Acc>);
            EXPECT_NEAR((state.target - softmax.max) / head.temperature - log_sum(softmax),
                        log_p[head.targets[row]], testing::kValueTolerance<Acc>);
          }
          const auto& part = with_statistics[row].part;
          EXPECT_NEAR(part.squares / (part.softmax.sum * part.softmax.sum), squares,
                      testing::kValueTolerance<Acc>);
          const auto target = z.begin() + head.targets[row];
          const Real before = target == z.begin() ? -std::numeric_limits<Real>::infinity()
                                                  : *std::max_element(z.begin(), target);
          if (target == z.begin()) {
            EXPECT_EQ(part.before_target, -std::numeric_limits<double>::infinity());
          } else {
            EXPECT_NEAR(part.before_target, before, testing::kValueTolerance<Acc>);
          }
        }
      }
    }
  }
}

TYPED_TEST(LinearLogprobEntropyKernel, ATileOfMinusInfinityAddsNothing) {
  using Acc = TypeParam;
  HeadCase<Acc> head(300);
  for (int64_t row = 0; row < HeadCase<Acc>::kRows; ++row) {
    head.targets[row] = 150;
    for (int j : {0, 1}) {
      for (int i = 200 * j; i < 200 * j + 100; ++i)
        head.products[row * head.stride + i] = -INFINITY;
    }
  }
  for (const VocabState& state : head.template fold<true>(100, 32)) {
    EXPECT_TRUE(std::isfinite(state.part.softmax.sum) && std::isfinite(state.part.softmax.dot));
    EXPECT_TRUE(std::isfinite(state.part.squares) && std::isfinite(state.target));
  }
}

template <class Acc, class Out>
void expect_gradients(HeadCase<Acc>& head, int width, bool in_place) {
  const auto states = head.template fold<false>(head.vocab, 32);
  simt::Buffer<Acc> entropies(3), max_log_sum(6), for_log_prob(std::vector<Acc>{1, 0, -2}),
      for_entropy(std::vector<Acc>{0.5, 0, 1});
  std::vector<std::vector<Real>> expected;
  for (int64_t row = 0; row < 3; ++row) {
    const auto& softmax = states[row].part.softmax;
    entropies[row] = static_cast<Acc>(entropy(softmax));
    max_log_sum[2 * row] = static_cast<Acc>(softmax.max);
    max_log_sum[2 * row + 1] = static_cast<Acc>(log_sum(softmax));
    const auto z = head.z(row);
    auto gradient =
        testing::softmax_gradient(testing::log_softmax(z, head.temperature), head.targets[row],
                                  for_log_prob[row], for_entropy[row], head.temperature);
    for (int j = 0; j < head.vocab; ++j) {
      const Real t = head.softcap > 0 ? z[j] / head.softcap : Real(0);
      gradient[j] *= head.scale * (1 - t * t);
    }
    expected.push_back(gradient);
  }
  // The row without a gradient is not read: NaN there would show.
  for (int j = 0; j < head.vocab; ++j) head.products[head.stride + j] = NAN;
  for (int begin = 0; begin < head.vocab; begin += width) {
    const LogitTile<Acc> tile = head.tile(begin, std::min(begin + width, head.vocab));
    simt::Buffer<Out> out(3 * tile.width);
    simt::Buffer<Acc> copy(3 * static_cast<size_t>(tile.width));
    for (int64_t row = 0; row < 3; ++row) {
      for (int j = 0; j < tile.width; ++j) {
        copy[row * tile.width + j] = tile.products[row * tile.stride + j];
      }
    }
    LogitTile<Acc> launched = tile;
    launched.products = copy.data();
    launched.stride = tile.width;
    Out* target = out.data();
    if constexpr (std::is_same_v<Acc, Out>) {
      if (in_place) target = copy.data();
    }
    simt::launch(3, 64, linear_logprob_entropy_tile_backward_kernel<Acc, Out>, launched,
                 for_log_prob.data(), for_entropy.data(), entropies.data(), max_log_sum.data(),
                 target, static_cast<int64_t>(tile.width));
    for (int64_t row = 0; row < 3; ++row) {
      const double scale = std::abs(for_log_prob[row]) + std::abs(for_entropy[row]) * 8;
      for (int j = 0; j < tile.width; ++j) {
        const Real wanted = expected[row][begin + j];
        EXPECT_NEAR(load_value(target[row * tile.width + j]), wanted,
                    testing::kGradientTolerance<Acc> * scale / head.temperature +
                        testing::rounding_error<Out>(wanted))
            << "row " << row << ", entry " << begin + j;
      }
    }
  }
}

TYPED_TEST(LinearLogprobEntropyKernel, GradientOfEveryTile) {
  using Acc = TypeParam;
  for (int vocab : {1, 33, 257}) {
    for (double softcap : {0.0, 4.0}) {
      for (bool in_place : {false, true}) {
        HeadCase<Acc> head(vocab);
        head.softcap = static_cast<Acc>(softcap);
        head.with_bias = softcap > 0;
        expect_gradients<Acc, Acc>(head, 100, in_place);
      }
    }
  }
}

TEST(LinearLogprobEntropyNarrow, GradientInANarrowerDtypeIsRoundedOnce) {
  for (double softcap : {0.0, 4.0}) {
    HeadCase<float> head(257), same(257);
    head.softcap = same.softcap = static_cast<float>(softcap);
    expect_gradients<float, BFloat16>(head, 100, false);
    expect_gradients<float, Half>(same, 100, false);
  }
}

}  // namespace
}  // namespace entropy_rl
