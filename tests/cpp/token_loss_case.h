// A batch of tokens in the shim's device memory, for the tests of aggregate, kl_loss and
// policy_loss.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <type_traits>

#include "kernels/token_loss.cuh"
#include "simt.h"

namespace entropy_rl::testing {

using ValueTypes = ::testing::Types<float, double>;

// Fewer blocks than tiles, so that a block takes several.
constexpr unsigned kBlocks = 2;
constexpr int kThreads = 96;

template <class T>
constexpr double kTolerance = std::is_same_v<T, double> ? 1e-12 : 1e-5;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The defaults of the op, except for the aggregation.
inline Normalization normalization(Aggregation aggregation, bool by_response = false) {
  return {aggregation, by_response, 1.0, 10.0, nullptr};
}

template <class T>
struct TokenBatch {
  int64_t rows;
  int64_t cols;
  simt::Buffer<T> log_prob, old_log_prob, advantages, weights;  // [rows, cols]
  simt::Buffer<uint8_t> response_mask, entropy_mask;            // [rows, cols]

  TokenBatch(int64_t rows, int64_t cols)
      : rows(rows),
        cols(cols),
        log_prob(rows * cols),
        old_log_prob(rows * cols),
        advantages(rows * cols),
        weights(rows * cols),
        response_mask(rows * cols),
        entropy_mask(rows * cols) {
    std::mt19937 random(7);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t i = 0; i < rows * cols; ++i) {
      log_prob[i] = static_cast<T>(1.5 * uniform(random) - 1.5);
      old_log_prob[i] = log_prob[i] + static_cast<T>(uniform(random));
      advantages[i] = static_cast<T>(2 * uniform(random));
      weights[i] = static_cast<T>(uniform(random) + 1);
      response_mask[i] = uniform(random) < 0.6;
      entropy_mask[i] = uniform(random) < -0.4;
      if (!response_mask[i]) log_prob[i] = static_cast<T>(kNan);  // must not be read
    }
  }

  TokenInputs<T> inputs() {
    return {log_prob.data(),
            old_log_prob.data(),
            advantages.data(),
            weights.data(),
            response_mask.data(),
            entropy_mask.data(),
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            rows,
            cols};
  }
  bool response(int64_t i) { return response_mask[i] != 0; }
  bool selected(int64_t i) { return response(i) && entropy_mask[i] != 0; }
  Token<double> token(int64_t i) {
    return {double(log_prob[i]), double(old_log_prob[i]), double(advantages[i]), 0, false, 0, 0};
  }
};

// The outputs of the two kernels for a token loss.
template <class T, class TokenLoss>
struct LossRun {
  simt::Buffer<T> gradient;            // [rows, cols]
  simt::Buffer<LossSums<T>> sums;      // [tiles]
  simt::Buffer<T> loss;                // []
  simt::Buffer<T> metrics, row_scale;  // [kMetrics], [rows]

  LossRun(const TokenLoss& token_loss, const TokenInputs<T>& in, const Normalization& by,
          int finish_threads = kThreads)
      : gradient(in.rows * in.cols),
        sums(in.tiles()),
        loss(1),
        metrics(kMetrics),
        row_scale(in.rows) {
    simt::launch(kBlocks, kThreads, token_loss_kernel<T, TokenLoss>, token_loss, in,
                 gradient.data(), sums.data());
    simt::launch(1, finish_threads, finish_loss_kernel<T, kIsSequenceLoss<TokenLoss>>, sums.data(),
                 in.rows, in.tiles_per_row(), by, loss.data(), metrics.data(), row_scale.data());
  }
};

// d loss / d log_prob of a token loss by central differences in double.
template <class TokenLoss>
double numeric_gradient(const TokenLoss& token_loss, Token<double> token) {
  const double step = 1e-6;
  token.log_prob += step;
  const double above = token_loss(token).loss;
  token.log_prob -= 2 * step;
  return (above - token_loss(token).loss) / (2 * step);
}

}  // namespace entropy_rl::testing
