// The statistics of a channel, in float64: how those of its parts are merged, and what follows from them.
#pragma once

#include <cstddef>

#include "core/target.h"

namespace onepass::batchnorm {
namespace {

// A mean as a pair: rounded to the compute type, and the rest.
template <class S>
struct Split {
  S high;
  double low;
  HD explicit Split(double mean) : high(static_cast<S>(mean)), low(mean - static_cast<double>(high)) {}
};

// Mean and sum of squared deviations of `count` values, from the sums of their deviations from `center` and of the
// squares of these (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983, eq. 1.7). The center
// need only be near the mean: what it misses is made up for.
struct Moments {
  double mean, m2;
  template <class S>
  HD Moments(S center, S sum, S squares, double count)
      : mean(static_cast<double>(center) + static_cast<double>(sum) / count),
        m2(static_cast<double>(squares) - static_cast<double>(sum) * static_cast<double>(sum) / count) {
    if (m2 < 0) m2 = 0;  // NaN survives
  }
};

// A center for that: the mean of a sample, rounded, from the sum of its deviations from its first value.
template <class S>
HD S center_of(S first, S sum, double count) {
  return static_cast<S>(static_cast<double>(first) + static_cast<double>(sum) / count);
}

// Merges the mean and the sum of squared deviations of `count` values into those of `before` ones, for each channel.
// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
HD void merge(std::size_t channels, double before, double count, const double* mean, const double* m2,
              double* total_mean, double* total_m2) {
  if (before == 0) {  // 0 * inf would be NaN
    for (std::size_t c = 0; c < channels; ++c) {
      total_mean[c] = mean[c];
      total_m2[c] = m2[c];
    }
    return;
  }
  const double share = count / (before + count);
  const double weight = before * share;
  for (std::size_t c = 0; c < channels; ++c) {
    const double delta = mean[c] - total_mean[c];
    total_mean[c] = total_mean[c] + delta * share;
    total_m2[c] = (total_m2[c] + m2[c]) + delta * delta * weight;
  }
}

// Squares beyond the compute type's range: a variance that is not known is NaN, so that it shows. Infinity would not:
// 1 / sqrt(inf) = 0.
HD double known_squares(double m2) { return m2 <= __DBL_MAX__ ? m2 : __builtin_nan(""); }

HD double inverse_deviation(double var, double eps) { return 1.0 / __builtin_sqrt(var + eps); }

// A term without weight is left out, not multiplied: 0 * inf is NaN.
HD double mixed(double running, double now, double momentum) {
  if (momentum == 0) return running;
  if (momentum == 1) return now;
  return (1.0 - momentum) * running + momentum * now;
}

// The constants of formulas.h, each rounded once.
template <class S>
struct ForwardConstants {
  S high, scale, offset;
  HD ForwardConstants(double mean, double invstd, double weight, double bias) {
    const Split<S> split(mean);
    const double factor = weight * invstd;
    high = split.high;
    scale = static_cast<S>(factor);
    offset = static_cast<S>(bias - split.low * factor);
  }
};

// From the sums of dy and of dy * (x - high) over the n values of a channel.
template <class S>
struct BackwardConstants {
  double dweight;
  S level, slope;
  HD BackwardConstants(double dy, double dy_x, double mean, double invstd, double n) {
    const double low = Split<S>(mean).low;
    dweight = (dy_x - low * dy) * invstd;
    const double factor = invstd * (dweight / n);
    slope = static_cast<S>(factor);
    level = static_cast<S>(dy / n - low * factor);
  }
};

}  // namespace
}  // namespace onepass::batchnorm
