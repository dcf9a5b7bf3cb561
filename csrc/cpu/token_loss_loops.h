// The loops of token_loss_backend.h and policy_loss.cpp (see each_simd.h). Losses, keys and moments
// are passed by value, so that their constants are in registers: a load that may fault would keep a
// loop from vectorising. What does not depend on them is not inlined into their loops, of which
// there are more than a hundred: compiled in each, it would take most of the build.

template <class T>
__attribute__((noinline)) T sum_of(const T* x, int count) {
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

template <class T>
__attribute__((always_inline)) inline void load(const T* values, int64_t begin, int count, T absent,
                                                T* out) {
  for (int i = 0; i < count; ++i) out[i] = values ? values[begin + i] : absent;
}
template <class T>
__attribute__((always_inline)) inline void load(const uint8_t* mask, int64_t begin, int count,
                                                T absent, T* out) {
  for (int i = 0; i < count; ++i) out[i] = mask ? (mask[begin + i] != 0 ? T(1) : T(0)) : absent;
}

// Returns the number of tokens.
template <class T>
__attribute__((noinline)) int load_chunk(const TokenInputs<T>& in, int64_t row, int64_t begin,
                                         int64_t end, Chunk<T>& chunk) {
  const int count = static_cast<int>(std::min<int64_t>(end - begin, kChunkTokens));
  load(in.log_prob, begin, count, T(0), chunk.log_prob);
  load(in.old_log_prob, begin, count, T(0), chunk.old_log_prob);
  load(in.advantages, begin, count, T(0), chunk.advantage);
  load(in.weights, begin, count, T(1), chunk.weight);
  load(in.response_mask, begin, count, T(1), chunk.response);
  load(in.entropy_mask, begin, count, T(1), chunk.selected);
  load(in.chosen, begin, count, T(0), chunk.chosen);
  if (in.clip_low) {
    load(in.clip_low, begin, count, T(0), chunk.clip_low);
    load(in.clip_high, begin, count, T(0), chunk.clip_high);
  }
  const T sequence = in.sequence_log_ratio ? in.sequence_log_ratio[row] : T(0);
  for (int i = 0; i < count; ++i) {
    chunk.selected[i] *= chunk.response[i];
    chunk.sequence_log_ratio[i] = sequence;
  }
  return count;
}

template <class T, class TokenLoss>
LossSums<T> tile_loss(TokenLoss token_loss, const TokenInputs<T>& in, int64_t row, int64_t begin,
                      int64_t end, T* __restrict__ gradient /*[rows, cols]*/) {
  LossSums<T> sums{};
  Chunk<T> chunk;
  alignas(64) T loss[kChunkTokens], clipped[kChunkTokens], clipped_lower[kChunkTokens],
      kl[kChunkTokens], advantage[kChunkTokens], log_weight[kChunkTokens];
  for (; begin < end; begin += kChunkTokens) {
    const int count = load_chunk(in, row, begin, end, chunk);
    for (int i = 0; i < count; ++i) {
      const TokenResult<T> result = token_loss(chunk.token(i));
      const T weight = kIsSequenceLoss<TokenLoss> ? T(1) : chunk.weight[i];
      // A selection, because a token outside the mask may hold NaN, and 0 * NaN is NaN.
      loss[i] = chunk.selected[i] != 0 ? result.loss * weight : T(0);
      gradient[begin + i] = chunk.selected[i] != 0 ? result.gradient * weight : T(0);
      clipped[i] = chunk.response[i] != 0 ? result.clipped : T(0);
      clipped_lower[i] = chunk.response[i] != 0 ? result.clipped_lower : T(0);
      kl[i] = chunk.response[i] != 0 ? result.kl : T(0);
    }
    sums.loss += sum_of(loss, count);
    sums.selected += sum_of(chunk.selected, count);
    sums.response += sum_of(chunk.response, count);
    sums.clipped += sum_of(clipped, count);
    sums.clipped_lower += sum_of(clipped_lower, count);
    sums.kl += sum_of(kl, count);
    if constexpr (kIsSequenceLoss<TokenLoss>) {
      for (int i = 0; i < count; ++i) {
        advantage[i] = chunk.response[i] != 0 ? chunk.advantage[i] : T(0);
      }
      sums.advantage += sum_of(advantage, count);
      for (int i = 0; i < count && in.weights; ++i) {
        log_weight[i] = chunk.response[i] != 0 ? log_of_weight(chunk.weight[i]) : T(0);
      }
      if (in.weights) sums.log_weight += sum_of(log_weight, count);
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
  Chunk<T> chunk;
  alignas(64) T log_ratio[kChunkTokens], log_prob[kChunkTokens], advantage[kChunkTokens];
  for (; begin < end; begin += kChunkTokens) {
    const int count = load_chunk(in, row, begin, end, chunk);
    for (int i = 0; i < count; ++i) {
      const bool is_response = chunk.response[i] != 0;
      log_ratio[i] = is_response ? chunk.log_prob[i] - chunk.old_log_prob[i] : T(0);
      log_prob[i] = is_response ? chunk.log_prob[i] : T(0);
      advantage[i] = is_response ? chunk.advantage[i] : T(0);
    }
    sums.response += sum_of(chunk.response, count);
    sums.log_ratio += sum_of(log_ratio, count);
    sums.log_prob += sum_of(log_prob, count);
    sums.advantage += sum_of(advantage, count);
  }
  return sums;
}

template <class T, class CovarianceKey>
void tile_keys(CovarianceKey key, const TokenInputs<T>& in, CovarianceMoments moments,
               uint64_t seed, int64_t row, int64_t begin, int64_t end,
               typename CovarianceKey::Key* keys /*[rows, cols]*/) {
  using Key = typename CovarianceKey::Key;
  Chunk<T> chunk;
  for (; begin < end; begin += kChunkTokens) {
    const int count = load_chunk(in, row, begin, end, chunk);
    Key* out = keys + begin;
    for (int i = 0; i < count; ++i) {
      // A key is computed for every token and then selected: a loop with a branch does not
      // vectorise.
      const Key made = key(chunk.token(i), moments, seed, begin + i);
      out[i] = chunk.response[i] != 0 ? made : kIneligibleKey<Key>;
    }
  }
}
