// What linear_logprob_entropy adds to online_softmax.h. A row's logits come tile by tile as
// products of the LM head, and become z before the softmax:
//   y = scale (x + bias),  z = softcap tanh(y / softcap), or y without a soft-cap
//   dz/dx = scale (1 - (z / softcap)^2), or scale
// Each tile's partial row is folded into the row's state. Partial rows are Acc (float; double for
// double). The state is double, since its roundings would add up over tiles and vocabulary shards.
#pragma once

#include <cstdint>

#include "exp_log.h"
#include "online_softmax.h"

namespace entropy_rl {

// tanh to a few ulp: from e^2|y|, and for small y, where that would cancel, a polynomial (Cephes
// tanhf).
ENTROPY_RL_HD inline float tanh_vectorizable(float y) {
#if defined(__CUDA_ARCH__)
  return tanhf(y);
#else
  const float magnitude = y < 0 ? -y : y;
  const float bounded = magnitude > 40.0f ? 40.0f : magnitude;
  const float far = 1.0f - 2.0f / (exp_vectorizable(2.0f * bounded) + 1.0f);
  const float square = y * y;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = y + y * square * p;
  const float signed_far = y < 0 ? -far : far;
  const float result = magnitude < 0.625f ? near : signed_far;
  return y != y ? y : result;
#endif
}
ENTROPY_RL_HD inline double tanh_vectorizable(double y) { return tanh(y); }

template <class Acc>
struct LogitTransform {
  const Acc* bias;  // [width] of the tile, null if there is none
  Acc scale;
  Acc softcap;  // 0: none

  ENTROPY_RL_HD bool is_identity() const { return !bias && scale == Acc(1) && softcap == Acc(0); }
  ENTROPY_RL_HD Acc operator()(Acc x, int64_t j) const {
    const Acc y = scale * (bias ? x + bias[j] : x);
    return softcap > Acc(0) ? softcap * tanh_vectorizable(y / softcap) : y;
  }
  ENTROPY_RL_HD Acc slope(Acc z) const {
    if (!(softcap > Acc(0))) return scale;
    const Acc t = z / softcap;
    return scale * (Acc(1) - t * t);
  }
};

// Column of a target in the tile that begins at vocab_start >= 0; one outside [0, width) means that
// the target is in another tile. All targets below 0 count as -1, so that nothing overflows.
ENTROPY_RL_HD inline int64_t column_of_target(int64_t target, int64_t vocab_start) {
  return (target < 0 ? -1 : target) - vocab_start;
}

// A row, or a part of it. Trivial, so that it can live in shared memory.
template <class Acc>
struct VocabPart {
  OnlineSoftmax<Acc> softmax;
  Acc squares;        // sum e^2d, relative to softmax.max
  Acc before_target;  // largest z at an index below the target's

  ENTROPY_RL_HD static VocabPart neutral() {
    return {OnlineSoftmax<Acc>::neutral(), 0, -static_cast<Acc>(INFINITY)};
  }
};

// A part relative to another maximum, which is not smaller. For an equal maximum the part does not
// change.
template <class Acc>
ENTROPY_RL_HD inline VocabPart<Acc> rescaled(const VocabPart<Acc>& part, Acc max,
                                             Acc inverse_temperature) {
  if (!(max > part.softmax.max)) return part;
  VocabPart<Acc> out = part;
  out.softmax = rescaled(part.softmax, max, inverse_temperature);
  const Acc d = (part.softmax.max - shift_of(max)) * inverse_temperature;
  out.squares = part.squares * exp_shifted(2 * d);
  return out;
}

template <class Acc>
ENTROPY_RL_HD inline VocabPart<Acc> merge(const VocabPart<Acc>& a, const VocabPart<Acc>& b,
                                          Acc inverse_temperature) {
  const Acc max = a.softmax.max > b.softmax.max ? a.softmax.max : b.softmax.max;
  VocabPart<Acc> out = rescaled(a, max, inverse_temperature);
  const VocabPart<Acc> other = rescaled(b, max, inverse_temperature);
  out.softmax.sum += other.softmax.sum;
  out.softmax.dot += other.softmax.dot;
  out.squares += other.squares;
  if (other.before_target > out.before_target) out.before_target = other.before_target;
  return out;
}

// In double; a part without statistics gets those of a part without elements.
template <class Acc>
ENTROPY_RL_HD inline VocabPart<double> widened(const OnlineSoftmax<Acc>& part) {
  VocabPart<double> out = VocabPart<double>::neutral();
  out.softmax = {static_cast<double>(part.max), static_cast<double>(part.sum),
                 static_cast<double>(part.dot)};
  return out;
}
template <class Acc>
ENTROPY_RL_HD inline VocabPart<double> widened(const VocabPart<Acc>& part) {
  VocabPart<double> out = widened(part.softmax);
  out.squares = static_cast<double>(part.squares);
  out.before_target = static_cast<double>(part.before_target);
  return out;
}

// A row after some of its tiles: a row of the state tensor [rows, 6] float64.
struct VocabState {
  VocabPart<double> part;
  double target;  // z of the target, after its tile is folded
};
constexpr int kVocabStateColumns = 6;
static_assert(sizeof(VocabState) == kVocabStateColumns * sizeof(double), "a row of the state");

}  // namespace entropy_rl
