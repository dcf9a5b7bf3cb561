// linear_logprob_entropy on the CPU: the rows of a tile in parallel, each in the chunks of
// softmax_backend.h.
#include "../ops/linear_logprob_entropy.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"
#include "softmax_backend.h"

#define ENTROPY_RL_LOOPS "linear_logprob_entropy_loops.h"
#include "each_simd.h"

namespace entropy_rl::cpu {
namespace {

template <class Acc>
void chunk_transform(const Acc* x, int count, const LogitTransform<Acc>& transform, int64_t column,
                     Acc* z) {
  ENTROPY_RL_SIMD_CALL(transform_of(x, count, transform, column, z));
}
template <class Acc>
void chunk_slope(const Acc* z, int count, const LogitTransform<Acc>& transform, Acc* gradient) {
  ENTROPY_RL_SIMD_CALL(slope_of(z, count, transform, gradient));
}
template <class Acc>
Acc chunk_squares(const Acc* z, int count, Acc shift, Acc inverse_temperature) {
  ENTROPY_RL_SIMD_CALL(squares_of(z, count, shift, inverse_temperature));
}

struct Tiles {
  template <class Acc>
  static double temperature_of(const TileArguments& in, int64_t row) {
    const std::optional<Tensor>& of_rows = in.temperature.of_rows;
    return of_rows ? const_data<Acc>(of_rows)[row] : in.temperature.number;
  }

  static void forward(const TileArguments& in, bool token_statistics, const Tensor& state) {
    dispatch_floating(in.dtype, [&](auto element) {
      using Acc = accumulate_t<decltype(element)>;
      const LogitTransform<Acc> transform = in.transform<Acc>();
      const int64_t* targets = const_data<int64_t>(in.targets);
      const Acc* tile = const_data<Acc>(in.tile);
      const int64_t stride = in.tile.stride(0);
      VocabState* states = mutable_data<VocabState>(state);
      for_each_row(in.rows, in.width, [&](int64_t row) {
        fold_row(tile + row * stride, in.width, column_of_target(targets[row], in.vocab_start),
                 1.0 / temperature_of<Acc>(in, row), transform, token_statistics, &states[row]);
      });
    });
  }

  template <class Acc>
  static void fold_row(const Acc* products /*[width]*/, int64_t width, int64_t target,
                       double inverse_temperature, const LogitTransform<Acc>& transform,
                       bool token_statistics, VocabState* state) {
    alignas(64) Acc buffer[kChunk];
    VocabPart<double> part = state->part;
    for (int64_t begin = 0; begin < width; begin += kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(width - begin, kChunk));
      const Acc* z = products + begin;
      if (!transform.is_identity()) {
        chunk_transform(z, count, transform, begin, buffer);
        z = buffer;
      }
      const double max = chunk_max(z, count);
      part = rescaled(part, max, inverse_temperature);
      const Acc shift = static_cast<Acc>(part.softmax.shift());
      Acc sum, dot;
      chunk_sums(z, count, shift, static_cast<Acc>(inverse_temperature), &sum, &dot);
      part.softmax.sum += sum;
      part.softmax.dot += dot;
      if (target >= begin && target < begin + count) state->target = z[target - begin];
      if (!token_statistics) continue;
      part.squares += chunk_squares(z, count, shift, static_cast<Acc>(inverse_temperature));
      const int64_t before = std::clamp<int64_t>(target - begin, 0, count);
      part.before_target =
          std::max<double>(part.before_target, chunk_max(z, static_cast<int>(before)));
    }
    state->part = part;
  }

  static void backward(const TileArguments& in, const TileGradients& gradients,
                       const Tensor& gradient) {
    dispatch_tile_gradient(in.dtype, gradient.scalar_type(), [&](auto element, auto out_element) {
      using Acc = decltype(element);
      using Out = decltype(out_element);
      const LogitTransform<Acc> transform = in.transform<Acc>();
      const int64_t* targets = const_data<int64_t>(in.targets);
      const Acc* tile = const_data<Acc>(in.tile);
      const int64_t stride = in.tile.stride(0);
      const Acc* grad_log_prob = const_data<Acc>(gradients.grad_log_prob);
      const Acc* grad_entropy = const_data<Acc>(gradients.grad_entropy);
      const Acc* entropy = const_data<Acc>(gradients.entropy);
      const Acc* max_log_sum = const_data<Acc>(gradients.max_log_sum);
      Out* out = mutable_data<Out>(gradient);
      const int64_t out_stride = gradient.stride(0);
      for_each_row(in.rows, in.width, [&](int64_t row) {
        const SoftmaxGradient<Acc> at{shift_of(max_log_sum[2 * row]),
                                      max_log_sum[2 * row + 1],
                                      entropy[row],
                                      static_cast<Acc>(1.0 / temperature_of<Acc>(in, row)),
                                      grad_log_prob ? grad_log_prob[row] : Acc(0),
                                      grad_entropy ? grad_entropy[row] : Acc(0)};
        gradient_row(tile + row * stride, in.width, column_of_target(targets[row], in.vocab_start),
                     at, transform, out + row * out_stride);
      });
    });
  }

  // `out` may be `products`.
  template <class Acc, class Out>
  static void gradient_row(const Acc* products /*[width]*/, int64_t width, int64_t target,
                           const SoftmaxGradient<Acc>& at, const LogitTransform<Acc>& transform,
                           Out* out /*[width]*/) {
    if (at.grad_log_prob == 0 && at.grad_entropy == 0) {
      for (int64_t i = 0; i < width; ++i) out[i] = Out{};
      return;
    }
    alignas(64) Acc z[kChunk];
    alignas(64) Acc buffer[kChunk];
    for (int64_t begin = 0; begin < width; begin += kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(width - begin, kChunk));
      Acc* gradient = buffer;
      if constexpr (std::is_same_v<Acc, Out>) gradient = out + begin;
      if (!transform.is_identity()) {
        chunk_transform(products + begin, count, transform, begin, z);
        std::copy(z, z + count, gradient);
      } else if (gradient != products + begin) {
        std::copy(products + begin, products + begin + count, gradient);
      }
      softmax_gradient(gradient, count, at, gradient);
      // The target's term is added before rounding to Out; added after it, p - 1 would be rounded
      // twice.
      if (target >= begin && target < begin + count) {
        gradient[target - begin] += at.inverse_temperature * at.grad_log_prob;
      }
      if (!transform.is_identity()) chunk_slope(z, count, transform, gradient);
      if constexpr (!std::is_same_v<Acc, Out>) narrow(gradient, count, out + begin);
    }
  }
};

}  // namespace
}  // namespace entropy_rl::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  using entropy_rl::cpu::Tiles;
  m.impl("linear_logprob_entropy_tile_forward",
         TORCH_BOX(&entropy_rl::linear_logprob_entropy_tile_forward<Tiles>));
  m.impl("linear_logprob_entropy_tile_backward",
         TORCH_BOX(&entropy_rl::linear_logprob_entropy_tile_backward<Tiles>));
}
