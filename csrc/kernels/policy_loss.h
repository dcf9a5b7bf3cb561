// Policy losses and KL penalties of one token, and how tokens add up to a loss; host and device.
//   d = log_prob - old_log_prob,  r = e^d,  A = advantage
// A token loss is a struct whose call gives the loss, d loss / d log_prob and the metrics of one
// token; each states its formula, as verl 0.9.1 has it. Its gradient needs nothing that is known only
// after the last token but one factor a row, row_scale, which the backward multiplies in.
// Arithmetic of a token is float32 (float64 for float64 input), as are the sums over a tile of
// kTileTokens tokens; tiles and rows are summed in float64, in their order.
#pragma once

#include <cmath>
#include <cstdint>

#include "exp.h"
#include "macros.h"
#include "selection.h"

namespace entropy_rl {

// Tokens of a row that are summed together: a unit of parallel work.
constexpr int64_t kTileTokens = 2048;

// What one token brings; fields that a loss does not name are not used by it.
template <class T>
struct Token {
  T log_prob;
  T old_log_prob;  // of a KL penalty: the reference policy's
  T advantage;
  T sequence_log_ratio;  // mean d over the token's row
  bool chosen;           // by its covariance
};

template <class T>
struct TokenResult {
  T loss;
  T gradient;
  T clipped;
  T clipped_lower;
  T kl;
};

// --- Pieces of the losses -------------------------------------------------------------------------

ENTROPY_RL_HD inline float ratio_exp(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  return x > 88.0f ? INFINITY : exp_vectorizable(x);
#endif
}
ENTROPY_RL_HD inline double ratio_exp(double x) { return exp(x); }

// Comparisons with NaN are false, so that NaN stays.
template <class T>
ENTROPY_RL_HD inline T clamped(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}
template <class T>
ENTROPY_RL_HD inline bool within(T x, T low, T high) {
  return x >= low && x <= high;
}

// d clamped to [-20, 20], its exponential, and whether d is inside, where alone it has a gradient.
template <class T>
struct ClampedRatio {
  T log_ratio;
  T ratio;
  bool inside;

  ENTROPY_RL_HD explicit ClampedRatio(T d)
      : log_ratio(clamped(d, T(-20), T(20))),
        ratio(ratio_exp(log_ratio)),
        inside(within(d, T(-20), T(20))) {}
};

// max(-A r, -A clip(r, low, high)), given d r / d log_prob.
template <class T>
ENTROPY_RL_HD inline TokenResult<T> clipped_surrogate(T advantage, T ratio, T ratio_gradient, T low,
                                                      T high) {
  const T loss = -advantage * ratio;
  const T clipped_loss = -advantage * clamped(ratio, low, high);
  const bool clipped = clipped_loss > loss;
  TokenResult<T> out{};
  out.loss = clipped ? clipped_loss : loss;
  out.gradient = clipped ? T(0) : -advantage * ratio_gradient;
  out.clipped = clipped ? T(1) : T(0);
  return out;
}

// --- Policy losses --------------------------------------------------------------------------------

enum class LossMode {
  kVanilla,
  kGpg,
  kClipCov,
  kKlCov,
  kGspo,
  kGeoMean,
  kDppoTv,
  kDppoKl,
  kSapo,
  kDro,
  kCispo
};

// PPO with dual clip: max(-A r, -A clip(r, low, high)), and at most -A c where A < 0.
// arXiv 1707.06347, 1912.09729.
template <class T>
struct VanillaLoss {
  T low, high, dual_clip;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
    TokenResult<T> out = clipped_surrogate(token.advantage, r.ratio, r.inside ? r.ratio : T(0), low,
                                           high);
    const T bound = -token.advantage * dual_clip;
    const bool bounded = token.advantage < 0 && out.loss > bound;
    out.loss = bounded ? bound : out.loss;
    out.gradient = bounded ? T(0) : out.gradient;
    out.clipped_lower = bounded ? T(1) : T(0);
    out.kl = -r.log_ratio;
    return out;
  }
};

// -A log_prob. arXiv 2504.02546.
template <class T>
struct GpgLoss {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    TokenResult<T> out{};
    out.loss = -token.log_prob * token.advantage;
    out.gradient = -token.advantage;
    return out;
  }
};

// max(-A r, -A clip(r, low, high)), without loss or gradient where chosen. arXiv 2505.22617.
template <class T>
struct ClipCovLoss {
  T low, high;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const T ratio = ratio_exp(d);
    TokenResult<T> out = clipped_surrogate(token.advantage, ratio, ratio, low, high);
    out.loss = token.chosen ? T(0) : out.loss;
    out.gradient = token.chosen ? T(0) : out.gradient;
    out.clipped = token.chosen ? T(1) : T(0);
    out.kl = -d;
    return out;
  }
};

