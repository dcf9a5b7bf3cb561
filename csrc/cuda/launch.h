// What every launch needs: the tensor's device, the current stream, and an error check.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../ops/checks.h"

namespace entropy_rl::cuda {

// Makes the tensor's device current for the scope and names its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Blocks for `count` pieces of work that a kernel takes in a grid-stride loop: the x dimension
// holds up to 2^31 - 1 blocks.
inline unsigned grid_size(int64_t count) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  return static_cast<unsigned>(count < kMaxBlocks ? count : kMaxBlocks);
}

}  // namespace entropy_rl::cuda
