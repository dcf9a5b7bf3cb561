// Compiles the loops of the file that ENTROPY_RL_LOOPS names for each instruction set (simd.h).
// Include it outside of namespaces, once for each file of loops. A loop that contains a call does
// not vectorise, so the functions that loops call are always_inline (ENTROPY_RL_HD).

namespace entropy_rl::cpu::portable {
#include ENTROPY_RL_LOOPS
}  // namespace entropy_rl::cpu::portable

#if defined(ENTROPY_RL_X86_SIMD)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
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
