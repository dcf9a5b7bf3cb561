// Functions marked ENTROPY_RL_HD compile for the host and, under nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define ENTROPY_RL_HD __host__ __device__
#elif defined(__GNUC__)
// A loop with a call left in it does not vectorise (csrc/cpu/each_simd.h), and GCC would leave a
// call to a function as long as some are here.
#define ENTROPY_RL_HD __attribute__((always_inline))
#else
#define ENTROPY_RL_HD
#endif
