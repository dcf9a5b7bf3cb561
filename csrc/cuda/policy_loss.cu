#include "../kernels/policy_loss.cuh"

#include "../ops/policy_loss.h"
#include "token_loss_backend.cuh"
#include "top_k_mask.h"

namespace entropy_rl::cuda {
namespace {

template <class T>
DeviceArray<Moments<T>> tile_moments(const TokenInputs<T>& in, const Tensor& on_device_of,
                                     cudaStream_t stream) {
  DeviceArray<Moments<T>> moments(on_device_of, in.tiles());
  if (in.tiles() == 0) return moments;
  moments_kernel<T><<<grid_size(in.tiles()), kLossTileThreads, 0, stream>>>(in, moments.data());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return moments;
}

struct PolicyLoss : TokenLosses {
  template <class T>
  static void sequence_log_ratios(const TokenInputs<T>& in, const Tensor& out) {
    if (in.rows == 0) return;
    const DeviceScope device(out);
    const DeviceArray<Moments<T>> moments = tile_moments(in, out, device.stream());
    const int64_t rows_per_block = kLossTileThreads / lanes_per_row(in.tiles_per_row());
    const int64_t blocks = (in.rows + rows_per_block - 1) / rows_per_block;
    sequence_log_ratio_kernel<T><<<grid_size(blocks), kLossTileThreads, 0, device.stream()>>>(
        moments.data(), in.rows, in.tiles_per_row(), mutable_data<T>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T, class CovarianceKey>
  static void choose(const CovarianceKey& key, const TokenInputs<T>& in, const Tensor& seed,
                     const Tensor& chosen) {
    using Key = typename CovarianceKey::Key;
    if (in.tiles() == 0) return;
    const DeviceScope device(chosen);
    const DeviceArray<Moments<T>> moments = tile_moments(in, chosen, device.stream());
    const DeviceArray<CovarianceMoments> batch(chosen, 1);
    covariance_moments_kernel<T>
        <<<1, kLossRowThreads, 0, device.stream()>>>(key, moments.data(), in.tiles(), batch.data());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const DeviceArray<Key> keys(chosen, in.rows * in.cols);
    covariance_keys_kernel<T><<<grid_size(in.tiles()), kLossTileThreads, 0, device.stream()>>>(
        key, in, batch.data(), const_data<int64_t>(seed), keys.data());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    top_k_mask(keys.data(), in.rows * in.cols, &batch.data()->count, mutable_data<uint8_t>(chosen),
               chosen, device.stream());
  }
};

}  // namespace
}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  m.impl("policy_loss_forward",
         TORCH_BOX(&entropy_rl::policy_loss_forward<entropy_rl::cuda::PolicyLoss>));
  m.impl("policy_loss_backward",
         TORCH_BOX(&entropy_rl::loss_backward<entropy_rl::cuda::TokenLosses>));
}