// -A r, and |d| times a coefficient where chosen. arXiv 2505.22617.
template <class T>
struct KlCovLoss {
  T kl_coefficient;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const T loss = -token.advantage * ratio_exp(d);
    const T sign = d > 0 ? T(1) : d < 0 ? T(-1) : T(0);
    TokenResult<T> out{};
    out.kl = d < 0 ? -d : d;
    out.loss = token.chosen ? loss + kl_coefficient * out.kl : loss;
    out.gradient = token.chosen ? loss + kl_coefficient * sign : loss;
    return out;
  }
};

// max(-A s, -A clip(s, low, high)), s the geometric mean of r over the sequence as a value, with the
// gradient of the token's own r. arXiv 2507.18071.
template <class T>
struct GspoLoss {
  T low, high;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T log_ratio = token.sequence_log_ratio;
    const bool inside = log_ratio <= T(10);
    const T ratio = ratio_exp(log_ratio > T(10) ? T(10) : log_ratio);
    TokenResult<T> out = clipped_surrogate(token.advantage, ratio, inside ? ratio : T(0), low, high);
    out.kl = token.old_log_prob - token.log_prob;
    return out;
  }
};

// Of the sequence: -mean(A) * geometric mean of r, d of each token clipped to [low, high] on the side
// where its advantage would push it further out. The token's `loss` is that clipped d; sequence_loss
// makes the loss of it. arXiv 2507.20673.
template <class T>
struct GeoMeanLoss {
  T low, high;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const bool up = token.advantage > 0;
    const bool down = token.advantage < 0;
    const bool clipped = (up && d > high) || (down && d < low);
    const T bound = up ? high : low;
    TokenResult<T> out{};
    out.loss = clipped ? bound : (up || down ? d : T(0) * d);
    out.gradient = (up || down) && !clipped ? T(1) : T(0);
    const bool outside = !within(d, low, high);
    out.clipped = outside && up ? T(1) : T(0);
    out.clipped_lower = outside && down ? T(1) : T(0);
    out.kl = -d;
    return out;
  }
};

// Whether the loss is a function of sums over its row, not a sum over tokens.
template <class TokenLoss>
inline constexpr bool kIsSequenceLoss = false;
template <class T>
inline constexpr bool kIsSequenceLoss<GeoMeanLoss<T>> = true;

// Whether the loss needs the mean d of the row before its pass.
template <class TokenLoss>
inline constexpr bool kNeedsSequenceRatio = false;
template <class T>
inline constexpr bool kNeedsSequenceRatio<GspoLoss<T>> = true;

// -A min(r, c) log_prob with r as a value, dropped where the token's probability has already moved by
// more than `low` or `high` in the direction of its advantage. arXiv 2602.04879.
template <class T>
ENTROPY_RL_HD inline TokenResult<T> truncated_reinforce(const Token<T>& token, T truncation,
                                                        bool valid) {
  const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
  const T ratio = r.ratio > truncation ? truncation : r.ratio;
  TokenResult<T> out{};
  out.loss = valid ? -token.advantage * ratio * token.log_prob : T(0);
  out.gradient = valid ? -token.advantage * ratio : T(0);
  out.clipped = valid ? T(0) : T(1);
  out.clipped_lower = valid && r.ratio > truncation ? T(1) : T(0);
  out.kl = -r.log_ratio;
  return out;
}

// Movement measured as the total variation of (this token, any other).
template <class T>
struct DppoTvLoss {
  T low, high, truncation;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T moved = ratio_exp(token.log_prob) - ratio_exp(token.old_log_prob);
    const bool valid = token.advantage > 0 ? moved <= high : moved >= -low;
    return truncated_reinforce(token, truncation, valid);
  }
};

// Movement measured as the KL divergence of (this token, any other).
template <class T>
struct DppoKlLoss {
  T low, high, truncation;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T p = ratio_exp(token.log_prob);
    const T q = ratio_exp(token.old_log_prob);
    const T epsilon = T(1e-8);
    const T moved = q * (token.old_log_prob - token.log_prob) +
                    (T(1) - q) * log((T(1) - q + epsilon) / (T(1) - p + epsilon));
    const bool valid = token.advantage > 0 ? moved <= high || p <= q : moved <= low || p >= q;
    return truncated_reinforce(token, truncation, valid);
  }
};

