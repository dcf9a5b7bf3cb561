#include "../kernels/linear_logprob_entropy.cuh"

#include "../ops/linear_logprob_entropy.h"
#include "launch.h"
#include "tuning.h"

namespace entropy_rl::cuda {
namespace {

struct Tiles {
  static void forward(const TileArguments& in, bool token_statistics, const Tensor& state) {
    const DeviceScope device(in.tile);
    dispatch_floating(in.dtype, [&](auto element) {
      using Acc = accumulate_t<decltype(element)>;
      const auto kernel = token_statistics ? linear_logprob_entropy_tile_kernel<Acc, true>
                                           : linear_logprob_entropy_tile_kernel<Acc, false>;
      kernel<<<grid_size(in.rows), head_tile_threads(in.width), 0, device.stream()>>>(
          arguments<Acc>(in), mutable_data<VocabState>(state));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  static void backward(const TileArguments& in, const TileGradients& gradients,
                       const Tensor& gradient) {
    const DeviceScope device(in.tile);
    dispatch_tile_gradient(in.dtype, gradient.scalar_type(), [&](auto element, auto out_element) {
      using Acc = decltype(element);
      using Out = decltype(out_element);
      linear_logprob_entropy_tile_backward_kernel<Acc, Out>
          <<<grid_size(in.rows), head_tile_threads(in.width), 0, device.stream()>>>(
              arguments<Acc>(in), const_data<Acc>(gradients.grad_log_prob),
              const_data<Acc>(gradients.grad_entropy), const_data<Acc>(gradients.entropy),
              const_data<Acc>(gradients.max_log_sum), mutable_data<Out>(gradient),
              gradient.stride(0));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  template <class Acc>
  static LogitTile<Acc> arguments(const TileArguments& in) {
    return {const_data<Acc>(in.tile),
            in.tile.stride(0),
            in.rows,
            static_cast<int>(in.width),
            in.vocab_start,
            const_data<int64_t>(in.targets),
            static_cast<Acc>(in.temperature.number),
            const_data<Acc>(in.temperature.of_rows),
            in.transform<Acc>()};
  }
};

}  // namespace
}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  using entropy_rl::cuda::Tiles;
  m.impl("linear_logprob_entropy_tile_forward",
         TORCH_BOX(&entropy_rl::linear_logprob_entropy_tile_forward<Tiles>));
  m.impl("linear_logprob_entropy_tile_backward",
         TORCH_BOX(&entropy_rl::linear_logprob_entropy_tile_backward<Tiles>));
}
