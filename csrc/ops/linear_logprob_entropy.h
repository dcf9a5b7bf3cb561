// The two tile ops of linear_logprob_entropy over a backend, which has
//   static void forward(const TileArguments&, bool token_statistics, const Tensor& state);
//   static void backward(const TileArguments&, const TileGradients&, const Tensor& gradient);
// The GEMMs and the loop over tiles are in entropy_rl_ext/ops/linear_logprob_entropy.py.
#pragma once

#include "../kernels/linear_logprob_entropy_math.h"
#include "softmax.h"

namespace entropy_rl {

struct TileArguments {
  Tensor tile;  // [rows, width] float32 or float64, last dimension contiguous
  int64_t rows;
  int64_t width;
  ScalarType dtype;
  int64_t vocab_start;
  Tensor targets;  // [rows] int64
  Temperature temperature;
  std::optional<Tensor> bias;  // [width]
  double logit_scale;
  double softcap;  // 0: none

  TileArguments(const Tensor& tile_in, const Tensor& targets_in, const Tensor& temperature_in,
                const std::optional<Tensor>& bias_in, int64_t vocab_start, double logit_scale,
                double softcap)
      : tile(tile_in),
        dtype(tile_in.scalar_type()),
        vocab_start(vocab_start),
        targets(targets_in),
        logit_scale(logit_scale),
        softcap(softcap) {
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, "tile is ", dtype_name(dtype),
          "; it must be float32 or float64");
    check(tile.dim() == 2, "tile has shape ", shape_name(shape_of(tile)),
          "; it must be [rows, width]");
    rows = tile.size(0);
    width = tile.size(1);
    check(rows < (int64_t{1} << 31) && width < (int64_t{1} << 31), "tile has shape ",
          shape_name(shape_of(tile)), "; both sizes must be below 2^31");
    check_rows_contiguous("tile", tile);
    check(vocab_start >= 0, "vocab_start is ", vocab_start, "; it must be 0 or above");
    check(targets.scalar_type() == ScalarType::Long, "targets is ",
          dtype_name(targets.scalar_type()), "; it must be int64");
    targets = row_values("targets", targets_in, {rows}, ScalarType::Long);
    temperature = Temperature(temperature_in);
    if (temperature.of_rows) {
      temperature.of_rows = row_values("temperature", temperature_in, {rows}, dtype);
    }
    if (bias_in) bias = row_values("bias", *bias_in, {width}, dtype);
    check(std::isfinite(logit_scale) && logit_scale > 0, "logit_scale is ", logit_scale,
          "; it must be a finite number above 0");
    check(std::isfinite(softcap) && softcap >= 0, "softcap is ", softcap,
          "; it must be a finite number above 0, or 0 for none");
  }

  // Checks one value for each row (or column), and makes it contiguous and of dtype `of`.
  Tensor row_values(const char* name, const Tensor& values, const std::vector<int64_t>& shape,
                    ScalarType of) const {
    check_shape(name, values, shape, "one value for each row (bias: column) of the tile");
    check_same_device(name, values, "tile", tile);
    return as_contiguous(values, of);
  }

  static void check_rows_contiguous(const char* name, const Tensor& tensor) {
    check(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, " has stride ", tensor.stride(1),
          " in its last dimension; it must be 1");
  }

  template <class Acc>
  LogitTransform<Acc> transform() const {
    return {const_data<Acc>(bias), static_cast<Acc>(logit_scale), static_cast<Acc>(softcap)};
  }
};

struct TileGradients {
  std::optional<Tensor> grad_log_prob;  // [rows]
  std::optional<Tensor> grad_entropy;   // [rows]
  Tensor entropy;                       // [rows]
  Tensor max_log_sum;                   // [rows, 2]
};

// Calls fn(Acc{}, Out{}) with the element types of a tile and of its gradient.
template <class Fn>
inline void dispatch_tile_gradient(ScalarType tile, ScalarType out, Fn fn) {
  if (tile == ScalarType::Double) return fn(double{}, double{});
  if (out == ScalarType::BFloat16) return fn(float{}, BFloat16{});
  if (out == ScalarType::Half) return fn(float{}, Half{});
  fn(float{}, float{});
}

template <class Backend>
void linear_logprob_entropy_tile_forward(const Tensor& tile, const Tensor& targets,
                                         const Tensor& temperature, std::optional<Tensor> bias,
                                         int64_t vocab_start, double logit_scale, double softcap,
                                         bool token_statistics, Tensor state) {
  const TileArguments in(tile, targets, temperature, bias, vocab_start, logit_scale, softcap);
  check(state.scalar_type() == ScalarType::Double, "state is ", dtype_name(state.scalar_type()),
        "; it must be float64");
  check_shape("state", state, {in.rows, kVocabStateColumns}, "the state of each row of the tile");
  check_same_device("state", state, "tile", tile);
  check(state.is_contiguous(), "state is not contiguous; it must be");
  if (in.rows > 0 && in.width > 0) Backend::forward(in, token_statistics, state);
}

template <class Backend>
void linear_logprob_entropy_tile_backward(std::optional<Tensor> grad_log_prob,
                                          std::optional<Tensor> grad_entropy, const Tensor& entropy,
                                          const Tensor& max_log_sum, const Tensor& targets,
                                          const Tensor& temperature, std::optional<Tensor> bias,
                                          int64_t vocab_start, double logit_scale, double softcap,
                                          Tensor tile, std::optional<Tensor> narrow) {
  const TileArguments in(tile, targets, temperature, bias, vocab_start, logit_scale, softcap);
  TileGradients gradients{std::nullopt, std::nullopt,
                          in.row_values("entropy", entropy, {in.rows}, in.dtype),
                          in.row_values("max_log_sum", max_log_sum, {in.rows, 2}, in.dtype)};
  if (grad_log_prob) {
    gradients.grad_log_prob = in.row_values("grad_log_prob", *grad_log_prob, {in.rows}, in.dtype);
  }
  if (grad_entropy) {
    gradients.grad_entropy = in.row_values("grad_entropy", *grad_entropy, {in.rows}, in.dtype);
  }
  if (narrow) {
    const ScalarType out = narrow->scalar_type();
    check(out == in.dtype || (in.dtype == ScalarType::Float &&
                              (out == ScalarType::BFloat16 || out == ScalarType::Half)),
          "narrow is ", dtype_name(out), " and tile ", dtype_name(in.dtype),
          "; narrow must have the tile's dtype or, for float32, be bfloat16 or float16");
    check_shape("narrow", *narrow, {in.rows, in.width}, "the shape of the tile");
    check_same_device("narrow", *narrow, "tile", tile);
    TileArguments::check_rows_contiguous("narrow", *narrow);
  }
  if (in.rows > 0 && in.width > 0) Backend::backward(in, gradients, narrow ? *narrow : tile);
}

}  // namespace entropy_rl
