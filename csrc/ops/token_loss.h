// What the loss ops share: the checks of arguments, the tensors that a kernel reads and writes, and
// the backward. A backend has
//
//   // Writes all outputs of a token loss.
//   template <class T, class TokenLoss>
//   static void run(const TokenLoss&, const TokenInputs<T>&, const Normalization&,
//                   const LossOutputs&);
//   // Writes T [rows, cols]: the backward.
//   template <class T>
//   static void scale(const LossGradient&, const Tensor& out);
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>

#include "../kernels/token_loss_math.h"
#include "checks.h"

namespace entropy_rl {

// Both return `value`, checked.
inline double at_least_zero(const char* name, double value) {
  check(std::isfinite(value) && value >= 0, name, " is ", value,
        "; it must be a finite number, 0 or above");
  return value;
}
inline double above(double bound, const char* name, double value) {
  check(std::isfinite(value) && value > bound, name, " is ", value,
        "; it must be a finite number above ", bound);
  return value;
}

inline void check_rows(const char* name, const Tensor& values) {
  check(values.dim() == 1 || values.dim() == 2, name, " has shape ", shape_name(shape_of(values)),
        "; it must be [rows, tokens], or [tokens] for one row");
}

template <class Fn>
void dispatch_accumulate(ScalarType dtype, Fn fn) {
  dtype == ScalarType::Double ? fn(double{}) : fn(float{});
}

// The inputs of a call: [rows, cols], or [cols] for one row. 16-bit tensors are converted to
// float32 here, since in practice log-probs are float32 already.
struct TokenTensors {
  int64_t rows = 0;
  int64_t cols = 0;
  ScalarType dtype;  // float32 or float64
  Tensor values;
  Tensor response_mask;
  std::optional<Tensor> old_log_prob;
  std::optional<Tensor> advantages;
  std::optional<Tensor> weights;
  std::optional<Tensor> entropy_mask;
  std::optional<Tensor> clip_low;
  std::optional<Tensor> clip_high;

  TokenTensors(const char* values_name, const Tensor& values_in, const char* mask_name,
               const Tensor& mask)
      : dtype(accumulate_dtype(values_in.scalar_type())),
        values(values_in),
        response_mask(mask),
        name_(values_name) {
    check_floating(name_, values);
    check_rows(name_, values);
    cols = values.size(values.dim() - 1);
    rows = values.dim() == 2 ? values.size(0) : 1;
    response_mask = mask_of(mask_name, mask);
    values = as_contiguous(values_in, dtype);
  }

  Tensor floats_of(const char* name, const Tensor& tensor) const {
    check_floating(name, tensor);
    check_fits(name, tensor);
    return as_contiguous(tensor, dtype);
  }
  // Clip ratios of each token. On CUDA, where looking would wait for the device, the loss answers a
  // wrong one with NaN.
  Tensor clip_ratios_of(const char* name, const Tensor& tensor) const {
    const Tensor ratios = floats_of(name, tensor);
    if (ratios.is_cpu()) {
      dispatch_accumulate(
          dtype, [&](auto element) { check_clip_ratios<decltype(element)>(name, ratios); });
    }
    return ratios;
  }
  // One number for all tokens.
  Tensor filled(double value) const {
    Tensor out = new_tensor(values, shape_of(values), dtype);
    torch::stable::fill_(out, value);
    return out;
  }
  Tensor mask_of(const char* name, const Tensor& mask) const {
    check_fits(name, mask);
    return as_bool_mask(name, mask);
  }

  // What the caller calls `values`.
  const char* name() const { return name_; }

  template <class T>
  TokenInputs<T> inputs() const {
    return {const_data<T>(values),
            const_data<T>(old_log_prob),
            const_data<T>(advantages),
            const_data<T>(weights),
            const_data<uint8_t>(response_mask),
            const_data<uint8_t>(entropy_mask),
            nullptr,
            nullptr,
            const_data<T>(clip_low),
            const_data<T>(clip_high),
            rows,
            cols};
  }

 private:
  template <class T>
  void check_clip_ratios(const char* name, const Tensor& ratios) const {
    const T* values = const_data<T>(ratios);
    const uint8_t* inside = const_data<uint8_t>(response_mask);
    const auto wrong = [&](int64_t i) {
      const bool fits = (values[i] >= 0) & (values[i] <= std::numeric_limits<T>::max());
      return (inside[i] != 0) & !fits;
    };
    const int64_t count = rows * cols;
    // Counted without a branch, so that the loop vectorises.
    int32_t found = 0;
    for (int64_t i = 0; i < count; ++i) found |= wrong(i);
    for (int64_t i = 0; i < count && found; ++i) {
      check(!wrong(i), name, "[", i, "] (flat index) is ", values[i],
            "; it must be a finite number, 0 or above");
    }
  }

  void check_fits(const char* name, const Tensor& tensor) const {
    const std::string why = std::string("the shape of ") + name_;
    check_shape(name, tensor, shape_of(values), why.c_str());
    check_same_device(name, tensor, name_, values);
  }

