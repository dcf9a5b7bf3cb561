// Packs: consecutive elements that one thread loads or stores by the widest accesses there are, one
// of 4, 8 or 16 bytes, or several of 16.
//   Pack<T>        16 bytes: rows of logits
//   TokenPack<T>   four elements: arrays over tokens, whose elements differ in size
//   PackReader<T>  the packs of a row that begins at any alignment
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtypes.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace entropy_rl {

constexpr int kPackBytes = 16;

template <class T, int kElements = kPackBytes / static_cast<int>(sizeof(T))>
struct Pack {
  static constexpr int kCount = kElements;
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  using Access =
      std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
  static constexpr int kAccesses = kBytes / static_cast<int>(sizeof(Access));
  static_assert(kAccesses * sizeof(Access) == kBytes);

  T values[kCount];

  // Whether a pack may begin at `first`; true of null.
  __device__ __forceinline__ static bool is_aligned(const T* first) {
    return reinterpret_cast<uintptr_t>(first) % sizeof(Access) == 0;
  }
  __device__ __forceinline__ static Pack of(const Access (&raw)[kAccesses]) {
    Pack pack;
    memcpy(&pack, raw, kBytes);
    return pack;
  }
  __device__ __forceinline__ static Pack filled(float value) {
    Pack pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) store_value(value, &pack.values[j]);
    return pack;
  }

  __device__ __forceinline__ static Pack load(const T* from) {
    Access raw[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) raw[i] = reinterpret_cast<const Access*>(from)[i];
    return of(raw);
  }
  // By an intrinsic, because nvcc splits a plain load whose elements are used one by one.
  __device__ __forceinline__ static Pack load_at_once(const T* from) {
    Access raw[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) raw[i] = __ldca(reinterpret_cast<const Access*>(from) + i);
    return of(raw);
  }
  // For data that is read once: by an intrinsic, too, and does not displace other lines of the
  // cache.
  __device__ __forceinline__ static Pack load_streaming(const T* from) {
    Access raw[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) raw[i] = __ldcs(reinterpret_cast<const Access*>(from) + i);
    return of(raw);
  }
  // An intrinsic, because nvcc merges a plain store with a neighbouring branch that stores the
  // elements one by one, and then emits only the latter.
  __device__ __forceinline__ void store(T* to) const {
    Access raw[kAccesses];
    memcpy(raw, values, kBytes);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) __stwb(reinterpret_cast<Access*>(to) + i, raw[i]);
  }
  __device__ __forceinline__ void store_streaming(T* to) const {
    Access raw[kAccesses];
    memcpy(raw, values, kBytes);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) __stcs(reinterpret_cast<Access*>(to) + i, raw[i]);
  }
};

// `x` rounded to T; in pairs for bfloat16, which the hardware rounds by one instruction.
template <class T, int kCount, class Acc>
__device__ __forceinline__ Pack<T, kCount> rounded_pack(const Acc (&x)[kCount]) {
  Pack<T, kCount> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[j], x[j + 1]);
      memcpy(&pack.values[j], &pair, sizeof(pair));
    }
  } else
#endif
  {
#pragma unroll
    for (int j = 0; j < kCount; ++j) store_value(x[j], &pack.values[j]);
  }
  return pack;
}

// ---- Tokens ----

// Consecutive tokens that a thread takes at a time.
constexpr int kPackTokens = 4;

template <class T>
using TokenPack = Pack<T, kPackTokens>;

// The pack values[index ... index + count - 1]; `absent` for its other elements, and for all where
// `values` is null. `aligned` says whether a full pack may be loaded by one access. The index is a
// separate argument, so that the test for null stays outside of loops.
template <class T>
__device__ __forceinline__ TokenPack<T> load_tokens(const T* values, int64_t index, int count,
                                                    bool aligned, T absent) {
  if (values && aligned && count == kPackTokens) return TokenPack<T>::load(values + index);
  TokenPack<T> pack;
#pragma unroll
  for (int j = 0; j < kPackTokens; ++j) {
    pack.values[j] = values && j < count ? values[index + j] : absent;
  }
  return pack;
}

// Stores the first `count` elements.
template <class T>
__device__ __forceinline__ void store_tokens(const TokenPack<T>& pack, int64_t count, T* to) {
  if (count >= kPackTokens && TokenPack<T>::is_aligned(to)) return pack.store(to);
#pragma unroll
  for (int j = 0; j < kPackTokens; ++j) {
    if (j < count) to[j] = pack.values[j];
  }
}

// ---- Rows of logits ----

// Elements before the first 16-byte boundary of a row: rows of an odd vocabulary begin anywhere.
template <class T>
__device__ __forceinline__ int elements_before_boundary(const T* row, int vocab) {
  const int bytes = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kPackBytes);
  const int count = (kPackBytes - bytes) % kPackBytes / static_cast<int>(sizeof(T));
  return count < vocab ? count : vocab;
}

// The 16 bytes that begin `bytes` into `low` and `high`; `bytes` is a multiple of kElement.
template <int kElement>
__device__ __forceinline__ uint4 shifted_pack(const uint4& low, const uint4& high, int bytes) {
  // In steps of 8, 4 and 2 bytes: an index known only at run time would put the words in local
  // memory.
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (bytes & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (kElement < 8 && (bytes & 4)) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  if (kElement < 4 && (bytes & 2)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// The packs of the elements from `first` on. Where `first` is not aligned, a pack is cut out of the
// two aligned packs that it overlaps. This may read bytes before `first`, which are in the same
// aligned pack and thus in the same allocation; bytes after the last element are never read.
template <class T>
struct PackReader {
  static constexpr int kCount = Pack<T>::kCount;
  const T* first;
  int count;       // elements
  int misaligned;  // bytes from the aligned address below `first`

  __device__ __forceinline__ PackReader(const T* first, int count)
      : first(first),
        count(count),
        misaligned(static_cast<int>(reinterpret_cast<uintptr_t>(first) % kPackBytes)) {}

  // Packs, the last of which may be partial.
  __device__ __forceinline__ int packs() const { return (count - 1) / kCount + 1; }
  // The first packs, which `load` may read.
  __device__ __forceinline__ int full_packs() const {
    if (misaligned == 0) return count / kCount;
    const int before = misaligned / static_cast<int>(sizeof(T));
    const int64_t packs = (static_cast<int64_t>(count) + before) / kCount - 1;
    return packs < 0 ? 0 : static_cast<int>(packs);
  }
  template <bool aligned>
  __device__ __forceinline__ Pack<T> load(int pack) const {
    const char* address =
        reinterpret_cast<const char*>(first) + static_cast<int64_t>(pack) * kPackBytes;
    if constexpr (aligned) {
      return Pack<T>::load_streaming(reinterpret_cast<const T*>(address));
    } else {
      const uint4* below = reinterpret_cast<const uint4*>(address - misaligned);
      return Pack<T>::of({shifted_pack<sizeof(T)>(below[0], below[1], misaligned)});
    }
  }
  // Any pack; `absent` stands in for elements after the last.
  template <bool aligned>
  __device__ __forceinline__ Pack<T> load_any(int pack, float absent) const {
    if (pack < full_packs()) return load<aligned>(pack);
    Pack<T> values = Pack<T>::filled(absent);
    const int64_t begin = static_cast<int64_t>(pack) * kCount;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (begin + j < count) values.values[j] = first[begin + j];
    }
    return values;
  }
};

}  // namespace entropy_rl
