// token_entropy: H = log sum - dot / sum of each row (online_softmax.h), one block a row, or a
// block a part of it (softmax_rows.cuh). Forward V * sizeof(T) bytes read a row; backward the same
// read and written, zero rows only written. Accumulation float (double for double).
#pragma once

#include "softmax_rows.cuh"

namespace entropy_rl {

template <class T>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<T>)
    token_entropy_kernel(SoftmaxRows<T> in, SoftmaxOutputs<accumulate_t<T>> out) {
  forward_softmax_rows<T>(in, out);
}

template <class T>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<T>)
    token_entropy_backward_kernel(SoftmaxRows<T> in, int parts,
                                  const accumulate_t<T>* grad_entropy /*[rows]*/,
                                  const accumulate_t<T>* entropy /*[rows]*/,
                                  const accumulate_t<T>* statistics /*[rows, 2]*/,
                                  T* grad_logits /*[rows, vocab]*/) {
  backward_softmax_rows<T>(in, parts, nullptr, grad_entropy, entropy, statistics, grad_logits);
}

}  // namespace entropy_rl
