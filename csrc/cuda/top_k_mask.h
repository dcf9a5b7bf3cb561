// Selection on the device among given keys (../kernels/selection.h). Launches depend on shapes
// alone, so that a CUDA graph can capture them.
#pragma once

#include "device_array.h"
#include "launch.h"

namespace entropy_rl::cuda {

// Sets mask to 1 for the *k largest keys other than 0, equal keys in order of their index, and to 0
// elsewhere. If fewer than *k keys are not 0, all of them are set; if *k <= 0, none. As
// cpu::top_k_mask, with k in device memory.
// Key is uint32_t or uint64_t.
template <class Key>
void top_k_mask(const Key* keys /*[n]*/, int64_t n, const int64_t* k /*[1]*/, uint8_t* mask /*[n]*/,
                const Tensor& on_device_of, cudaStream_t stream);

}  // namespace entropy_rl::cuda
