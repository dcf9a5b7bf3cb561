// The loops of token_loss_backend.h and policy_loss.cpp (see each_simd.h). Losses and moments are
// computed with vectors: GCC makes poor code of sums of floats, and takes long for it. The loop
// over keys, which are integers, is vectorised by the compiler.

// GCC compares vectors of 64 bytes lane by lane where the result is a variable.
constexpr int kLossVectorBytes = std::min(kVectorBytes, 32);
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLossVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kWidth = kLossVectorBytes / static_cast<int>(sizeof(T));
// Vectors that together have kLanes lanes.
template <class T>
constexpr int kGroups = kLanes / kWidth<T>;

#define ENTROPY_RL_INLINE __attribute__((always_inline)) inline

template <class T>
ENTROPY_RL_INLINE Vector<T> load(const T* values) {
  Vector<T> loaded;
  memcpy(&loaded, values, sizeof(loaded));
  return loaded;
}
template <class T>
ENTROPY_RL_INLINE Vector<T> load_or(T absent, const T* values, int64_t i) {
  return values ? load(values + i) : Vector<T>{} + absent;
}
template <class T>
ENTROPY_RL_INLINE mask_t<Vector<T>> load_mask(const uint8_t* mask) {
  using Mask = mask_t<Vector<T>>;
#if defined(ENTROPY_RL_X86_SIMD)
  // Of the conversion below GCC makes one instruction a byte and more.
  if constexpr (kWidth<T> == 8) {
    return (Mask)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)mask)) != 0;
  } else if constexpr (kWidth<T> == 4 && sizeof(T) == 8) {
    return (Mask)_mm256_cvtepu8_epi64(_mm_loadu_si32(mask)) != 0;
  }
#endif
  typedef uint8_t Bytes __attribute__((vector_size(kWidth<T>)));
  Bytes bytes;
  memcpy(&bytes, mask, sizeof(bytes));
  return __builtin_convertvector(bytes, Mask) != 0;
}

