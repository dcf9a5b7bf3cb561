// Selection on the device from keys that are already there (../kernels/selection.h). Work is
// ordered by the stream and sized by shapes alone, so that a CUDA graph can hold it.
#pragma once

#include "device_array.h"
#include "launch.h"

namespace entropy_rl::cuda {

// Marks the *k largest keys that are not 0, equal keys in order of their index; all of these where
// there are fewer than *k, none where *k <= 0. What cpu::top_k_mask does, with k in device memory.
// Key is uint32_t or uint64_t.
template <class Key>
void top_k_mask(const Key* keys /*[n]*/, int64_t n, const int64_t* k /*[1]*/, uint8_t* mask /*[n]*/,
                const Tensor& on_device_of, cudaStream_t stream);

}  // namespace entropy_rl::cuda
