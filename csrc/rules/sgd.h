// Stochastic gradient descent (Robbins and Monro, 1951, eq. 6).
#pragma once

#include "core/target.h"
#include "rules/names.h"

namespace onepass {
namespace {

struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr Names slots = names({});
  static constexpr Names coefficients = names({"step"});
  template <class S>
  struct Coefs {
    S step;
  };
  template <class V, class C>
  HD static V step(V g, V* /*slots*/, const C& c) {
    return V(c.step) * g;
  }
};

}  // namespace
}  // namespace onepass
