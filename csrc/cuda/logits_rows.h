// token_entropy and logprob_entropy on the device: from checked arguments to a kernel's, and the
// launch.
#pragma once

#include "../kernels/softmax_rows.cuh"
#include "../ops/logprob_entropy.h"
#include "device_array.h"
#include "launch.h"
#include "tuning.h"

namespace entropy_rl::cuda {

// Kernels names an op's kernels: forward<T>() gives one, backward(launch, in, parts, gradients,
// grad_logits) launches one.
template <class Kernels>
struct SoftmaxLaunch {
  // Looking at device values would wait for the device: the kernels answer with NaN instead.
  static void check_values(const LogitsRows&, const std::optional<Tensor>&) {}

  static void forward(const LogitsRows& in, const RowOutputs& out) {
    const DeviceScope device(in.logits);
    dispatch_floating(in.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using Acc = accumulate_t<T>;
      const SoftmaxRows<T> rows = arguments<T>(in, out.targets);
      const SoftmaxOutputs<Acc> outputs = {
          out.log_prob ? mutable_data<Acc>(*out.log_prob) : nullptr, mutable_data<Acc>(out.entropy),
          mutable_data<Acc>(out.statistics)};
      const int threads = softmax_row_threads(in.vocab);
      const int parts = row_parts<T>(rows.vocab, threads).count;
      if (parts == 1 || in.rows >= kWholeRowsFrom) {
        Kernels::template forward<T>()<<<grid_size(in.rows), threads, 0, device.stream()>>>(
            rows, outputs);
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
      const int threads = softmax_row_threads(in.vocab);
      const int parts =
          backward_row_parts(in.rows, row_parts<T>(static_cast<int>(in.vocab), threads).count);
      const auto launch = [&](auto kernel, auto... values) {
        kernel<<<grid_size(in.rows * parts), threads, 0, device.stream()>>>(
            arguments<T>(in, gradients.targets), parts, values..., mutable_data<T>(grad_logits));
      };
      Kernels::template backward<T>(launch, gradients);
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
            static_cast<Acc>(in.temperature),
            const_data<Acc>(in.row_temperature),
            const_data<int64_t>(targets)};
  }
};

}  // namespace entropy_rl::cuda
