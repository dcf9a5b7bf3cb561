#include "../policy_loss_op.h"

#include "selection.h"
#include "token_losses.h"

namespace entropy_rl::cpu {
namespace {

template <class T>
ENTROPY_RL_SIMD_CLONES Moments<T> tile_moments(const TokenInputs<T>& in, int64_t row, int64_t begin,
                                               int64_t end) {
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
ENTROPY_RL_SIMD_CLONES __attribute__((flatten)) void tile_keys(
    CovarianceKey key, const TokenInputs<T>& in, CovarianceMoments moments, uint64_t seed,
    int64_t row, int64_t begin, int64_t end, typename CovarianceKey::Key* keys) {
  using Key = typename CovarianceKey::Key;
  for (; begin < end; begin += kChunkTokens) {
    const Chunk<T> chunk(in, row, begin, end);
    for (int i = 0; i < chunk.count; ++i) {
      // Made for every token and then selected: without a branch, kl_cov's loop vectorises.
      // clip_cov's hash multiplies 64-bit words, and its loop stays scalar.
      const Key made = key(chunk.token(i), moments, seed, begin + i);
      keys[begin + i] = chunk.response[i] != 0 ? made : kIneligibleKey<Key>;
    }
  }
}

template <class T>
std::vector<Moments<T>> all_moments(const TokenInputs<T>& in) {
  std::vector<Moments<T>> sums(in.tiles());
  for_each_tile(in, [&](int64_t tile, int64_t row, int64_t begin, int64_t end) {
    sums[tile] = tile_moments(in, row, begin, end);
  });
  return sums;
}

struct PolicyLoss : TokenLosses {
  template <class T>
  static void sequence_log_ratios(const TokenInputs<T>& in, const Tensor& out) {
    const std::vector<Moments<T>> tiles = all_moments(in);
    T* sequence = mutable_data<T>(out);
    for (int64_t row = 0; row < in.rows; ++row) {
      sequence[row] =
          static_cast<T>(sequence_log_ratio(row_sum(tiles.data(), row, in.tiles_per_row())));
    }
  }

  template <class T, class CovarianceKey>
  static void choose(const CovarianceKey& key, const TokenInputs<T>& in, const Tensor& seed,
                     const Tensor& chosen) {
    const std::vector<Moments<T>> tiles = all_moments(in);
    Moments<double> batch{};
    for (const Moments<T>& tile : tiles) batch += tile;
    const CovarianceMoments moments(batch, key.ratio, CovarianceKey::kEpsilon);

    using Key = typename CovarianceKey::Key;
    const std::unique_ptr<Key[]> keys(new Key[in.rows * in.cols]);
    const uint64_t seed_value = static_cast<uint64_t>(*const_data<int64_t>(seed));
    for_each_tile(in, [&](int64_t, int64_t row, int64_t begin, int64_t end) {
      tile_keys(key, in, moments, seed_value, row, begin, end, keys.get());
    });
    top_k_mask(StoredKeys<Key>{keys.get()}, in.rows * in.cols, moments.count,
               mutable_data<uint8_t>(chosen));
  }
};

}  // namespace
}  // namespace entropy_rl::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  m.impl("policy_loss_forward",
         TORCH_BOX(&entropy_rl::policy_loss_forward<entropy_rl::cpu::PolicyLoss>));
  m.impl("policy_loss_backward",
         TORCH_BOX(&entropy_rl::loss_backward<entropy_rl::cpu::TokenLosses>));
}
