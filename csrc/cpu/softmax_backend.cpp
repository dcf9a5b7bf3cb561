#include "softmax_backend.h"

#include <cmath>
#include <cstring>
#if defined(ENTROPY_RL_X86_SIMD)
#include <immintrin.h>
#endif

#define ENTROPY_RL_LOOPS "softmax_loops.h"
#include "each_simd.h"

namespace entropy_rl::cpu {

float chunk_max(const float* x, int count) { ENTROPY_RL_SIMD_CALL(max_of(x, count)); }
double chunk_max(const double* x, int count) { ENTROPY_RL_SIMD_CALL(max_of(x, count)); }

void chunk_sums(const float* x, int count, float shift, float inverse_temperature, float* sum,
                float* dot) {
  ENTROPY_RL_SIMD_CALL(add_sums(x, count, shift, inverse_temperature, sum, dot));
}
void chunk_sums(const double* x, int count, double shift, double inverse_temperature, double* sum,
                double* dot) {
  ENTROPY_RL_SIMD_CALL(add_sums(x, count, shift, inverse_temperature, sum, dot));
}

void chunk_gradient(const float* x, int count, const SoftmaxGradient<float>& gradient, float* out) {
  ENTROPY_RL_SIMD_CALL(gradient_of(x, count, gradient, out));
}
void chunk_gradient(const double* x, int count, const SoftmaxGradient<double>& gradient,
                    double* out) {
  ENTROPY_RL_SIMD_CALL(gradient_of(x, count, gradient, out));
}

void widen(const BFloat16* x, int count, float* out) {
  ENTROPY_RL_SIMD_CALL(widen_all(x, count, out));
}
void widen(const Half* x, int count, float* out) { ENTROPY_RL_SIMD_CALL(widen_all(x, count, out)); }
void narrow(const float* x, int count, BFloat16* out) {
  ENTROPY_RL_SIMD_CALL(narrow_all(x, count, out));
}
void narrow(const float* x, int count, Half* out) {
  ENTROPY_RL_SIMD_CALL(narrow_all(x, count, out));
}

}  // namespace entropy_rl::cpu
