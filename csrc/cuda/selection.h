// Selection on the device from keys that are already there (../kernels/selection.h). Work is
// ordered by the stream and sized by shapes alone, so that a CUDA graph can hold it.
#pragma once

#include "../kernels/global_top_mask.cuh"
#include "device_array.h"
#include "launch.h"

namespace entropy_rl::cuda {

// Segments of rows, and the order in which `keys` holds the rows. Both null: every row is a
// segment.
struct Segments {
  const int64_t* ids;        // [rows] ascending
  const int64_t* row_order;  // [rows] row of the mask that each row of keys stands for
};

// Writes the mask, 1 or 0, that `rule` chooses in every segment. Key is uint32_t or uint64_t.
template <class Key>
void selection_mask(const Key* keys /*[rows, columns]*/, const TileLayout& layout,
                    const Segments& segments, const SelectionRule& rule,
                    uint8_t* mask /*[rows, columns]*/, const Tensor& on_device_of,
                    cudaStream_t stream);

// Marks the *k largest keys that are not 0, equal keys in order of their index; all of these where
// there are fewer than *k, none where *k <= 0. What cpu::top_k_mask does, with k in device memory.
template <class Key>
void top_k_mask(const Key* keys /*[n]*/, int64_t n, const int64_t* k /*[1]*/, uint8_t* mask /*[n]*/,
                const Tensor& on_device_of, cudaStream_t stream) {
  selection_mask(keys, TileLayout(1, n), {nullptr, nullptr}, {TopRule::kTopK, 0.0, k}, mask,
                 on_device_of, stream);
}

}  // namespace entropy_rl::cuda
