// Steps divided by the root of an accumulated second moment: AdaGrad (Duchi et al., 2011, eq. 1) with rho = weight = 1,
// RMSprop (Hinton, 2012, lecture 6e) with rho and 1 - rho. The centered form (Graves, 2013, eq. 38-45) subtracts the
// squared mean; the momentum forms accumulate the divided steps.
#pragma once

#include <type_traits>

#include "core/target.h"
#include "rules/names.h"

namespace onepass {
namespace {

template <class S>
struct SecondMomentCoefs {
  S rho, weight, step, eps_root, eps;
};

template <class S>
struct SecondMomentMomentumCoefs {
  S rho, weight, mu, step_b, step, eps_root, eps;
};

template <bool centered, bool momentum>
struct SecondMoment {
  static constexpr const char* name = centered
                                          ? (momentum ? "second_moment_centered_momentum" : "second_moment_centered")
                                          : (momentum ? "second_moment_momentum" : "second_moment");
  static constexpr Names slots =
      names({"square_avg", centered ? "grad_avg" : nullptr, momentum ? "velocity" : nullptr});
  static constexpr Names coefficients = momentum ? names({"rho", "weight", "mu", "step_b", "step", "eps_root", "eps"})
                                                 : names({"rho", "weight", "step", "eps_root", "eps"});
  template <class S>
  using Coefs = std::conditional_t<momentum, SecondMomentMomentumCoefs<S>, SecondMomentCoefs<S>>;

  template <class V, class C>
  HD static V step(V g, V* s, const C& c) {
    V& r = s[0];
    r = V(c.rho) * r + V(c.weight) * (g * g);
    V moment = r;
    if constexpr (centered) {
      V& a = s[1];
      a = V(c.rho) * a + V(c.weight) * g;
      moment = max(V(0), r - a * a);  // rounding can make it negative; NaN, the second operand, survives
    }
    const V divisor = sqrt(moment + V(c.eps_root)) + V(c.eps);
    if constexpr (momentum) {
      V& b = s[centered ? 2 : 1];
      b = V(c.mu) * b + V(c.step_b) * g / divisor;
      return V(c.step) * b;
    } else {
      return V(c.step) * g / divisor;
    }
  }
};

}  // namespace
}  // namespace onepass
