// Compiles the loops of the file that ENTROPY_RL_LOOPS names for each instruction set (simd.h). To
// be included outside of namespaces, once for a file of loops. A call left in a loop would keep it
// from vectorising: what it calls is always_inline (ENTROPY_RL_HD).

namespace entropy_rl::cpu::portable {
#include ENTROPY_RL_LOOPS
}  // namespace entropy_rl::cpu::portable

#if defined(ENTROPY_RL_X86_SIMD)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace entropy_rl::cpu::avx2 {
#include ENTROPY_RL_LOOPS
}  // namespace entropy_rl::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace entropy_rl::cpu::avx512 {
#include ENTROPY_RL_LOOPS
}  // namespace entropy_rl::cpu::avx512
#pragma GCC pop_options
#endif

#undef ENTROPY_RL_LOOPS
