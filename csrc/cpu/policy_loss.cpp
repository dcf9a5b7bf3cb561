#include "../ops/policy_loss.h"

#include "radix_select.h"
#include "token_loss_backend.h"

namespace entropy_rl::cpu {
namespace {

template <class T>
Moments<T> tile_moments(const TokenInputs<T>& in, int64_t begin, int64_t end) {
  ENTROPY_RL_SIMD_CALL(tile_moments(in, begin, end));
}

template <class T, class CovarianceKey>
void tile_keys(const CovarianceKey& key, const TokenInputs<T>& in, const CovarianceMoments& moments,
               uint64_t seed, int64_t begin, int64_t end, typename CovarianceKey::Key* keys) {
  ENTROPY_RL_SIMD_CALL(tile_keys(key, in, moments, seed, begin, end, keys));
}

template <class T>
std::vector<Moments<T>> all_moments(const TokenInputs<T>& in) {
  std::vector<Moments<T>> sums(in.tiles());
  for_each_tile(in, [&](int64_t tile, int64_t, int64_t begin, int64_t end) {
    sums[tile] = tile_moments(in, begin, end);
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
    for_each_tile(in, [&](int64_t, int64_t, int64_t begin, int64_t end) {
      tile_keys(key, in, moments, seed_value, begin, end, keys.get());
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
