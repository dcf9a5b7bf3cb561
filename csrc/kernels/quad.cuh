// Four consecutive elements at a time: one access of 4, 8 or 16 bytes, two for double.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace entropy_rl {

constexpr int kQuad = 4;

// Whether the four elements from `first` on lie on the boundary that one access needs; null does.
template <class T>
__device__ __forceinline__ bool is_quad(const T* first) {
  constexpr uintptr_t kBytes = sizeof(T) * kQuad < 16 ? sizeof(T) * kQuad : 16;
  return reinterpret_cast<uintptr_t>(first) % kBytes == 0;
}

namespace detail {
template <class Raw, class T>
__device__ __forceinline__ void copy_as(const T* from, T* to) {
  const Raw raw = *reinterpret_cast<const Raw*>(from);
  memcpy(to, &raw, sizeof(raw));
}
}  // namespace detail

template <class T>
__device__ __forceinline__ void load_quad(const T* from, T (&to)[kQuad]) {
  if constexpr (sizeof(T) == 1) {
    detail::copy_as<uint32_t>(from, to);
  } else if constexpr (sizeof(T) == 2) {
    detail::copy_as<uint2>(from, to);
  } else if constexpr (sizeof(T) == 4) {
    detail::copy_as<uint4>(from, to);
  } else {
    detail::copy_as<uint4>(from, to);
    detail::copy_as<uint4>(from + 2, to + 2);
  }
}

// By intrinsics: a plain store beside a branch that stores the four one by one is merged with it,
// and comes out as four.
template <class T>
__device__ __forceinline__ void store_quad(const T (&from)[kQuad], T* to) {
  if constexpr (sizeof(T) == 1) {
    uint32_t raw;
    memcpy(&raw, from, sizeof(raw));
    __stwb(reinterpret_cast<uint32_t*>(to), raw);
  } else if constexpr (sizeof(T) == 2) {
    uint2 raw;
    memcpy(&raw, from, sizeof(raw));
    __stwb(reinterpret_cast<uint2*>(to), raw);
  } else {
    constexpr int kStores = kQuad * sizeof(T) / sizeof(uint4);
    uint4 raw[kStores];
    memcpy(raw, from, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kStores; ++i) __stwb(reinterpret_cast<uint4*>(to) + i, raw[i]);
  }
}

}  // namespace entropy_rl
