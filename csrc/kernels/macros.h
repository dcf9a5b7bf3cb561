// Functions marked ENTROPY_RL_HD compile for the host and, under nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define ENTROPY_RL_HD __host__ __device__
#elif defined(__GNUC__)
// A loop that contains a call does not vectorise (csrc/cpu/each_simd.h), and GCC would not inline
// some of these functions by itself, because they are long.
#define ENTROPY_RL_HD __attribute__((always_inline))
#else
#define ENTROPY_RL_HD
#endif
