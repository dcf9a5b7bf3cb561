// How loops over elements are compiled for the instruction sets of x86, and chosen between.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_RL_X86_SIMD 1
#endif

namespace entropy_rl::cpu {

// Loops are written once, in a *_loops.h, which each_simd.h compiles for every instruction set into
// a namespace of its own: portable, avx2 and avx512. Beside them, a function of the same name calls
// the one that simd() chooses:
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

// Independent sums that a loop keeps, so that the compiler can hold them in vectors; also what
// fixes the order of summation on every path.
constexpr int kLanes = 16;

enum class Simd { kPortable, kAvx2, kAvx512 };

// The widest that the processor has, or what the environment variable ENTROPY_RL_SIMD names:
// portable, avx2 or avx512. Read once. Throws std::invalid_argument for another value, or for one
// that the processor does not have: to be called before work is spread over threads, where the
// error's message would be lost.
Simd simd();

}  // namespace entropy_rl::cpu
