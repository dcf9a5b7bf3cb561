#include "simd.h"

#include <cstdlib>
#include <cstring>

#include "../ops/checks.h"

namespace entropy_rl::cpu {
namespace {

Simd widest() {
#if defined(ENTROPY_RL_X86_SIMD)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Simd::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Simd::kAvx2;
  }
#endif
  return Simd::kPortable;
}

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Simd chosen() {
  const char* name = std::getenv("ENTROPY_RL_SIMD");
  const int available = static_cast<int>(widest());
  if (!name || !*name) return static_cast<Simd>(available);
  for (int i = 0; i <= available; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Simd>(i);
  }
  check(false, "ENTROPY_RL_SIMD is ", name,
        "; it must be portable, avx2 or avx512, and no wider than this processor has: ",
        kNames[available]);
  return Simd::kPortable;
}

}  // namespace

Simd simd() {
  static const Simd path = chosen();
  return path;
}

}  // namespace entropy_rl::cpu

// Read through ctypes by build_info().
extern "C" __attribute__((visibility("default"))) const char* entropy_rl_simd() {
  try {
    return entropy_rl::cpu::kNames[static_cast<int>(entropy_rl::cpu::simd())];
  } catch (const std::exception&) {
    return "";
  }
}
