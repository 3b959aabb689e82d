// AdaSqrt (Hu, Lin and Tang, 2019, algorithm 1): the accumulated squares divide the step, without a root; the learning
// rate grows with the root of the step count.
#pragma once

#include "core/target.h"
#include "rules/names.h"

namespace onepass {
namespace {

struct AdaSqrt {
  static constexpr const char* name = "adasqrt";
  static constexpr Names slots = names({"square_sum"});
  static constexpr Names coefficients = names({"step", "eps"});
  template <class S>
  struct Coefs {
    S step, eps;
  };
  template <class V, class C>
  HD static V step(V g, V* s, const C& c) {
    V& sum = s[0];
    sum = sum + g * g;
    return V(c.step) * g / (sum + V(c.eps));
  }
};

}  // namespace
}  // namespace onepass
