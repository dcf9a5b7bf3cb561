// How loops over elements are compiled for the instruction sets of x86, and how one is chosen.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_RL_X86_SIMD 1
#endif

namespace entropy_rl::cpu {

// Loops are written once, in a *_loops.h, which each_simd.h compiles for every instruction set into
// the namespaces portable, avx2 and avx512. A function outside of these calls the one that simd()
// chooses:
//
//   float max_of(const float* x, int count) { ENTROPY_RL_SIMD_CALL(max_of(x, count)); }
#if defined(ENTROPY_RL_X86_SIMD)
#define ENTROPY_RL_SIMD_CALL(call)           \
  switch (simd()) {                          \
    case Simd::kAvx512: return avx512::call; \
    case Simd::kAvx2: return avx2::call;     \
    case Simd::kPortable: break;             \
  }                                          \
  return portable::call
#else
#define ENTROPY_RL_SIMD_CALL(call) return portable::call
#endif

// The width of a vector of each instruction set.
namespace portable {
constexpr int kVectorBytes = 16;
}
namespace avx2 {
constexpr int kVectorBytes = 32;
}
namespace avx512 {
constexpr int kVectorBytes = 64;
}

// Independent sums of a loop, which the compiler can hold in vectors. Their number also fixes the
// order of summation, the same for every instruction set.
constexpr int kLanes = 16;

enum class Simd { kPortable, kAvx2, kAvx512 };

// The widest instruction set that the processor has, or the one that the environment variable
// ENTROPY_RL_SIMD names: portable, avx2 or avx512. The variable is read once. Throws
// std::invalid_argument for another value, or for one that the processor does not have. Call it
// before work is spread over threads, where the error's message would be lost.
Simd simd();

}  // namespace entropy_rl::cpu