// -A sigmoid(tau (r - 1)) 4 / tau, with a tau of its own for A > 0 and for A <= 0. arXiv 2511.20347.
template <class T>
struct SapoLoss {
  T tau_positive, tau_negative;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
    const T tau = token.advantage > 0 ? tau_positive : tau_negative;
    const T x = tau * (r.ratio - T(1));
    // Of -|x|, so that e^x never overflows.
    const T e = ratio_exp(x < 0 ? x : -x);
    const T larger = T(1) / (T(1) + e);
    const T sigmoid = x < 0 ? e * larger : larger;
    TokenResult<T> out{};
    out.loss = -token.advantage * sigmoid * (T(4) / tau);
    out.gradient = r.inside ? T(-4) * token.advantage * e * larger * larger * r.ratio : T(0);
    out.kl = -r.log_ratio;
    return out;
  }
};

// -(A log_prob - beta / 2 d^2). arXiv 2405.19107.
template <class T>
struct DroLoss {
  T beta;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    TokenResult<T> out{};
    out.loss = -(token.log_prob * token.advantage - T(0.5) * beta * d * d);
    out.gradient = -(token.advantage - beta * d);
    out.kl = -d;
    return out;
  }
};

// -clip(r, low, high) A log_prob with the clipped r as a value. arXiv 2506.13585.
template <class T>
struct CispoLoss {
  T low, high;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const ClampedRatio<T> r(token.log_prob - token.old_log_prob);
    const T ratio = clamped(r.ratio, low, high);
    TokenResult<T> out{};
    out.loss = -ratio * token.advantage * token.log_prob;
    out.gradient = -ratio * token.advantage;
    out.clipped = r.ratio != ratio ? T(1) : T(0);
    out.kl = -r.log_ratio;
    return out;
  }
};

// --- KL penalties, and the plain value ------------------------------------------------------------
// d is log_prob - reference log_prob. A straight-through penalty has the gradient of k2, d, whatever
// its value: that of an unbiased estimate of the KL divergence's gradient.
// joschu.net/blog/kl-approx.html

enum class KlPenalty { kK1, kAbs, kK2, kK3 };

// d
template <class T>
struct K1Penalty {
  bool straight_through;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    TokenResult<T> out{};
    out.loss = d;
    out.gradient = straight_through ? d : T(1);
    return out;
  }
};

// |d|
template <class T>
struct AbsPenalty {
  bool straight_through;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const T sign = d > 0 ? T(1) : d < 0 ? T(-1) : T(0);
    TokenResult<T> out{};
    out.loss = d < 0 ? -d : d;
    out.gradient = straight_through ? d : sign;
    return out;
  }
};

// d^2 / 2
template <class T>
struct K2Penalty {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    TokenResult<T> out{};
    out.loss = T(0.5) * d * d;
    out.gradient = d;
    return out;
  }
};

// e^-d + d - 1, d clamped to [-20, 20] and the result to [-10, 10]
template <class T>
struct K3Penalty {
  bool straight_through;

  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    const T d = token.log_prob - token.old_log_prob;
    const ClampedRatio<T> r(-d);
    const T value = r.ratio - r.log_ratio - T(1);
    const bool inside = r.inside && within(value, T(-10), T(10));
    TokenResult<T> out{};
    out.loss = clamped(value, T(-10), T(10));
    out.gradient = straight_through ? d : inside ? T(1) - r.ratio : T(0);
    return out;
  }
};

// The value itself, for the aggregation of anything: `log_prob` stands for it.
template <class T>
struct PlainValue {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    TokenResult<T> out{};
    out.loss = token.log_prob;
    out.gradient = T(1);
    return out;
  }
};

// --- Sums -----------------------------------------------------------------------------------------

// What a call reads: contiguous [rows, cols]; null where the caller has none.
template <class T>
struct TokenInputs {
  const T* log_prob;
  const T* old_log_prob;
  const T* advantages;
  const T* weights;                // factor of each token's loss; null: 1
  const uint8_t* response_mask;    // nonzero = in
  const uint8_t* entropy_mask;     // nonzero = in; null: all
  const uint8_t* chosen;           // by covariance
  int64_t rows;
  int64_t cols;

  ENTROPY_RL_HD int64_t tiles_per_row() const { return (cols + kTileTokens - 1) / kTileTokens; }
  ENTROPY_RL_HD int64_t tiles() const { return rows * tiles_per_row(); }
};

// Of a tile in T, of a row and of the batch in double; {} is zero, and the constructor trivial, as
// shared memory wants it. `loss` is over selected tokens, the rest over
// response tokens; the last two are kept for a sequence loss alone.
template <class T>
struct LossSums {
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

// Sums over response tokens that some losses need before their pass.
template <class T>
struct Moments {
  T response;
  T log_ratio;
  T log_prob;
  T advantage;

