// Sums in an order that follows from the number of terms alone, and what norms decide.
#pragma once

#include <cstddef>

#include "core/kernel.h"
#include "core/target.h"

namespace onepass {

inline constexpr std::size_t kSumLanes = 32;

// Adds the upper half of the lanes to the lower one, until one is left: it is the sum.
template <class T>
HD void add_lanes(T (&lanes)[kSumLanes]) {
  for (std::size_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (std::size_t l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  }
}

// The sum of term(0) ... term(count - 1): term i goes to lane i % kSumLanes, then the lanes are added as a tree.
template <class Term>
double ordered_sum(std::size_t count, Term term) {
  double lanes[kSumLanes] = {};
  for (std::size_t i = 0; i < count; ++i) lanes[i % kSumLanes] = lanes[i % kSumLanes] + term(i);
  add_lanes(lanes);
  return lanes[0];
}

// The norm of gradients, from the sum of their squares before they were scaled.
HD double norm_of(double squares, const Scaling& scaling, bool summed) {
  return summed ? __builtin_sqrt(squares) / scaling.accumulate : scaling.scale * __builtin_sqrt(squares);
}

// What brings a norm down to its limit. NaN stays NaN: all of the gradient is scaled by it.
HD double clip_factor(double norm, double limit) { return norm <= limit ? 1.0 : limit / norm; }

}  // namespace onepass
