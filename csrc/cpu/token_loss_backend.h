// Token losses on the CPU: tiles run in parallel, and each is one loop over vectors of tokens.
// Tiles and rows are summed in order, so results do not depend on the number of threads. Counting
// the tokens takes next to no time here, so the forward does it first and writes gradients that
// have row_scale in them; row_scale itself is then 1.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels/policy_loss_math.h"
#include "../ops/token_loss.h"
#include "simd.h"

namespace entropy_rl::cpu {

constexpr int kChunkTokens = 256;
// A thread takes at least this many tokens.
constexpr int64_t kTokensPerTask = 1 << 14;

// Calls fn with each array of tokens, or null.
template <class T, class Fn>
void for_each_array(TokenInputs<T>& in, const Fn& fn) {
  for (const T** array :
       {&in.log_prob, &in.old_log_prob, &in.advantages, &in.weights, &in.clip_low, &in.clip_high}) {
    fn(*array);
  }
  for (const uint8_t** array : {&in.response_mask, &in.entropy_mask, &in.chosen}) fn(*array);
}

// The inputs from a token on.
template <class T>
TokenInputs<T> tokens_from(TokenInputs<T> in, int64_t begin) {
  for_each_array(in, [&](auto& array) { array = array ? array + begin : nullptr; });
  return in;
}

// Fewer than kLanes tokens, followed by tokens outside the mask.
template <class T>
struct PaddedTokens {
  TokenInputs<T> inputs;

  PaddedTokens(const TokenInputs<T>& in, int64_t begin, int64_t count) : inputs(in) {
    uint8_t* next = memory_;
    for_each_array(inputs, [&](auto& array) {
      using Element = std::decay_t<decltype(*array)>;
      Element* copy = reinterpret_cast<Element*>(next);
      if (array)
        array = static_cast<const Element*>(memcpy(copy, array + begin, count * sizeof(Element)));
      next += kLanes * sizeof(Element);
    });
  }
  PaddedTokens(const PaddedTokens&) = delete;

 private:
  alignas(T) uint8_t memory_[kLanes * (6 * sizeof(T) + 3)] = {};
};

// What keys are made of, for up to kChunkTokens tokens: clip ratios only where they are given. It
// is copied to local arrays, because the compiler vectorises a selection between loaded values only
// if no load can fault.
template <class T>
struct Chunk {
  alignas(64) T log_prob[kChunkTokens];
  T old_log_prob[kChunkTokens];
  T advantage[kChunkTokens];
  T clip_low[kChunkTokens];
  T clip_high[kChunkTokens];
  uint8_t response[kChunkTokens];

  __attribute__((always_inline)) Token<T> token(int i) const {
    return {log_prob[i], old_log_prob[i], advantage[i], T(0), false, clip_low[i], clip_high[i]};
  }
};

// Calls fn(tile, row, first token, end) for every tile.
template <class T, class Fn>
void for_each_tile(const TokenInputs<T>& in, const Fn& fn) {
  simd();
  const int64_t tokens_per_tile = std::max<int64_t>(1, std::min(in.cols, kTileTokens));
  const int64_t tiles_per_task = std::max<int64_t>(1, kTokensPerTask / tokens_per_tile);
  torch::stable::parallel_for(0, in.tiles(), tiles_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / in.tiles_per_row();
      const int64_t column = tile % in.tiles_per_row() * kTileTokens;
      fn(tile, row, row * in.cols + column,
         row * in.cols + std::min(column + kTileTokens, in.cols));
    }
  });
}

}  // namespace entropy_rl::cpu

#define ENTROPY_RL_LOOPS "token_loss_loops.h"
#include "each_simd.h"