  template <class U>
  ENTROPY_RL_HD Moments& operator+=(const Moments<U>& other) {
    response += static_cast<T>(other.response);
    log_ratio += static_cast<T>(other.log_ratio);
    log_prob += static_cast<T>(other.log_prob);
    advantage += static_cast<T>(other.advantage);
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

// Mean d of a row, the log of gspo's sequence ratio.
ENTROPY_RL_HD inline double sequence_log_ratio(const Moments<double>& row) {
  return row.log_ratio / (row.response > 1 ? row.response : 1);
}

// Keeps verl's divisions by a masked count from being 0 / 0.
constexpr double kCountEpsilon = 1e-8;

// --- Choice by covariance: clip_cov and kl_cov ------------------------------------------------------

// What the choice needs to know of the whole batch.
struct CovarianceMoments {
  double mean_log_prob;
  double mean_advantage;
  int64_t count;  // how many tokens to choose: max(1, int(ratio * response tokens))

  ENTROPY_RL_HD CovarianceMoments(const Moments<double>& batch, double ratio, double epsilon)
      : mean_log_prob(0), mean_advantage(0), count(static_cast<int64_t>(ratio * batch.response)) {
    if (count < 1) count = 1;
    if (batch.response == 0) return;
    mean_log_prob = batch.log_prob / (batch.response + epsilon);
    mean_advantage = batch.advantage / (batch.response + epsilon);
  }
  CovarianceMoments() = default;

  template <class T>
  ENTROPY_RL_HD T covariance(T log_prob, T advantage) const {
    return (advantage - static_cast<T>(mean_advantage)) * (log_prob - static_cast<T>(mean_log_prob));
  }
};

// A well-mixed 64-bit word: the finaliser of splitmix64.
ENTROPY_RL_HD inline uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Keys for the selection of the largest (selection.h); both give kIneligibleKey to tokens that are
// not to be chosen.

// Random among the unclipped tokens whose covariance lies between two bounds.
template <class T>
struct ClipCovKey {
  using Key = uint32_t;
  ClipCovLoss<T> loss;
  T lower, upper;
  double ratio;
  static constexpr double kEpsilon = kCountEpsilon;

  ENTROPY_RL_HD Key operator()(const Token<T>& token, const CovarianceMoments& moments,
                               uint64_t seed, int64_t index) const {
    const T ratio = ratio_exp(token.log_prob - token.old_log_prob);
    const bool clipped =
        clipped_surrogate(token.advantage, ratio, ratio, loss.low, loss.high).clipped != T(0);
    const T covariance = moments.covariance(token.log_prob, token.advantage);
    if (clipped || !(covariance > lower && covariance < upper)) return kIneligibleKey<Key>;
    const Key key = static_cast<Key>(mixed(mixed(seed) + static_cast<uint64_t>(index)) >> 32);
    return key == kIneligibleKey<Key> ? Key{1} : key;
  }
};

// The covariance itself.
template <class T>
struct KlCovKey {
  using Key = selection_key_t<T>;
  double ratio;
  static constexpr double kEpsilon = 0;

  ENTROPY_RL_HD Key operator()(const Token<T>& token, const CovarianceMoments& moments, uint64_t,
                               int64_t) const {
    return selection_key(moments.covariance(token.log_prob, token.advantage));
  }
};

// --- From sums to the loss ------------------------------------------------------------------------

enum class Aggregation {
  kTokenMean,
  kTokenSum,
  kSeqMeanTokenSum,
  kSeqMeanTokenSumNorm,
  kSeqMeanTokenMean
};

struct Normalization {
  Aggregation aggregation;
  bool by_response;            // divide by response tokens, else by selected tokens
  double dp_size;              // data-parallel ranks whose losses are averaged
  double scale_factor;         // of kSeqMeanTokenSumNorm
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

// A row's part of the loss, and d loss / d (sum over the row of loss or, for a sequence loss, of its
// tokens' clipped d).
struct RowLoss {
  double loss;
  double scale;
};

// A sum over tokens. A divisor of 0 means that nothing counts: loss and scale are 0.
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

template <class TokenLoss>
ENTROPY_RL_HD inline RowLoss row_loss(const LossSums<double>& row, const BatchSums& batch,
                                      const Normalization& normalization, double rows) {
  if constexpr (kIsSequenceLoss<TokenLoss>) {
    return sequence_loss(row, rows);
  } else {
    return sum_loss(row, batch, normalization);
  }
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
