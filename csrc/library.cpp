// Every op of the library. Each runs on CPU and CUDA; fakes and autograd are in entropy_rl_ext/ops.
//
// A number that a caller may change from call to call is a Scalar in the public op, and a 0-dim
// float64 tensor on the CPU in the kernels' op: torch.compile recompiles when a `float` argument
// changes, but not when one of these does.
#include <torch/csrc/stable/library.h>

#include "build_info.h"

// Parts that several schemas share.
#define AGGREGATION_OPTIONS \
  ", str loss_agg_mode=\"token-mean\", int dp_size=1, float? loss_scale_factor=None"
#define POLICY_LOSS_OPTIONS                                                                   \
  ", str loss_mode=\"vanilla\", str normalize=\"selected\", float clip_ratio=0.2, "           \
  "float? clip_ratio_low=None, float? clip_ratio_high=None, float clip_ratio_c=3.0, "         \
  "float clip_cov_ratio=0.0002, float clip_cov_lb=1.0, float clip_cov_ub=5.0, "               \
  "float kl_cov_ratio=0.0002, float ppo_kl_coef=0.1, float tau_pos=1.0, float tau_neg=1.05, " \
  "float? dro_beta=None" AGGREGATION_OPTIONS
#define LOSS_OUTPUTS "(Tensor loss, Tensor metrics, Tensor gradient, Tensor row_scale)"
#define LOSS_GRADIENT "Tensor grad_loss, Tensor gradient, Tensor row_scale"
#define LINEAR_OPTIONS                                                                    \
  ", SymInt? chunk_rows=None, SymInt? max_grad_rows=None, SymInt? max_mask_rows=None, "   \
  "float logit_scale=1.0, float? softcap=None, int vocab_start=0, int? vocab_size=None, " \
  "str? group=None, ScalarType? compute_dtype=None"
#define LINEAR_OUTPUTS "(Tensor log_prob, Tensor entropy, Tensor is_top1, Tensor sum_squared_probs)"