// A member's sum over all lanes, in an order that does not depend on the instruction set.
template <class T, class Sums>
__attribute__((noinline)) T sum_of(const Sums* sums /*[kGroups]*/, Vector<T> Sums::* member) {
  T lanes[kLanes];
  for (int group = 0; group < kGroups<T>; ++group) {
    memcpy(lanes + group * kWidth<T>, &(sums[group].*member), sizeof(Vector<T>));
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// Calls add(inputs, count, first token) for the tokens [begin, end), with inputs that begin at
// their first one: once for all whole groups of kLanes tokens, and once for the rest, which is
// padded.
template <class T, class Add>
void for_whole_lanes(const TokenInputs<T>& in, int64_t begin, int64_t end, const Add& add) {
  const int64_t rest = (end - begin) % kLanes;
  if (end - rest > begin) add(tokens_from(in, begin), end - rest - begin, begin);
  if (rest == 0) return;
  const PaddedTokens<T> padded(in, end - rest, rest);
  add(padded.inputs, kLanes, end - rest);
}

// Sums over the tokens [begin, end), of which only the counts are not 0.
template <class T>
LossSums<T> tile_counts(const TokenInputs<T>& in, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 128;  // a byte counts no more than 255
  LossSums<T> sums{};
  for (; begin < end; begin += kBlock) {
    const uint8_t* response = in.response_mask + begin;
    const uint8_t* entropy = in.entropy_mask ? in.entropy_mask + begin : response;
    uint8_t responses = 0;
    uint8_t selected = 0;
    for (int64_t i = 0; i < std::min(kBlock, end - begin); ++i) {
      responses += response[i] != 0;
      selected += (response[i] != 0) & (entropy[i] != 0);
    }
    sums.response += responses;
    sums.selected += selected;
  }
  return sums;
}

// LossSums of each lane, without the counts.
template <class T>
struct LossLanes {
  Vector<T> loss, clipped, clipped_lower, kl, advantage, log_weight;
};

// `count` is a multiple of kLanes.
template <class T, class TokenLoss>
__attribute__((noinline)) void add_losses(const TokenLoss& token_loss, const TokenInputs<T>& in,
                                          T sequence_log_ratio, T row_scale, int64_t count,
                                          LossLanes<T>* totals /*[kGroups]*/,
                                          T* __restrict__ gradient /*[count]*/) {
  using Value = Vector<T>;
  const TokenLoss loss = token_loss;
  const Value zero{};
  LossLanes<T> sums[kGroups<T>];
  for (int group = 0; group < kGroups<T>; ++group) sums[group] = totals[group];
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    for (int group = 0; group < kGroups<T>; ++group) {
      const int64_t i = begin + group * kWidth<T>;
      LossLanes<T>& sum = sums[group];
      const mask_t<Value> response = load_mask<T>(in.response_mask + i);
      const mask_t<Value> selected =
          in.entropy_mask ? response & load_mask<T>(in.entropy_mask + i) : response;
      Token<Value> token{};
      token.log_prob = load(in.log_prob + i);
      token.old_log_prob = load_or(T(0), in.old_log_prob, i);
      token.advantage = load_or(T(0), in.advantages, i);
      token.sequence_log_ratio = zero + sequence_log_ratio;
      if (in.chosen) token.chosen = load_mask<T>(in.chosen + i);
      if constexpr (kReadsClipRatios<TokenLoss>) {
        token.clip_low = load(in.clip_low + i);
        token.clip_high = load(in.clip_high + i);
      }
      const TokenResult<Value> result = loss(token);
      const Value weight = kIsSequenceLoss<TokenLoss> ? zero + T(1) : load_or(T(1), in.weights, i);
      // Selections, because a token outside the mask may hold NaN, and 0 * NaN is NaN.
      sum.loss += selected ? result.loss * weight : zero;
      const Value unscaled = selected ? result.gradient * weight : zero;
      const Value gradients = unscaled == zero ? zero : unscaled * row_scale;  // token_gradient
      memcpy(gradient + i, &gradients, sizeof(gradients));
      sum.clipped += response ? result.clipped : zero;
      sum.clipped_lower += response ? result.clipped_lower : zero;
      sum.kl += response ? result.kl : zero;
      if constexpr (kIsSequenceLoss<TokenLoss>) {
        sum.advantage += response ? token.advantage : zero;
        if (in.weights) {
          const Value log_weight = each_lane(load(in.weights + i), log_of_weight<T>);
          sum.log_weight += response ? log_weight : zero;
        }
      }
    }
  }
  for (int group = 0; group < kGroups<T>; ++group) totals[group] = sums[group];
}

template <class T, class TokenLoss>
void tile_loss(const TokenLoss& token_loss, const TokenInputs<T>& in, int64_t row, T row_scale,
               int64_t begin, int64_t end, T* gradient /*[rows, cols]*/, LossSums<T>& tile) {
  const T sequence_log_ratio = in.sequence_log_ratio ? in.sequence_log_ratio[row] : T(0);
  LossLanes<T> sums[kGroups<T>] = {};
  for_whole_lanes(in, begin, end, [&](const TokenInputs<T>& from, int64_t count, int64_t first) {
    T padded[kLanes];
    T* out = first + count > end ? padded : gradient + first;
    add_losses(token_loss, from, sequence_log_ratio, row_scale, count, sums, out);
    if (out == padded) std::copy_n(padded, end - first, gradient + first);
  });
  using Lanes = LossLanes<T>;
  tile.loss = sum_of<T>(sums, &Lanes::loss);
  tile.clipped = sum_of<T>(sums, &Lanes::clipped);
  tile.clipped_lower = sum_of<T>(sums, &Lanes::clipped_lower);
  tile.kl = sum_of<T>(sums, &Lanes::kl);
  tile.advantage = sum_of<T>(sums, &Lanes::advantage);
  tile.log_weight = sum_of<T>(sums, &Lanes::log_weight);
}

template <class T>
void scale_row(const accumulate_t<T>* gradient /*[cols]*/, accumulate_t<T> scale, int64_t cols,
               T* out /*[cols], or the gradient itself*/) {
#pragma GCC ivdep
  for (int64_t i = 0; i < cols; ++i) store_value(token_gradient(gradient[i], scale), out + i);
}

// Moments of each lane.
template <class T>
struct MomentLanes {
  Vector<T> response, log_ratio, log_prob, advantage;
};

template <class T>
Moments<T> tile_moments(const TokenInputs<T>& in, int64_t begin, int64_t end) {
  using Value = Vector<T>;
  using Lanes = MomentLanes<T>;
  const Value zero{};
  Lanes sums[kGroups<T>] = {};
  for_whole_lanes(in, begin, end, [&](const TokenInputs<T>& from, int64_t count, int64_t) {
    for (int64_t begin = 0; begin < count; begin += kLanes) {
      for (int group = 0; group < kGroups<T>; ++group) {
        const int64_t i = begin + group * kWidth<T>;
        const mask_t<Value> response = load_mask<T>(from.response_mask + i);
        const Value log_prob = load(from.log_prob + i);
        sums[group].response += response ? zero + T(1) : zero;
        sums[group].log_ratio += response ? log_prob - load(from.old_log_prob + i) : zero;
        sums[group].log_prob += response ? log_prob : zero;
        sums[group].advantage += response ? load(from.advantages + i) : zero;
      }
    }
  });
  return {sum_of<T>(sums, &Lanes::response), sum_of<T>(sums, &Lanes::log_ratio),
          sum_of<T>(sums, &Lanes::log_prob), sum_of<T>(sums, &Lanes::advantage)};
}

// Returns the number of tokens.
template <class T>
__attribute__((noinline)) int load_chunk(const TokenInputs<T>& in, int64_t begin, int64_t end,
                                         Chunk<T>& chunk) {
  const int count = static_cast<int>(std::min<int64_t>(end - begin, kChunkTokens));
  const auto copy = [&](const auto* from, auto* to) { std::copy_n(from + begin, count, to); };
  copy(in.log_prob, chunk.log_prob);
  copy(in.old_log_prob, chunk.old_log_prob);
  copy(in.advantages, chunk.advantage);
  copy(in.response_mask, chunk.response);
  if (in.clip_low) {
    copy(in.clip_low, chunk.clip_low);
    copy(in.clip_high, chunk.clip_high);
  }
  return count;
}

// The key and the moments are passed by value, so that their constants are in registers: a load
// that may fault would keep the loop from vectorising.
template <class T, class CovarianceKey>
void tile_keys(CovarianceKey key, const TokenInputs<T>& in, CovarianceMoments moments,
               uint64_t seed, int64_t begin, int64_t end,
               typename CovarianceKey::Key* keys /*[rows, cols]*/) {
  using Key = typename CovarianceKey::Key;
  Chunk<T> chunk;
  for (; begin < end; begin += kChunkTokens) {
    const int count = load_chunk(in, begin, end, chunk);
    Key* out = keys + begin;
    for (int i = 0; i < count; ++i) {
      // A key is computed for every token and then selected: a loop with a branch does not
      // vectorise.
      const Key made = key(chunk.token(i), moments, seed, begin + i);
      out[i] = chunk.response[i] != 0 ? made : kIneligibleKey<Key>;
    }
  }
}

#undef ENTROPY_RL_INLINE
