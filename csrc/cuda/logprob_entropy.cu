#include "../kernels/logprob_entropy.cuh"

#include "../ops/logprob_entropy.h"
#include "device_array.h"
#include "launch.h"
#include "tuning.h"

namespace entropy_rl::cuda {
namespace {

struct LogprobEntropy {
  // Reading device values would wait for the device; the kernels give NaN for bad ones instead.
  static void check_values(const LogitsRows&, const std::optional<Tensor>&) {}

  static void forward(const LogitsRows& in, const RowOutputs& out) {
    const DeviceScope device(in.logits);
    dispatch_floating(in.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using Acc = accumulate_t<T>;
      const SoftmaxRows<T> rows = arguments<T>(in, out.targets);
      const SoftmaxOutputs<Acc> outputs = {out.targets ? mutable_data<Acc>(out.log_prob) : nullptr,
                                           mutable_data<Acc>(out.entropy),
                                           mutable_data<Acc>(out.max_log_sum)};
      const int threads = softmax_row_threads(in.vocab);
      const int parts = row_parts<T>(rows.vocab, threads).count;
      if (parts == 1 || in.rows >= kWholeRowsFrom) {
        logprob_entropy_kernel<T>
            <<<grid_size(in.rows), threads, 0, device.stream()>>>(rows, outputs);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        return;
      }
      const DeviceArray<OnlineSoftmax<Acc>> states(in.logits, in.rows * parts);
      softmax_parts_kernel<T>
          <<<grid_size(in.rows * parts), threads, 0, device.stream()>>>(rows, states.data());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      softmax_merge_kernel<T><<<grid_size(in.rows), kWarpSize, 0, device.stream()>>>(
          rows, states.data(), parts, outputs);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  static Tensor backward(const LogitsRows& in, const RowGradients& gradients) {
    const DeviceScope device(in.logits);
    const Tensor grad_logits = in.new_grad_logits();
    dispatch_floating(in.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using Acc = accumulate_t<T>;
      const int threads = softmax_row_threads(in.vocab);
      const int parts = backward_row_parts(
          in.rows, row_packs<T>(static_cast<int>(in.vocab)) / round_packs<T>(threads));
      logprob_entropy_backward_kernel<T>
          <<<grid_size(in.rows * parts), threads, 0, device.stream()>>>(
              arguments<T>(in, gradients.targets), parts, const_data<Acc>(gradients.grad_log_prob),
              const_data<Acc>(gradients.grad_entropy), const_data<Acc>(gradients.entropy),
              const_data<Acc>(gradients.max_log_sum), mutable_data<T>(grad_logits));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return grad_logits;
  }

 private:
  template <class T>
  static SoftmaxRows<T> arguments(const LogitsRows& in, const std::optional<Tensor>& targets) {
    using Acc = accumulate_t<T>;
    return {const_data<T>(in.logits),
            in.layout,
            in.rows,
            static_cast<int>(in.vocab),
            const_data<bool>(in.mask),
            static_cast<Acc>(in.temperature.number),
            const_data<Acc>(in.temperature.of_rows),
            const_data<int64_t>(targets)};
  }
};

}  // namespace
}  // namespace entropy_rl::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CUDA, m) {
  using entropy_rl::cuda::LogprobEntropy;
  m.impl("logprob_entropy_forward",
         TORCH_BOX(&entropy_rl::logprob_entropy_forward<LogprobEntropy>));
  m.impl("logprob_entropy_backward",
         TORCH_BOX(&entropy_rl::logprob_entropy_backward<LogprobEntropy>));
}
