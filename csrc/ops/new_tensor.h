// PyTorch's functions that make tensors. Where one fails, most often for lack of memory, the error
// has PyTorch's own message, by which callers recognise it. PyTorch before 2.13 does not give it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <vector>

// Null under a PyTorch that has no such function.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace entropy_rl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// make(), which calls torch once. torch's C interface reports a failure without its message.
template <class Make>
inline Tensor with_torch_message(Make make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    if (!torch_exception_get_what_without_backtrace) throw;
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return with_torch_message([&] { return torch::stable::new_empty(like, shape, dtype); });
}
inline Tensor new_zero_tensor(const Tensor& like, const std::vector<int64_t>& shape,
                              ScalarType dtype) {
  return with_torch_message([&] { return torch::stable::new_zeros(like, shape, dtype); });
}
inline Tensor contiguous_tensor(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return with_torch_message([&] { return torch::stable::contiguous(tensor); });
}
inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  return with_torch_message([&] { return torch::stable::to(tensor, dtype); });
}

}  // namespace entropy_rl
