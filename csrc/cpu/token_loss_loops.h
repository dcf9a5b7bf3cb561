// The loops of token_loss_backend.h and policy_loss.cpp (see each_simd.h). Losses, keys and moments
// are passed by value, so that their constants are in registers: a load that may fault would keep a
// loop from vectorising.

template <class T>
__attribute__((always_inline)) inline T sum_of(const T* x, int count) {
  T lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  }
  for (int j = 0; i < count; ++i, ++j) lanes[j] += x[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

template <class T, class TokenLoss>
LossSums<T> tile_loss(TokenLoss token_loss, const TokenInputs<T>& in, int64_t row, int64_t begin,
                      int64_t end, T* __restrict__ gradient /*[rows, cols]*/) {
  LossSums<T> sums{};
  alignas(64) T loss[kChunkTokens], clipped[kChunkTokens], clipped_lower[kChunkTokens],
      kl[kChunkTokens], advantage[kChunkTokens], log_weight[kChunkTokens];
  for (; begin < end; begin += kChunkTokens) {
    const Chunk<T, kReadsClipRatios<TokenLoss>> chunk(in, row, begin, end);
    for (int i = 0; i < chunk.count; ++i) {
      const TokenResult<T> result = token_loss(chunk.token(i));
      const T weight = kIsSequenceLoss<TokenLoss> ? T(1) : chunk.weight[i];
      // A selection, because a token outside the mask may hold NaN, and 0 * NaN is NaN.
      loss[i] = chunk.selected[i] != 0 ? result.loss * weight : T(0);
      gradient[begin + i] = chunk.selected[i] != 0 ? result.gradient * weight : T(0);
      clipped[i] = chunk.response[i] != 0 ? result.clipped : T(0);
      clipped_lower[i] = chunk.response[i] != 0 ? result.clipped_lower : T(0);
      kl[i] = chunk.response[i] != 0 ? result.kl : T(0);
    }
    sums.loss += sum_of(loss, chunk.count);
    sums.selected += sum_of(chunk.selected, chunk.count);
    sums.response += sum_of(chunk.response, chunk.count);
    sums.clipped += sum_of(clipped, chunk.count);
    sums.clipped_lower += sum_of(clipped_lower, chunk.count);
    sums.kl += sum_of(kl, chunk.count);
    if constexpr (kIsSequenceLoss<TokenLoss>) {
      for (int i = 0; i < chunk.count; ++i) {
        advantage[i] = chunk.response[i] != 0 ? chunk.advantage[i] : T(0);
      }
      sums.advantage += sum_of(advantage, chunk.count);
      for (int i = 0; i < chunk.count && in.weights; ++i) {
        log_weight[i] = chunk.response[i] != 0 ? log_of_weight(chunk.weight[i]) : T(0);
      }
      if (in.weights) sums.log_weight += sum_of(log_weight, chunk.count);
    }
  }
  return sums;
}

template <class T>
void scale_row(const accumulate_t<T>* gradient /*[cols]*/, accumulate_t<T> scale, int64_t cols,
               T* out /*[cols]*/) {
  for (int64_t i = 0; i < cols; ++i) store_value(token_gradient(gradient[i], scale), out + i);
}

template <class T>
Moments<T> tile_moments(const TokenInputs<T>& in, int64_t row, int64_t begin, int64_t end) {
  Moments<T> sums{};
  alignas(64) T log_ratio[kChunkTokens], log_prob[kChunkTokens], advantage[kChunkTokens];
  for (; begin < end; begin += kChunkTokens) {
    const Chunk<T> chunk(in, row, begin, end);
    for (int i = 0; i < chunk.count; ++i) {
      const bool is_response = chunk.response[i] != 0;
      log_ratio[i] = is_response ? chunk.log_prob[i] - chunk.old_log_prob[i] : T(0);
      log_prob[i] = is_response ? chunk.log_prob[i] : T(0);
      advantage[i] = is_response ? chunk.advantage[i] : T(0);
    }
    sums.response += sum_of(chunk.response, chunk.count);
    sums.log_ratio += sum_of(log_ratio, chunk.count);
    sums.log_prob += sum_of(log_prob, chunk.count);
    sums.advantage += sum_of(advantage, chunk.count);
  }
  return sums;
}

template <class T, class CovarianceKey>
void tile_keys(CovarianceKey key, const TokenInputs<T>& in, CovarianceMoments moments,
               uint64_t seed, int64_t row, int64_t begin, int64_t end,
               typename CovarianceKey::Key* keys /*[rows, cols]*/) {
  using Key = typename CovarianceKey::Key;
  for (; begin < end; begin += kChunkTokens) {
    const Chunk<T, kReadsClipRatios<CovarianceKey>> chunk(in, row, begin, end);
    Key* out = keys + begin;
    for (int i = 0; i < chunk.count; ++i) {
      // A key is computed for every token and then selected: a loop with a branch does not
      // vectorise.
      const Key made = key(chunk.token(i), moments, seed, begin + i);
      out[i] = chunk.response[i] != 0 ? made : kIneligibleKey<Key>;
    }
  }
}
