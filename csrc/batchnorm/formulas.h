// Batch normalization (Ioffe and Szegedy, 2015, algorithm 1 and section 3): what is computed for each element, over a
// value type V.
//
// x - mean would lose the digits of a mean that is large beside the deviation. So the mean is a pair, high + low:
// `high` is the mean rounded to the compute type, x - high is exact or nearly so, and what `low` contributes is
// constant over a channel. It is taken into the constants, in float64, and costs nothing per element:
//
//   y  = (x - mean) * scale + bias                     = (x - high) * scale + offset
//        offset = bias - low * scale
//   dx = scale * (dy - mean(dy) - xhat * mean(dy * xhat))
//                                                      = scale * ((dy - level) - (x - high) * slope)
//        slope = invstd * mean(dy * xhat),  level = mean(dy) - low * slope
#pragma once

#include "core/target.h"

namespace onepass::batchnorm {
namespace {

template <class V>
struct Pair {
  V first, second;
};

// What a value contributes to the moments, and what it contributes to the gradients of bias and weight.
template <class V>
HD Pair<V> deviation_terms(V x, V center) {
  const V d = x - center;
  return {d, d * d};
}
template <class V>
HD Pair<V> gradient_terms(V dy, V x, V high) {
  return {dy, dy * (x - high)};
}

template <class V>
HD V normalize(V x, V high, V scale, V offset) {
  return (x - high) * scale + offset;
}

template <class V>
HD V add_residual(V y, V residual) {
  return y + residual;
}

template <class V>
HD V rectify(V y) {
  return max(V(0), y);  // NaN, the second operand, survives
}

// The gradient that passes back through it. A choice, not arithmetic: no subnormal may reach it.
template <class V>
HD V rectified_gradient(V dy, V y) {
  return gate(flush(dy), y);
}

template <class V>
HD V frozen_gradient(V dy, V scale) {
  return dy * scale;
}

template <class V>
HD V input_gradient(V dy, V x, V high, V scale, V level, V slope) {
  return scale * ((dy - level) - (x - high) * slope);
}

}  // namespace
}  // namespace onepass::batchnorm