  const char* name_;
};

// The four outputs of every loss op.
struct LossOutputs {
  Tensor loss;       // []
  Tensor metrics;    // [kMetrics]
  Tensor gradient;   // the shape of values; times row_scale, d loss / d values
  Tensor row_scale;  // [rows]

  explicit LossOutputs(const TokenTensors& in)
      : loss(new_tensor(in.values, {}, in.dtype)),
        metrics(new_tensor(in.values, {kMetrics}, in.dtype)),
        gradient(new_tensor(in.values, shape_of(in.values), in.dtype)),
        row_scale(new_tensor(in.values, {in.rows}, in.dtype)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {loss, metrics, gradient, row_scale};
  }
};

// The caller's arguments on how a loss is averaged.
struct AggregationArguments {
  std::string loss_agg_mode;
  std::string normalize;
  int64_t dp_size;
  std::optional<Tensor> batch_num_tokens;   // one number
  std::optional<Tensor> global_batch_size;  // one number
  std::optional<double> loss_scale_factor;
};

inline Aggregation parse_aggregation(const std::string& name) {
  return parse_choice<Aggregation>("loss_agg_mode", name,
                                   {{"token-mean", Aggregation::kTokenMean},
                                    {"token-sum", Aggregation::kTokenSum},
                                    {"seq-mean-token-sum", Aggregation::kSeqMeanTokenSum},
                                    {"seq-mean-token-sum-norm", Aggregation::kSeqMeanTokenSumNorm},
                                    {"seq-mean-token-mean", Aggregation::kSeqMeanTokenMean}});
}

// Normalization, and the tensor that its pointer points to.
struct CheckedNormalization : Normalization {
  std::optional<Tensor> divisor;

  CheckedNormalization(const AggregationArguments& in, const TokenTensors& tokens) {
    aggregation = parse_aggregation(in.loss_agg_mode);
    by_response =
        parse_choice<bool>("normalize", in.normalize, {{"selected", false}, {"response", true}});
    check(in.dp_size >= 1, "dp_size is ", in.dp_size, "; it must be 1 or above");
    dp_size = static_cast<double>(in.dp_size);
    scale_factor = above(
        0, "loss_scale_factor",
        in.loss_scale_factor.value_or(static_cast<double>(std::max<int64_t>(tokens.cols, 1))));
    if (aggregation == Aggregation::kTokenMean) {
      set_divisor("batch_num_tokens", in.batch_num_tokens, in, tokens);
    } else if (aggregation != Aggregation::kTokenSum) {
      set_divisor("global_batch_size", in.global_batch_size, in, tokens);
    }
  }

 private:
  void set_divisor(const char* name, const std::optional<Tensor>& tensor,
                   const AggregationArguments& in, const TokenTensors& tokens) {
    check(tensor.has_value() || in.dp_size == 1, name, " is None and dp_size is ", in.dp_size, "; ",
          in.loss_agg_mode, " over several ranks needs it");
    if (!tensor) return;
    check(tensor->numel() == 1, name, " has shape ", shape_name(shape_of(*tensor)),
          "; it must be one number");
    check_same_device(name, *tensor, tokens.name(), tokens.values);
    divisor = as_contiguous(*tensor, ScalarType::Double);
    given_divisor = const_data<double>(*divisor);
    // On CUDA, where looking would wait for the device, sum_loss answers with NaN.
    if (tensor->is_cpu()) {
      check(!(*given_divisor < 0), name, " is ", *given_divisor, "; it must be 0 or above");
    }
  }
};

// The factors that the backward of every loss op multiplies, in the accumulate dtype.
struct LossGradient {
  int64_t rows;
  int64_t cols;
  Tensor grad_loss;  // []
  Tensor gradient;   // [rows, cols]
  Tensor row_scale;  // [rows]
};

template <class Backend>
Tensor loss_backward(const Tensor& grad_loss, const Tensor& gradient, const Tensor& row_scale,
                     const Tensor& values) {
  check_floating("values", values);
  check_rows("values", values);
  const int64_t cols = values.size(values.dim() - 1);
  const int64_t rows = values.dim() == 2 ? values.size(0) : 1;
  const ScalarType dtype = accumulate_dtype(values.scalar_type());
  const auto input = [&](const char* name, const Tensor& tensor, std::vector<int64_t> shape) {
    check_floating(name, tensor);
    check_shape(name, tensor, shape, "as values and the forward make it");
    check_same_device(name, tensor, "values", values);
    return as_contiguous(tensor, dtype);
  };
  const LossGradient in{rows, cols, input("grad_loss", grad_loss, {}),
                        input("gradient", gradient, shape_of(values)),
                        input("row_scale", row_scale, {rows})};
  Tensor out = new_tensor(values, shape_of(values));
  dispatch_floating(values.scalar_type(),
                    [&](auto element) { Backend::template scale<decltype(element)>(in, out); });
  return out;
}

using LossTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

}  // namespace entropy_rl
