#include "softmax_backend.h"

#include <cmath>
#include <cstring>
#include <limits>
#if defined(ENTROPY_RL_X86_SIMD)
#include <immintrin.h>
// GCC warns of its own header: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define ENTROPY_RL_LOOPS "softmax_loops.h"
#include "each_simd.h"

namespace entropy_rl::cpu {

template <class T>
accumulate_t<T> chunk_max(const T* x, int count) {
  ENTROPY_RL_SIMD_CALL(max_of(x, count));
}

template <class T>
void chunk_sums(const T* x, int count, accumulate_t<T> shift, accumulate_t<T> inverse_temperature,
                accumulate_t<T>* sum, accumulate_t<T>* dot) {
  ENTROPY_RL_SIMD_CALL(add_sums(x, count, shift, inverse_temperature, sum, dot));
}

template <class T>
void softmax_gradient(const T* x, int64_t count, const SoftmaxGradient<accumulate_t<T>>& gradient,
                      T* out) {
  ENTROPY_RL_SIMD_CALL(gradient_of(x, count, gradient, out));
}

#define ENTROPY_RL_INSTANTIATE(T)                                                             \
  template accumulate_t<T> chunk_max(const T*, int);                                          \
  template void chunk_sums(const T*, int, accumulate_t<T>, accumulate_t<T>, accumulate_t<T>*, \
                           accumulate_t<T>*);                                                 \
  template void softmax_gradient(const T*, int64_t, const SoftmaxGradient<accumulate_t<T>>&, T*);
ENTROPY_RL_INSTANTIATE(float)
ENTROPY_RL_INSTANTIATE(double)
ENTROPY_RL_INSTANTIATE(BFloat16)
ENTROPY_RL_INSTANTIATE(Half)
#undef ENTROPY_RL_INSTANTIATE

void narrow(const float* x, int count, BFloat16* out) {
  ENTROPY_RL_SIMD_CALL(narrow_all(x, count, out));
}
void narrow(const float* x, int count, Half* out) {
  ENTROPY_RL_SIMD_CALL(narrow_all(x, count, out));
}

}  // namespace entropy_rl::cpu
