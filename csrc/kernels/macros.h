// Functions marked ENTROPY_RL_HD compile for the host and, under nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define ENTROPY_RL_HD __host__ __device__
#else
#define ENTROPY_RL_HD
#endif
