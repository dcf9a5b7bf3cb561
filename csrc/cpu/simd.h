// How loops over elements are vectorised on the CPU. A function marked ENTROPY_RL_SIMD_CLONES is
// compiled for AVX-512, AVX2 and the baseline, and one is chosen when the library loads. The clones
// are named by instruction set: one named by architecture is chosen by processor model, and would
// leave other makers' processors with the baseline.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_RL_SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ENTROPY_RL_SIMD_CLONES
#endif

namespace entropy_rl::cpu {

// Independent sums that a loop keeps, so that the compiler can hold them in vectors; also what
// fixes the order of summation on every path.
constexpr int kLanes = 16;

}  // namespace entropy_rl::cpu
