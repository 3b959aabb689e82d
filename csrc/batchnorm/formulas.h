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
HD V normalize(V x, V high, V scale, V offset) {
  return (x - high) * scale + offset;
}

template <class V>
HD V rectify(V y) {
  return max(V(0), y);  // NaN, the second operand, survives
}

template <class V>
HD V input_gradient(V dy, V x, V high, V scale, V level, V slope) {
  return scale * ((dy - level) - (x - high) * slope);
}

}  // namespace
}  // namespace onepass::batchnorm
