// How the losses of tokens add up to one number; host and device.
// A token loss is a struct whose call gives the loss, d loss / d value and the metrics of one
// token. What depends on all tokens is one factor a row, row_scale. On CUDA the backward multiplies
// it in, so loss and gradient take one pass. The arithmetic of a token and the sums over a tile of
// kTileTokens tokens are float32 (float64 for float64 input); tiles and rows are summed in float64,
// in their order.
#pragma once

#include <cmath>
#include <cstdint>

#include "exp_log.h"

namespace entropy_rl {

// Tokens of a row that one worker sums.
constexpr int64_t kTileTokens = 2048;

// The values of one token, or on the host of as many tokens as a vector has lanes (exp_log.h); each
// loss uses some of them.
template <class Value>
struct Token {
  Value log_prob;      // of aggregate: the value
  Value old_log_prob;  // of a KL penalty: the reference policy's
  Value advantage;
  Value sequence_log_ratio;  // log of the probability ratio's geometric mean over the row
  mask_t<Value> chosen;      // because of its covariance (clip_cov, kl_cov)
  Value clip_low;            // the token's own clip ratios, where a loss reads them (below)
  Value clip_high;
};

template <class Value>
struct TokenResult {
  Value loss;
  Value gradient;
  Value clipped;
  Value clipped_lower;
  Value kl;
};

// Whether a loss is a function of sums over its row (sequence_loss below) instead of a sum over
// tokens.
template <class TokenLoss>
inline constexpr bool kIsSequenceLoss = false;

// Whether a loss, or a key of a choice, reads the clip ratios of each token.
template <class TokenLoss>
inline constexpr bool kReadsClipRatios = false;

// ---- Sums ----

// The inputs of a call, contiguous [rows, cols]; null where the caller gave none.
template <class T>
struct TokenInputs {
  const T* log_prob;
  const T* old_log_prob;
  const T* advantages;
  const T* weights;              // factor of each token's loss; null: 1
  const uint8_t* response_mask;  // nonzero = in
  const uint8_t* entropy_mask;   // nonzero = in; null: all
  const uint8_t* chosen;
  const T* sequence_log_ratio;  // [rows]
  const T* clip_low;            // given exactly where kReadsClipRatios
  const T* clip_high;
  int64_t rows;
  int64_t cols;

  ENTROPY_RL_HD int64_t tiles_per_row() const { return (cols + kTileTokens - 1) / kTileTokens; }
  ENTROPY_RL_HD int64_t tiles() const { return rows * tiles_per_row(); }
};

// Sums over a tile in T, or over a row or the batch in double. `loss` is over selected tokens, the
// others over response tokens; only a sequence loss needs the last two. {} is zero. The struct is
// trivial, so that it can live in shared memory, and aligned, so that it is loaded 16 bytes at a
// time.
template <class T>
struct alignas(16) LossSums {
  T loss;
  T selected;
  T response;
  T clipped;
  T clipped_lower;
  T kl;
  T advantage;
  T log_weight;

  template <class U>
  ENTROPY_RL_HD LossSums& operator+=(const LossSums<U>& other) {
    loss += static_cast<T>(other.loss);
    selected += static_cast<T>(other.selected);
    response += static_cast<T>(other.response);
    clipped += static_cast<T>(other.clipped);
    clipped_lower += static_cast<T>(other.clipped_lower);
    kl += static_cast<T>(other.kl);
    advantage += static_cast<T>(other.advantage);
    log_weight += static_cast<T>(other.log_weight);
    return *this;
  }
};

// Sum over the tiles of one row, in order.
template <template <class> class Sums, class T>
ENTROPY_RL_HD inline Sums<double> row_sum(const Sums<T>* tile_sums /*[rows, tiles_per_row]*/,
                                          int64_t row, int64_t tiles_per_row) {
  Sums<double> sum{};
  for (int64_t tile = 0; tile < tiles_per_row; ++tile) sum += tile_sums[row * tiles_per_row + tile];
  return sum;
}

// Log of a token's weight in its sequence's; 1e-10 keeps a weight of 0 finite.
template <class T>
ENTROPY_RL_HD inline T log_of_weight(T weight) {
  return log(weight + T(1e-10));
}

// Keeps verl's divisions by a masked count from being 0 / 0.
constexpr double kCountEpsilon = 1e-8;

// ---- From sums to the loss ----

enum class Aggregation {
  kTokenMean,
  kTokenSum,
  kSeqMeanTokenSum,
  kSeqMeanTokenSumNorm,
  kSeqMeanTokenMean
};

struct Normalization {
  Aggregation aggregation;
  bool by_response;     // divide by response tokens instead of selected tokens
  double dp_size;       // data-parallel ranks whose losses are averaged
  double scale_factor;  // of kSeqMeanTokenSumNorm
  // The divisor over all ranks and micro-batches; null: of this batch.
  const double* given_divisor = nullptr;

