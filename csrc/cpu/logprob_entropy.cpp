// logprob_entropy on the CPU: rows in parallel, each in one pass over its logits
// (softmax_backend.h).
#include "../ops/logprob_entropy.h"
#include "softmax_backend.h"
#include "zeroed_tensor.h"

namespace entropy_rl::cpu {
namespace {

// The arguments of one call for the loops; a pointer is null if its argument is absent.
template <class T>
struct RowReader {
  using Acc = accumulate_t<T>;
  const LogitsRows& in;
  const T* logits = const_data<T>(in.logits);
  const bool* mask = const_data<bool>(in.mask);
  const Acc* row_temperature = const_data<Acc>(in.temperature.of_rows);

  bool is_masked(int64_t row) const { return mask && !mask[row]; }
  double temperature(int64_t row) const {
    return row_temperature ? row_temperature[row] : in.temperature.number;
  }
  const T* operator[](int64_t row) const { return logits + in.layout.offset(row); }
};

struct LogprobEntropy {
  static void check_values(const LogitsRows& in, const std::optional<Tensor>& targets) {
    if (in.temperature.of_rows) check_temperatures(in, *in.temperature.of_rows);
    if (targets) check_targets(in, *targets);
  }

  static void forward(const LogitsRows& in, const RowOutputs& out) {
    dispatch_floating(in.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using Acc = accumulate_t<T>;
      const RowReader<T> rows{in};
      const int64_t* targets = const_data<int64_t>(out.targets);
      Acc* log_prob = mutable_data<Acc>(out.log_prob);
      Acc* entropy = mutable_data<Acc>(out.entropy);
      Acc* max_log_sum = mutable_data<Acc>(out.max_log_sum);
      for_each_row(in.rows, in.vocab, [&](int64_t row) {
        if (rows.is_masked(row)) {
          entropy[row] = max_log_sum[2 * row] = max_log_sum[2 * row + 1] = 0;
          if (targets) log_prob[row] = 0;
          return;
        }
        const double temperature = rows.temperature(row);
        const RowSoftmax<Acc> result = row_softmax(rows[row], in.vocab, temperature);
        entropy[row] = result.entropy;
        max_log_sum[2 * row] = result.max;
        max_log_sum[2 * row + 1] = result.log_sum;
        if (!targets) return;
        const Acc target_logit = load_value(rows[row][targets[row]]);
        log_prob[row] = result.log_prob(target_logit, static_cast<Acc>(temperature));
      });
    });
  }

  static Tensor backward(const LogitsRows& in, const RowGradients& gradients) {
    std::optional<ZeroedTensor> grad_logits;
    dispatch_floating(in.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using Acc = accumulate_t<T>;
      const RowReader<T> rows{in};
      const int64_t* targets = const_data<int64_t>(gradients.targets);
      const Acc* grad_log_prob = const_data<Acc>(gradients.grad_log_prob);
      const Acc* grad_entropy = const_data<Acc>(gradients.grad_entropy);
      const Acc* entropy = const_data<Acc>(gradients.entropy);
      const Acc* max_log_sum = const_data<Acc>(gradients.max_log_sum);
      const auto g_log_prob = [&](int64_t row) {
        return grad_log_prob ? grad_log_prob[row] : Acc(0);
      };
      const auto g_entropy = [&](int64_t row) { return grad_entropy ? grad_entropy[row] : Acc(0); };
      const auto is_zero = [&](int64_t row) {
        return rows.is_masked(row) || (g_log_prob(row) == 0 && g_entropy(row) == 0);
      };
      int64_t zero_rows = 0;
      for (int64_t row = 0; row < in.rows; ++row) zero_rows += is_zero(row);
      grad_logits.emplace(in.logits, in.row_shape_with(in.vocab), 2 * zero_rows < in.rows);
      T* out = mutable_data<T>(grad_logits->tensor());
      const size_t row_bytes = static_cast<size_t>(in.vocab) * sizeof(T);
      for_each_row(in.rows, in.vocab, [&](int64_t row) {
        T* grad_row = out + row * in.vocab;
        if (is_zero(row)) {
          grad_logits->set_zero(grad_row, row_bytes);
          return;
        }
        grad_logits->prepare_write(grad_row, row_bytes);
        const SoftmaxGradient<Acc> gradient{shift_of(max_log_sum[2 * row]),
                                            max_log_sum[2 * row + 1],
                                            entropy[row],
                                            static_cast<Acc>(1.0 / rows.temperature(row)),
                                            g_log_prob(row),
                                            g_entropy(row)};
        row_gradient(rows[row], in.vocab, targets ? targets[row] : -1, gradient, grad_row);
      });
    });
    return grad_logits->tensor();
  }

 private:
  static void check_temperatures(const LogitsRows& in, const Tensor& temperatures) {
    dispatch_floating(temperatures.scalar_type(), [&](auto element) {
      const auto* temperature = const_data<decltype(element)>(temperatures);
      const bool* mask = const_data<bool>(in.mask);
      for (int64_t row = 0; row < in.rows; ++row) {
        if (mask && !mask[row]) continue;
        const double value = load_value(temperature[row]);
        check(is_temperature(value), "temperature[", row, "] (flat index) is ", value,
              kTemperatureRange);
      }
    });
  }

  static void check_targets(const LogitsRows& in, const Tensor& targets) {
    const int64_t* target = const_data<int64_t>(targets);
    const bool* mask = const_data<bool>(in.mask);
    for (int64_t row = 0; row < in.rows; ++row) {
      if (mask && !mask[row]) continue;
      check(target[row] >= 0 && target[row] < in.vocab, "targets[", row, "] (flat index) is ",
            target[row], "; it must be in [0, ", in.vocab, "), the vocabulary");
    }
  }
};

}  // namespace
}  // namespace entropy_rl::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_rl, CPU, m) {
  using entropy_rl::cpu::LogprobEntropy;
  m.impl("logprob_entropy_forward",
         TORCH_BOX(&entropy_rl::logprob_entropy_forward<LogprobEntropy>));
  m.impl("logprob_entropy_backward",
         TORCH_BOX(&entropy_rl::logprob_entropy_backward<LogprobEntropy>));
}
