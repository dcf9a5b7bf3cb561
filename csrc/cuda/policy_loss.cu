#include "../kernels/policy_loss.cuh"

#include "../policy_loss_arguments.h"
#include "launch.h"
#include "selection.h"
#include "tuning.h"

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

struct PolicyLossBackend {
  template <class T, class TokenLoss>
  static void run(const TokenLoss& token_loss, const TokenInputs<T>& in,
                  const Normalization& normalization, const LossOutputs& out) {
    const DeviceScope device(out.loss);
    std::optional<DeviceArray<Moments<T>>> moments;
    if (kNeedsSequenceRatio<TokenLoss>) moments = tile_moments(in, out.loss, device.stream());
    const DeviceArray<LossSums<T>> sums(out.loss, in.tiles());
    if (in.tiles() > 0) {
      policy_loss_kernel<T, TokenLoss>
          <<<grid_size(in.tiles()), kLossTileThreads, 0, device.stream()>>>(
              token_loss, in, moments ? moments->data() : nullptr, mutable_data<T>(out.gradient),
              sums.data());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    // One block: it also writes the zeros of a batch without tokens.
    finish_loss_kernel<T, TokenLoss><<<1, kLossRowThreads, 0, device.stream()>>>(
        sums.data(), in.rows, in.tiles_per_row(), normalization, mutable_data<T>(out.loss),
        mutable_data<T>(out.metrics), mutable_data<T>(out.row_scale));
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
    covariance_moments_kernel<T><<<1, kLossRowThreads, 0, device.stream()>>>(
        key, moments.data(), in.tiles(), batch.data());
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
  using Backend = entropy_rl::cuda::PolicyLossBackend;
  m.impl("policy_loss_forward", TORCH_BOX(&entropy_rl::policy_loss_forward<Backend>));
  m.impl("kl_loss_forward", TORCH_BOX(&entropy_rl::kl_loss_forward<Backend>));
  m.impl("aggregate_forward", TORCH_BOX(&entropy_rl::aggregate_forward<Backend>));
}
