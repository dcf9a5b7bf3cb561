// token_entropy and logprob_entropy on the device: from checked arguments to a kernel's, and the
// launch.
#pragma once

#include "../kernels/softmax_rows.cuh"
#include "../logits_op.h"
#include "launch.h"
#include "tuning.h"

namespace entropy_rl::cuda {

// Kernels names an op's kernels: forward(in, out) and backward(in, gradients, grad_logits) launch
// them.
template <class Kernels>
struct SoftmaxLaunch {
  // Looking at device values would wait for the device: the kernels answer with NaN instead.
  static void check_values(const LogitsRows&, const std::optional<Tensor>&) {}

  static void forward(const LogitsRows& in, const RowOutputs& out) {
    const DeviceScope device(in.logits);
    dispatch_floating(in.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Kernels::forward(Launch{in, device.stream()}, arguments<T>(in, out.targets), out);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  static void backward(const LogitsRows& in, const RowGradients& gradients,
                       const Tensor& grad_logits) {
    const DeviceScope device(in.logits);
    dispatch_floating(in.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Kernels::backward(Launch{in, device.stream()}, arguments<T>(in, gradients.targets), gradients,
                        mutable_data<T>(grad_logits));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  // Starts a kernel with one block a row.
  struct Launch {
    const LogitsRows& in;
    cudaStream_t stream;

    template <class... Parameters, class... Arguments>
    void operator()(void (*kernel)(Parameters...), Arguments... arguments) const {
      kernel<<<grid_size(in.rows), softmax_row_threads(in.vocab), 0, stream>>>(arguments...);
    }
  };

 private:
  template <class T>
  static SoftmaxRows<T> arguments(const LogitsRows& in, const std::optional<Tensor>& targets) {
    using Acc = accumulate_t<T>;
    return {const_data<T>(in.logits),
            in.layout,
            in.rows,
            static_cast<int>(in.vocab),
            const_data<bool>(in.mask),
            static_cast<Acc>(in.temperature),
            const_data<Acc>(in.row_temperature),
            const_data<int64_t>(targets)};
  }
};

}  // namespace entropy_rl::cuda
