// Functions marked ENTROPY_RL_HD compile for the host and, under nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define ENTROPY_RL_HD __host__ __device__
#elif defined(__GNUC__)
// GCC inlines a function into one compiled for another instruction set (csrc/cpu/simd.h) only when
// it must, and a loop with a call left in it does not vectorise.
#define ENTROPY_RL_HD __attribute__((always_inline))
#else
#define ENTROPY_RL_HD
#endif
