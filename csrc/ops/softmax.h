// The arguments that the ops over logits share, checked: a [..., vocab] tensor of any leading
// strides, a row mask, and a temperature that is one number or one value a row.
#pragma once

#include "../kernels/online_softmax.h"
#include "../kernels/row_layout.h"
#include "checks.h"

namespace entropy_rl {

constexpr const char* kTemperatureRange =
    "; it must be a finite number above 0 that float32 can invert, in [2^-126, 2^126]";

// One number, or one value a row.
struct Temperature {
  double number = 1.0;            // used where of_rows is absent
  std::optional<Tensor> of_rows;  // [rows], accumulate dtype

  Temperature() = default;
  // A 0-dim float64 tensor on the CPU is one number. Any other tensor is kept unchanged: the
  // caller checks its shape and dtype.
  explicit Temperature(const Tensor& temperature) {
    if (!is_host_number(temperature)) {
      of_rows = temperature;
      return;
    }
    number = host_number(temperature);
    check(is_temperature(number), "temperature is ", number, kTemperatureRange);
  }
};

struct LogitsRows {
  Tensor logits;  // [..., vocab], last dimension contiguous
  std::vector<int64_t> row_shape;
  int64_t rows = 0;
  int64_t vocab = 0;
  RowLayout layout;
  std::optional<Tensor> mask;  // [rows] bool
  Temperature temperature;

  LogitsRows(const Tensor& logits_in, const std::optional<Tensor>& mask_in,
             const Tensor& temperature_in)
      : logits(logits_in) {
    check_floating("logits", logits);
    check(logits.dim() >= 1, "logits has no dimension; it must be [..., vocab]");
    row_shape = shape_of(logits);
    vocab = row_shape.back();
    row_shape.pop_back();
    check(vocab >= 1, "logits has shape ", shape_name(shape_of(logits)),
          "; the vocabulary (its last dimension) must hold at least one entry");
    check(vocab < (int64_t{1} << 31), "logits has shape ", shape_name(shape_of(logits)),
          "; the vocabulary (its last dimension) must be below 2^31");
    rows = logits.numel() / vocab;
    if (mask_in) {
      check_shape("mask", *mask_in, row_shape, "one value for each row of logits");
      check_same_device("mask", *mask_in, "logits", logits);
      mask = as_bool_mask("mask", *mask_in);
    }
    temperature = Temperature(temperature_in);
    if (temperature.of_rows) {
      check_floating("temperature", temperature_in);
      temperature.of_rows = row_values("temperature", temperature_in, accumulate_dtype());
    }
    set_layout();
  }

  // The shape of a per-row tensor with `columns` values a row.
  std::vector<int64_t> row_shape_with(int64_t columns) const {
    std::vector<int64_t> shape = row_shape;
    shape.push_back(columns);
    return shape;
  }

  // A per-row value (target, gradient) as contiguous [rows].
  Tensor row_values(const char* name, const Tensor& values, ScalarType dtype) const {
    check_shape(name, values, row_shape, "one value for each row of logits");
    check_same_device(name, values, "logits", logits);
    return as_contiguous(values, dtype);
  }

  Tensor targets(const Tensor& targets_in) const {
    check(is_integer(targets_in.scalar_type()), "targets is ", dtype_name(targets_in.scalar_type()),
          "; it must be an integer dtype");
    return row_values("targets", targets_in, ScalarType::Long);
  }

  // The dtype of sums and of results.
  ScalarType accumulate_dtype() const { return entropy_rl::accumulate_dtype(logits.scalar_type()); }

  Tensor new_row_tensor() const { return new_tensor(logits, row_shape, accumulate_dtype()); }

  // [..., vocab], contiguous.
  Tensor new_grad_logits() const { return new_tensor(logits, row_shape_with(vocab)); }

  // What the backward needs of each row beside the logits: its maximum, and its log sum.
  Tensor new_max_log_sum() const {
    return new_tensor(logits, row_shape_with(2), accumulate_dtype());
  }

 private:
  void set_layout() {
    if (vocab > 1 && logits.stride(logits.dim() - 1) != 1) logits = contiguous_tensor(logits);
    if (!merge_dimensions()) {
      logits = contiguous_tensor(logits);
      merge_dimensions();
    }
  }

  // Merges neighbouring leading dimensions that one stride describes; false if too many are left.
  bool merge_dimensions() {
    RowLayout merged;
    int dims = 0;
    for (int64_t i = logits.dim() - 2; i >= 0; --i) {
      const int64_t size = logits.size(i);
      const int64_t stride = logits.stride(i);
      if (size == 1) continue;
      if (dims > 0 && stride == merged.size[dims - 1] * merged.stride[dims - 1]) {
        merged.size[dims - 1] *= size;
        continue;
      }
      if (dims == RowLayout::kMaxDims) return false;
      merged.size[dims] = size;
      merged.stride[dims] = stride;
      ++dims;
    }
    layout = merged;
    return true;
  }
};

}  // namespace entropy_rl