  // Tokens of a row that count towards a divisor.
  template <class Sums>
  ENTROPY_RL_HD double counted(const Sums& row) const {
    return by_response ? row.response : row.selected;
  }
};

// Sums over rows.
struct BatchSums {
  LossSums<double> tokens;
  double counted_rows;  // rows with a token that counts

  ENTROPY_RL_HD BatchSums& operator+=(const BatchSums& other) {
    tokens += other.tokens;
    counted_rows += other.counted_rows;
    return *this;
  }
  ENTROPY_RL_HD void add_row(const LossSums<double>& row, const Normalization& normalization) {
    tokens += row;
    counted_rows += normalization.counted(row) > 0 ? 1 : 0;
  }
};

// A row's part of the loss, and d loss / d S, where S is the row's sum of losses or, for a sequence
// loss, of its tokens' clipped d.
struct RowLoss {
  double loss;
  double scale;
};

// A loss that is a sum over tokens. A divisor of 0 means that no token counts: loss and scale are
// 0. A divisor below 0 is an error of the caller's: both are NaN.
ENTROPY_RL_HD inline RowLoss sum_loss(const LossSums<double>& row, const BatchSums& batch,
                                      const Normalization& normalization) {
  const double counted = normalization.counted(row);
  if (counted == 0) return {0, 0};
  const Aggregation aggregation = normalization.aggregation;
  double divisor = batch.counted_rows;
  if (aggregation == Aggregation::kTokenMean) divisor = normalization.counted(batch.tokens);
  if (aggregation == Aggregation::kTokenSum) divisor = 1;
  if (normalization.given_divisor) divisor = *normalization.given_divisor;
  if (divisor == 0) return {0, 0};
  if (divisor < 0) return {NAN, NAN};
  double scale = normalization.dp_size / divisor;
  if (aggregation == Aggregation::kSeqMeanTokenSumNorm) scale /= normalization.scale_factor;
  if (aggregation == Aggregation::kSeqMeanTokenMean) scale /= counted + kCountEpsilon;
  return {row.loss * scale, scale};
}

// The mean over all rows of -A_mean e^(mean clipped d) w, w the geometric mean of the weights.
ENTROPY_RL_HD inline RowLoss sequence_loss(const LossSums<double>& row, double rows) {
  if (row.response == 0) return {0, 0};
  const double count = row.response + kCountEpsilon;
  const double loss =
      -row.advantage / count * exp(row.loss / count) * exp(row.log_weight / count) / rows;
  return {loss, loss / count};
}

template <bool is_sequence_loss>
ENTROPY_RL_HD inline RowLoss row_loss(const LossSums<double>& row, const BatchSums& batch,
                                      const Normalization& normalization, double rows) {
  if constexpr (is_sequence_loss) {
    return sequence_loss(row, rows);
  } else {
    return sum_loss(row, batch, normalization);
  }
}

// d loss / d value of a token from its two factors; `scale` is row_scale times the incoming
// gradient. A token outside the mask has gradient 0, and its result is 0 even where the scale is
// NaN.
template <class T>
ENTROPY_RL_HD inline T token_gradient(T gradient, T scale) {
  return gradient == T(0) ? T(0) : gradient * scale;
}

// actor/pg_clipfrac, actor/ppo_kl, actor/pg_clipfrac_lower, actor/entropy_token_ratio.
constexpr int kMetrics = 4;

template <class T>
ENTROPY_RL_HD inline void write_metrics(const BatchSums& batch, T* metrics /*[kMetrics]*/) {
  const LossSums<double>& sums = batch.tokens;
  const double count = sums.response + kCountEpsilon;
  metrics[0] = static_cast<T>(sums.clipped / count);
  metrics[1] = static_cast<T>(sums.kl / count);
  metrics[2] = static_cast<T>(sums.clipped_lower / count);
  metrics[3] = static_cast<T>(sums.response > 0 ? sums.selected / sums.response : 0);
}

}  // namespace entropy_rl
