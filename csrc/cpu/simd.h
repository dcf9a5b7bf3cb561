// How loops over elements are vectorised on the CPU.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_RL_X86_SIMD 1
// A function marked so is compiled for AVX-512, AVX2 and the baseline, and one is chosen when the
// library loads. The clones are named by instruction set: one named by architecture is chosen by
// processor model, and would leave other makers' processors with the baseline.
#define ENTROPY_RL_SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ENTROPY_RL_SIMD_CLONES
#endif

namespace entropy_rl::cpu {

// Independent sums that a loop keeps, so that the compiler can hold them in vectors; also what
// fixes the order of summation on every path.
constexpr int kLanes = 16;

enum class Simd { kPortable, kAvx2, kAvx512 };

// The widest that the processor has, or what the environment variable ENTROPY_RL_SIMD names:
// portable, avx2 or avx512. Read once. Throws std::invalid_argument for another value, or for one
// that the processor does not have.
Simd simd();

}  // namespace entropy_rl::cpu
