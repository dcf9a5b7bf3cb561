#include "softmax_rows.h"

#include <cmath>
#include <cstring>

namespace entropy_rl::cpu {
namespace {

namespace portable {
constexpr int kVectorBytes = 16;
#include "softmax_loops.h"
}  // namespace portable

#if defined(ENTROPY_RL_X86_SIMD)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32;
#include "softmax_loops.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
constexpr int kVectorBytes = 64;
#include "softmax_loops.h"
}  // namespace avx512
#pragma GCC pop_options

#define ENTROPY_RL_CALL(call)                \
  switch (simd()) {                          \
    case Simd::kAvx512: return avx512::call; \
    case Simd::kAvx2: return avx2::call;     \
    case Simd::kPortable: break;             \
  }                                          \
  return portable::call
#else
#define ENTROPY_RL_CALL(call) return portable::call
#endif

}  // namespace

float chunk_max(const float* x, int count) { ENTROPY_RL_CALL(max_of(x, count)); }
double chunk_max(const double* x, int count) { ENTROPY_RL_CALL(max_of(x, count)); }

void chunk_sums(const float* x, int count, float shift, float inverse_temperature, float* sum,
                float* dot) {
  ENTROPY_RL_CALL(add_sums(x, count, shift, inverse_temperature, sum, dot));
}
void chunk_sums(const double* x, int count, double shift, double inverse_temperature, double* sum,
                double* dot) {
  ENTROPY_RL_CALL(add_sums(x, count, shift, inverse_temperature, sum, dot));
}

void chunk_gradient(const float* x, int count, const SoftmaxGradient<float>& gradient, float* out) {
  ENTROPY_RL_CALL(gradient_of(x, count, gradient, out));
}
void chunk_gradient(const double* x, int count, const SoftmaxGradient<double>& gradient,
                    double* out) {
  ENTROPY_RL_CALL(gradient_of(x, count, gradient, out));
}

void widen(const BFloat16* x, int count, float* out) { ENTROPY_RL_CALL(widen_all(x, count, out)); }
void widen(const Half* x, int count, float* out) { ENTROPY_RL_CALL(widen_all(x, count, out)); }
void narrow(const float* x, int count, BFloat16* out) {
  ENTROPY_RL_CALL(narrow_all(x, count, out));
}
void narrow(const float* x, int count, Half* out) { ENTROPY_RL_CALL(narrow_all(x, count, out)); }

}  // namespace entropy_rl::cpu
