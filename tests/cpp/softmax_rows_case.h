// Rows of logits in the shim's device memory, for the tests of logprob_entropy.
#pragma once

#include <gtest/gtest.h>

#include "kernels/logprob_entropy.cuh"
#include "simt.h"
#include "softmax_reference.h"

namespace entropy_rl::testing {

using LogitsTypes = ::testing::Types<float, double, BFloat16, Half>;

// Fewer blocks than rows, so that a block takes several; one warp, and a number of warps that is
// not a power of two.
constexpr unsigned kBlocks = 2;
constexpr int kBlockThreads[] = {32, 96};

// 1: every other term vanishes. 7: less than one 16-byte pack of a 16-bit type. 31, 32, 33: around
// a warp. 257: odd, so that rows start at different alignments. 1100 and 2101: a round of the main
// loop for 4-byte and for 2-byte types, then single packs, head and tail.
constexpr int kVocabSizes[] = {1, 7, 31, 32, 33, 257, 1100, 2101};

template <class T>
struct RowsCase {
  using Acc = accumulate_t<T>;

  int64_t rows;
  int vocab;
  simt::Buffer<T> logits;
  simt::Buffer<int64_t> targets;  // [rows]
  simt::Buffer<bool> mask;        // [rows], used where `with_mask`
  bool with_mask = false;
  Acc temperature = 1;
  simt::Buffer<Acc> row_temperature;  // [rows], used where `with_row_temperature`
  bool with_row_temperature = false;
  RowLayout layout;
  int64_t first = 0;  // offset of row 0

  // Rows of normal values, one behind the other.
  RowsCase(int64_t rows, int vocab, double scale = 3.0)
      : RowsCase(rows, vocab, vocab, normal_values<T>(rows * vocab, scale, vocab)) {}

  // Row r at r * stride of `values`.
  RowsCase(int64_t rows, int vocab, int64_t stride, const std::vector<T>& values)
      : rows(rows),
        vocab(vocab),
        logits(values),
        targets(rows),
        mask(std::vector<bool>(rows, true)),
        row_temperature(std::vector<Acc>(rows, Acc(1))) {
    layout.size[0] = rows;
    layout.stride[0] = stride;
    for (int64_t row = 0; row < rows; ++row) targets[row] = row * 12345 % vocab;
  }

  T& logit(int64_t row, int j) { return logits[first + layout.offset(row) + j]; }

  SoftmaxRows<T> arguments(bool with_targets) {
    return {logits.data() + first,
            layout,
            rows,
            vocab,
            with_mask ? mask.data() : nullptr,
            temperature,
            with_row_temperature ? row_temperature.data() : nullptr,
            with_targets ? targets.data() : nullptr};
  }

  Real temperature_of(int64_t row) {
    return with_row_temperature ? row_temperature[row] : temperature;
  }

  std::vector<Real> log_probs(int64_t row) {
    std::vector<Real> x;
    for (int j = 0; j < vocab; ++j) x.push_back(load_value(logit(row, j)));
    return log_softmax(x, temperature_of(row));
  }

  void expect_entropy(int64_t row, Acc entropy) {
    EXPECT_NEAR(entropy, entropy_of(log_probs(row)), kValueTolerance<Acc>) << describe(row);
  }

  void expect_log_prob(int64_t row, Acc log_prob) {
    EXPECT_NEAR(log_prob, log_probs(row)[targets[row]], kValueTolerance<Acc>) << describe(row);
  }

  void expect_gradient(int64_t row, const T* grad_row, double grad_log_prob, double grad_entropy) {
    const auto expected = softmax_gradient(log_probs(row), targets[row], grad_log_prob,
                                           grad_entropy, temperature_of(row));
    const double scale = std::abs(grad_log_prob) + std::abs(grad_entropy);
    for (int j = 0; j < vocab; ++j) {
      const double tolerance =
          kGradientTolerance<Acc> * scale / temperature_of(row) + rounding_error<T>(expected[j]);
      EXPECT_NEAR(load_value(grad_row[j]), expected[j], tolerance)
          << describe(row) << ", entry " << j;
    }
  }

  void expect_zero(int64_t row, const T* grad_row) {
    for (int j = 0; j < vocab; ++j) EXPECT_EQ(load_value(grad_row[j]), 0) << describe(row);
  }

  void expect_nan(int64_t row, const T* grad_row) {
    for (int j = 0; j < vocab; ++j)
      EXPECT_TRUE(std::isnan(load_value(grad_row[j]))) << describe(row);
  }

  std::string describe(int64_t row) const {
    return "row " + std::to_string(row) + " of " + std::to_string(rows) + " x " +
           std::to_string(vocab);
  }
};

}  // namespace entropy_rl::testing