STABLE_TORCH_LIBRARY(entropy_rl, m) {
  // [..., vocab] -> [...]: entropy, and log-prob of the target, of softmax(logits / temperature).
  m.def(
      "token_entropy(Tensor logits, Tensor? mask=None, Scalar temperature=1.0, "
      "Tensor? row_temperature=None) -> Tensor");
  m.def(
      "logprob_entropy(Tensor logits, Tensor targets, Tensor? mask=None, Scalar temperature=1.0, "
      "Tensor? row_temperature=None, bool entropy_grad=False) -> (Tensor log_prob, Tensor "
      "entropy)");
  // The kernels of both: without targets log_prob is empty, of shape [0].
  m.def(
      "logprob_entropy_forward(Tensor logits, Tensor? targets, Tensor? mask, Tensor temperature) "
      "-> (Tensor log_prob, Tensor entropy, Tensor max_log_sum)");
  m.def(
      "logprob_entropy_backward(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor logits, "
      "Tensor? targets, Tensor? mask, Tensor temperature, Tensor entropy, Tensor max_log_sum) "
      "-> Tensor");

  // [..., hidden], [vocab, hidden] -> [...]: logprob_entropy of the LM head's logits, of which only
  // a tile exists at a time. The forward and backward are loops over tiles in Python; the tile ops
  // are the kernels.
  m.def(
      "linear_logprob_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias=None, "
      "Tensor? mask=None, Scalar temperature=1.0, Tensor? row_temperature=None, "
      "bool entropy_grad=False, *" LINEAR_OPTIONS
      ", bool token_statistics=False) -> " LINEAR_OUTPUTS);
  m.def(
      "linear_logprob_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor? mask, Tensor temperature, *" LINEAR_OPTIONS
      ", bool token_statistics=False) -> "
      "(Tensor log_prob, Tensor entropy, Tensor is_top1, Tensor sum_squared_probs, "
      "Tensor max_log_sum)");
  m.def(
      "linear_logprob_entropy_backward(Tensor? grad_log_prob, Tensor? grad_entropy, "
      "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? mask, "
      "Tensor temperature, Tensor entropy, Tensor max_log_sum, bool[3] needs, *" LINEAR_OPTIONS
      ") -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_logprob_entropy_tile_forward(Tensor tile, Tensor targets, Tensor temperature, "
      "Tensor? bias, SymInt vocab_start, float logit_scale, float softcap, "
      "bool token_statistics, Tensor(a!) state) -> ()");
  m.def(
      "linear_logprob_entropy_tile_backward(Tensor? grad_log_prob, Tensor? grad_entropy, "
      "Tensor entropy, Tensor max_log_sum, Tensor targets, Tensor temperature, Tensor? bias, "
      "SymInt vocab_start, float logit_scale, float softcap, Tensor(a!) tile, Tensor(b!)? narrow) "
      "-> ()");

  // [..., sequence] -> bool of that shape: the response tokens of highest entropy in each scope.
  m.def(
      "global_top_mask(Tensor entropy, Tensor response_mask, Scalar top_ratio=0.2, "
      "str rule=\"topk\", str scope=\"batch\", Tensor? group_ids=None) -> Tensor");
  m.def(
      "global_top_mask_forward(Tensor entropy, Tensor response_mask, Tensor top_ratio, str rule, "
      "str scope, Tensor? group_ids, str algorithm=\"auto\") -> Tensor");
  // The same over values that several processes hold, in steps; between the steps the processes add
  // up their counts. Counts of the next digit of the keys; the k-th largest key, digit by digit;
  // the next larger key; the mask.
  m.def("global_top_mask_counts(Tensor values, Tensor mask, Tensor? key, int shift) -> Tensor");
  m.def(
      "global_top_mask_key(Tensor counts, Tensor? key, Tensor k, int shift) "
      "-> (Tensor key, Tensor k)");
  m.def("global_top_mask_next_key(Tensor values, Tensor mask, Tensor key) -> Tensor");
  m.def(
      "global_top_mask_at_key(Tensor values, Tensor mask, Tensor key, Tensor k, "
      "Tensor? ties=None, int process=0, Tensor? next_key=None, Tensor? weight=None) "
      "-> (Tensor mask, Tensor lowest)");

  // [rows, tokens] -> []: losses over response tokens. A forward returns the loss, its metrics, and
  // the gradient as two factors, one for each token and one for each row.
  m.def(
      "policy_loss(Tensor log_prob, Tensor old_log_prob, Tensor advantages, Tensor response_mask, "
      "Tensor? entropy_mask=None, Tensor? covariance_mask=None, Tensor? rollout_is_weights=None, "
      "Tensor? batch_num_tokens=None, Tensor? global_batch_size=None, Tensor? seed=None, "
      "Tensor? token_clip_ratio_low=None, Tensor? token_clip_ratio_high=None, "
      "*" POLICY_LOSS_OPTIONS ") -> (Tensor loss, Tensor metrics)");
  m.def(
      "policy_loss_forward(Tensor log_prob, Tensor old_log_prob, Tensor advantages, "
      "Tensor response_mask, Tensor? entropy_mask=None, Tensor? covariance_mask=None, "
      "Tensor? rollout_is_weights=None, Tensor? batch_num_tokens=None, "
      "Tensor? global_batch_size=None, Tensor? seed=None, "
      "Tensor? token_clip_ratio_low=None, Tensor? token_clip_ratio_high=None, *" POLICY_LOSS_OPTIONS
      ") -> " LOSS_OUTPUTS);
  m.def("policy_loss_backward(" LOSS_GRADIENT ", Tensor log_prob) -> Tensor");
  m.def(
      "kl_loss(Tensor log_prob, Tensor ref_log_prob, Tensor response_mask, "
      "Tensor? batch_num_tokens=None, Tensor? global_batch_size=None, Tensor? weights=None, *, "
      "str kl_loss_type=\"low_var_kl\"" AGGREGATION_OPTIONS ") -> Tensor");
  m.def(
      "kl_loss_forward(Tensor log_prob, Tensor ref_log_prob, Tensor response_mask, "
      "Tensor? batch_num_tokens=None, Tensor? global_batch_size=None, Tensor? weights=None, *, "
      "str kl_loss_type=\"low_var_kl\"" AGGREGATION_OPTIONS ") -> " LOSS_OUTPUTS);
  m.def("kl_loss_backward(" LOSS_GRADIENT ", Tensor log_prob) -> Tensor");
  m.def(
      "aggregate(Tensor values, Tensor mask, Tensor? batch_num_tokens=None, "
      "Tensor? global_batch_size=None, *" AGGREGATION_OPTIONS ") -> Tensor");
  m.def(
      "aggregate_forward(Tensor values, Tensor mask, Tensor? batch_num_tokens=None, "
      "Tensor? global_batch_size=None, *" AGGREGATION_OPTIONS ") -> " LOSS_OUTPUTS);
  m.def("aggregate_backward(" LOSS_GRADIENT ", Tensor values) -> Tensor");
}

// Read through ctypes, for installations without the pybind11 module.
extern "C" __attribute__((visibility("default"))) const char* entropy_rl_build_info() {
  return entropy_rl::build_info_json();
}
