// Scratch memory of kernels, from PyTorch's caching allocator.
#pragma once

#include "../ops/checks.h"

namespace entropy_rl::cuda {

// Uninitialised device memory, `count` elements of T; belongs to the current stream.
template <class T>
class DeviceArray {
 public:
  DeviceArray(const Tensor& on_device_of, int64_t count)
      : storage_(new_tensor(on_device_of, {count * static_cast<int64_t>(sizeof(T))},
                            ScalarType::Byte)) {}
  T* data() const { return mutable_data<T>(storage_); }

 private:
  Tensor storage_;
};

}  // namespace entropy_rl::cuda
