// Every op of the library. Each runs on CPU and CUDA; fakes and autograd are in entropy_rl_ext/ops.
//
// A number that a caller may change from call to call is a Scalar in the public op, and reaches the
// kernels as a 0-dim float64 tensor on the CPU: torch.compile recompiles when a `float` argument
// changes, and does not for these.
#include <torch/csrc/stable/library.h>

#include "build_info.h"

STABLE_TORCH_LIBRARY(entropy_rl, m) {
  // [..., vocab] -> [...]: entropy, and log-prob of the target, of softmax(logits / temperature).
  m.def(
      "token_entropy(Tensor logits, Tensor? mask=None, Scalar temperature=1.0, "
      "Tensor? row_temperature=None) -> Tensor");
  m.def(
      "token_entropy_forward(Tensor logits, Tensor? mask, Tensor temperature) "
      "-> (Tensor entropy, Tensor statistics)");
  m.def(
      "token_entropy_backward(Tensor grad_entropy, Tensor logits, Tensor? mask, Tensor temperature, "
      "Tensor entropy, Tensor statistics) -> Tensor");
  m.def(
      "logprob_entropy(Tensor logits, Tensor targets, Tensor? mask=None, Scalar temperature=1.0, "
      "Tensor? row_temperature=None, bool entropy_grad=False) -> (Tensor log_prob, Tensor entropy)");
  m.def(
      "logprob_entropy_forward(Tensor logits, Tensor targets, Tensor? mask, Tensor temperature) "
      "-> (Tensor log_prob, Tensor entropy, Tensor statistics)");
  m.def(
      "logprob_entropy_backward(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor logits, "
      "Tensor targets, Tensor? mask, Tensor temperature, Tensor entropy, Tensor statistics) "
      "-> Tensor");

  // [..., sequence] -> bool of that shape: the response tokens of highest entropy in each scope.
  m.def(
      "global_top_mask(Tensor entropy, Tensor response_mask, Scalar top_ratio=0.2, "
      "str rule=\"topk\", str scope=\"batch\", Tensor? group_ids=None) -> Tensor");
  m.def(
      "global_top_mask_forward(Tensor entropy, Tensor response_mask, Tensor top_ratio, str rule, "
      "str scope, Tensor? group_ids) -> Tensor");
}

// Read through ctypes where the pybind11 module is absent.
extern "C" __attribute__((visibility("default"))) const char* entropy_rl_build_info() {
  return entropy_rl::build_info_json();
}
