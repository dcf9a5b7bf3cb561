// The loops of linear_logprob_entropy.cpp (see each_simd.h).

template <class Acc>
void transform_of(const Acc* x, int count, const LogitTransform<Acc>& transform, int64_t column,
                  Acc* z) {
  const Acc scale = transform.scale;
  if (transform.bias) {
    for (int i = 0; i < count; ++i) z[i] = scale * (x[i] + transform.bias[column + i]);
  } else {
    for (int i = 0; i < count; ++i) z[i] = scale * x[i];
  }
  if (!(transform.softcap > 0)) return;
  const Acc softcap = transform.softcap;
  for (int i = 0; i < count; ++i) z[i] = softcap * tanh_vectorizable(z[i] / softcap);
}

template <class Acc>
void slope_of(const Acc* z, int count, const LogitTransform<Acc>& transform, Acc* gradient) {
  for (int i = 0; i < count; ++i) gradient[i] *= transform.slope(z[i]);
}

template <class Acc>
Acc squares_of(const Acc* z, int count, Acc shift, Acc inverse_temperature) {
  Acc lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const Acc e = exp_vectorizable(clamp_exponent((z[i + j] - shift) * inverse_temperature));
      lanes[j] += e * e;
    }
  }
  for (int j = 0; i < count; ++i, ++j) {
    const Acc e = exp_vectorizable(clamp_exponent((z[i] - shift) * inverse_temperature));
    lanes[j] += e * e;
  }
  for (int j = 1; j < kLanes; ++j) lanes[0] += lanes[j];
  return lanes[0];
}
