// What every launch needs: the tensor's device and its current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../ops/checks.h"

namespace entropy_rl::cuda {

// Makes the tensor's device current while it lives, and has that device's current stream.
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

// A block for each of `count` pieces of work. The x dimension holds up to 2^31 - 1 blocks: a kernel
// whose count may be larger has a grid-stride loop.
inline unsigned grid_size(int64_t count) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  return static_cast<unsigned>(count < kMaxBlocks ? count : kMaxBlocks);
}

}  // namespace entropy_rl::cuda
