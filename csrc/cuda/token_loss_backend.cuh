// Token losses on the device: a pass over the tokens, and one block that adds up the tiles.
#pragma once

#include "../kernels/token_loss.cuh"
#include "../ops/token_loss.h"
#include "device_array.h"
#include "launch.h"
#include "tuning.h"

namespace entropy_rl::cuda {

struct TokenLosses {
  template <class T, class TokenLoss>
  static void run(const TokenLoss& token_loss, const TokenInputs<T>& in,
                  const Normalization& normalization, const LossOutputs& out) {
    const DeviceScope device(out.loss);
    const DeviceArray<LossSums<T>> sums(out.loss, in.tiles());
    if (in.tiles() > 0) {
      token_loss_kernel<T, TokenLoss>
          <<<grid_size(in.tiles()), kLossTileThreads, 0, device.stream()>>>(
              token_loss, in, mutable_data<T>(out.gradient), sums.data());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    // Also writes the zeros of a batch without tokens.
    finish_loss_kernel<T, kIsSequenceLoss<TokenLoss>><<<1, kLossRowThreads, 0, device.stream()>>>(
        sums.data(), in.rows, in.tiles_per_row(), normalization, mutable_data<T>(out.loss),
        mutable_data<T>(out.metrics), mutable_data<T>(out.row_scale));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T>
  static void scale(const LossGradient& in, const Tensor& out) {
    using Acc = accumulate_t<T>;
    const int64_t tiles = in.rows * ((in.cols + kTileTokens - 1) / kTileTokens);
    if (tiles == 0) return;
    const DeviceScope device(out);
    scale_rows_kernel<T><<<grid_size(tiles), kLossTileThreads, 0, device.stream()>>>(
        const_data<Acc>(in.grad_loss), const_data<Acc>(in.gradient), const_data<Acc>(in.row_scale),
        in.rows, in.cols, mutable_data<T>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace entropy_rl::cuda