namespace entropy_rl::cpu {

template <class T>
LossSums<T> tile_counts(const TokenInputs<T>& in, int64_t begin, int64_t end) {
  ENTROPY_RL_SIMD_CALL(tile_counts(in, begin, end));
}

// Writes the gradients, times row_scale, of the tokens [begin, end) of one row, and their sums
// beside the counts that `tile` has.
template <class T, class TokenLoss>
void tile_loss(const TokenLoss& token_loss, const TokenInputs<T>& in, int64_t row, T row_scale,
               int64_t begin, int64_t end, T* gradient /*[rows, cols]*/, LossSums<T>& tile) {
  ENTROPY_RL_SIMD_CALL(tile_loss(token_loss, in, row, row_scale, begin, end, gradient, tile));
}

template <class T>
void scale_row(const accumulate_t<T>* gradient /*[cols]*/, accumulate_t<T> scale, int64_t cols,
               T* out /*[cols]*/) {
  ENTROPY_RL_SIMD_CALL(scale_row(gradient, scale, cols, out));
}

struct TokenLosses {
  template <class T, class TokenLoss>
  static void run(const TokenLoss& token_loss, const TokenInputs<T>& in,
                  const Normalization& normalization, const LossOutputs& out) {
    std::vector<LossSums<T>> sums(in.tiles());
    for_each_tile(in, [&](int64_t tile, int64_t, int64_t begin, int64_t end) {
      sums[tile] = tile_counts(in, begin, end);
    });
    T* gradient = mutable_data<T>(out.gradient);
    T* row_scale = mutable_data<T>(out.row_scale);
    // The scale of a sequence loss needs the sums of its tokens.
    constexpr bool kScaledLater = kIsSequenceLoss<TokenLoss>;
    if (kScaledLater) {
      std::fill_n(row_scale, in.rows, T(1));
    } else {
      row_losses<TokenLoss>(in, sums, normalization, row_scale);
    }
    for_each_tile(in, [&](int64_t tile, int64_t row, int64_t begin, int64_t end) {
      tile_loss(token_loss, in, row, row_scale[row], begin, end, gradient, sums[tile]);
    });
    const auto [loss, batch] = row_losses<TokenLoss>(in, sums, normalization, row_scale);
    *mutable_data<T>(out.loss) = static_cast<T>(loss);
    write_metrics(batch, mutable_data<T>(out.metrics));
    if (kScaledLater) {
      for_each_tile(in, [&](int64_t, int64_t row, int64_t begin, int64_t end) {
        scale_row(gradient + begin, row_scale[row], end - begin, gradient + begin);
      });
    }
    std::fill_n(row_scale, in.rows, T(1));
  }

  // Writes the scale of each row; returns the loss and the sums over rows.
  template <class TokenLoss, class T>
  static std::pair<double, BatchSums> row_losses(const TokenInputs<T>& in,
                                                 const std::vector<LossSums<T>>& sums,
                                                 const Normalization& normalization,
                                                 T* row_scale /*[rows]*/) {
    BatchSums batch{};
    for (int64_t row = 0; row < in.rows; ++row) {
      batch.add_row(row_sum(sums.data(), row, in.tiles_per_row()), normalization);
    }
    double loss = 0;
    for (int64_t row = 0; row < in.rows; ++row) {
      const LossSums<double> tokens = row_sum(sums.data(), row, in.tiles_per_row());
      const RowLoss result = row_loss<kIsSequenceLoss<TokenLoss>>(tokens, batch, normalization,
                                                                  static_cast<double>(in.rows));
      loss += result.loss;
      row_scale[row] = static_cast<T>(result.scale);
    }
    return {loss, batch};
  }

  template <class T>
  static void scale(const LossGradient& in, const Tensor& out) {
    using Acc = accumulate_t<T>;
    const Acc grad_loss = *const_data<Acc>(in.grad_loss);
    const Acc* gradient = const_data<Acc>(in.gradient);
    const Acc* row_scale = const_data<Acc>(in.row_scale);
    T* result = mutable_data<T>(out);
    simd();
    const int64_t rows_per_task =
        std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, in.cols));
    torch::stable::parallel_for(0, in.rows, rows_per_task, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        scale_row(gradient + row * in.cols, grad_loss * row_scale[row], in.cols,
                  result + row * in.cols);
      }
    });
  }
};

}  // namespace entropy_rl::cpu
