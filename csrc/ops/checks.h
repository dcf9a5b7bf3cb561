// The argument checks that both backends share. A failed check throws std::invalid_argument, which
// PyTorch raises in Python as ValueError. The message has the argument, its value and what is
// allowed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/dtypes.h"
#include "new_tensor.h"

namespace entropy_rl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return "another dtype (code " + std::to_string(static_cast<int>(dtype)) + ")";
  }
}

// A shape as a part of a message. It is written where a check fails, because that takes longer than
// all checks of a call.
struct ShapeName {
  std::vector<int64_t> shape;
};
inline std::ostream& operator<<(std::ostream& out, const ShapeName& name) {
  out << "[";
  for (size_t i = 0; i < name.shape.size(); ++i) out << (i ? ", " : "") << name.shape[i];
  return out << "]";
}
inline ShapeName shape_name(std::vector<int64_t> shape) { return {std::move(shape)}; }

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline bool is_integer(ScalarType dtype) {
  return dtype == ScalarType::Byte || dtype == ScalarType::Char || dtype == ScalarType::Short ||
         dtype == ScalarType::Int || dtype == ScalarType::Long || dtype == ScalarType::UInt16 ||
         dtype == ScalarType::UInt32 || dtype == ScalarType::UInt64;
}

inline void check_floating(const char* name, const Tensor& tensor) {
  check(is_floating(tensor.scalar_type()), name, " is ", dtype_name(tensor.scalar_type()),
        "; it must be float32, float64, bfloat16 or float16");
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                        const char* why) {
  check(shape_of(tensor) == shape, name, " has shape ", shape_name(shape_of(tensor)),
        "; it must be ", shape_name(shape), ", ", why);
}

inline void check_same_device(const char* name, const Tensor& tensor, const char* other_name,
                              const Tensor& other) {
  const bool same = tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
                    (tensor.is_cpu() || tensor.get_device_index() == other.get_device_index());
  check(same, name, " is on another device than ", other_name,
        "; all tensors of one call must be on the same device");
}

// The choice named `value`; an error that lists the valid names if there is none.
template <class Choice, size_t count>
inline Choice parse_choice(const char* argument, const std::string& value,
                           const std::pair<const char*, Choice> (&choices)[count]) {
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    names += (names.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  check(false, argument, " is '", value, "'; it must be one of ", names);
  return choices[0].second;
}

inline Tensor as_contiguous(const Tensor& tensor, ScalarType dtype) {
  Tensor result = tensor;
  if (tensor.scalar_type() != dtype) result = to_dtype(tensor, dtype);
  return contiguous_tensor(result);
}

// Whether an argument is a number as the kernels' ops take it (library.cpp): 0-dim float64 on the
// CPU.
inline bool is_host_number(const Tensor& tensor) {
  return tensor.dim() == 0 && tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double;
}
inline double host_number(const Tensor& tensor) {
  return *static_cast<const double*>(tensor.const_data_ptr());
}

// The dtype of results and sums for inputs of this dtype.
inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls fn(T{}) with the element type of a floating dtype that check_floating has passed.
template <class Fn>
inline void dispatch_floating(ScalarType dtype, Fn fn) {
  switch (dtype) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::Double: return fn(double{});
    case ScalarType::BFloat16: return fn(BFloat16{});
    case ScalarType::Half: return fn(Half{});
    default: check(false, "dtype ", dtype_name(dtype), " is not a supported floating dtype");
  }
}

template <class T>
inline const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
inline const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}
template <class T>
inline T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// An error if a contiguous floating-point mask on the CPU holds another value than 0 and 1.
inline void check_zeros_and_ones(const char* name, const Tensor& mask) {
  dispatch_floating(mask.scalar_type(), [&](auto element) {
    const auto* values = const_data<decltype(element)>(mask);
    const int64_t count = mask.numel();
    // Counted without a branch, so that the loop vectorises.
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
      const auto value = load_value(values[i]);
      wrong += (value != 0) & (value != 1);
    }
    for (int64_t i = 0; i < count && wrong > 0; ++i) {
      const auto value = load_value(values[i]);
      check(value == 0 || value == 1, name, "[", i, "] (flat index) is ", value,
            "; a floating-point mask must hold 0 and 1 only");
    }
  });
}

// A mask of any dtype as contiguous bool: nonzero is true. Floats must be 0 or 1, since others are
// most often an additive mask, or a tensor that is no mask. On CUDA, where looking would wait for
// the device, the results become NaN instead (entropy_rl_ext/ops/_mask.py).
inline Tensor as_bool_mask(const char* name, const Tensor& mask) {
  const Tensor values = contiguous_tensor(mask);
  if (mask.scalar_type() == ScalarType::Bool) return values;
  if (mask.is_cpu() && is_floating(mask.scalar_type())) check_zeros_and_ones(name, values);
  return to_dtype(values, ScalarType::Bool);
}

}  // namespace entropy_rl
