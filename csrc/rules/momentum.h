// Momentum (Polyak, 1964, eq. 9) and Nesterov's accelerated gradient (Sutskever et al., 2013, eq. 3 and 4): where the
// learning rate stands, and whether the gradient enters a second time, is a matter of coefficients.
#pragma once

#include "core/target.h"
#include "rules/names.h"

namespace onepass {
namespace {

struct Momentum {
  static constexpr const char* name = "momentum";
  static constexpr Names slots = names({"velocity"});
  static constexpr Names coefficients = names({"mu", "weight", "step_v", "step_g"});
  template <class S>
  struct Coefs {
    S mu, weight, step_v, step_g;
  };
  template <class V, class C>
  HD static V step(V g, V* s, const C& c) {
    V& v = s[0];
    v = V(c.mu) * v + V(c.weight) * g;
    return V(c.step_v) * v + V(c.step_g) * g;
  }
};

}  // namespace
}  // namespace onepass
