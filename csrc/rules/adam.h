// Adam (Kingma and Ba, 2015, algorithm 1) and, with step_g > 0, Nadam (Dozat, 2016, algorithm 2). AMSGrad (Reddi et
// al., 2018, algorithm 2) divides by the largest second moment so far.
#pragma once

#include "core/target.h"
#include "rules/names.h"

namespace onepass {
namespace {

struct Adam {
  static constexpr const char* name = "adam";
  static constexpr Names slots = names({"exp_avg", "exp_avg_sq"});
  static constexpr Names coefficients = names(
      {"beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "step_m", "step_g", "inv_bias2", "eps_root", "eps"});
  template <class S>
  struct Coefs {
    S beta1, one_minus_beta1, beta2, one_minus_beta2, step_m, step_g, inv_bias2, eps_root, eps;
  };
  template <class V, class C>
  HD static V step(V g, V* s, const C& c) {
    V& m = s[0];
    V& v = s[1];
    m = V(c.beta1) * m + V(c.one_minus_beta1) * g;
    v = V(c.beta2) * v + V(c.one_minus_beta2) * (g * g);
    return (V(c.step_m) * m + V(c.step_g) * g) / (sqrt(v * V(c.inv_bias2) + V(c.eps_root)) + V(c.eps));
  }
};

struct AmsGrad {
  static constexpr const char* name = "amsgrad";
  static constexpr Names slots = names({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"});
  static constexpr Names coefficients = names({"beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "step_m",
                                               "step_g", "pre", "inv_bias2", "eps_root", "eps"});
  template <class S>
  struct Coefs {
    S beta1, one_minus_beta1, beta2, one_minus_beta2, step_m, step_g, pre, inv_bias2, eps_root, eps;
  };
  template <class V, class C>
  HD static V step(V g, V* s, const C& c) {
    V& m = s[0];
    V& v = s[1];
    V& w = s[2];
    m = V(c.beta1) * m + V(c.one_minus_beta1) * g;
    v = V(c.beta2) * v + V(c.one_minus_beta2) * (g * g);
    // max is a choice, not arithmetic: whether it flushes a subnormal differs between machines, so none may reach it.
    w = max(flush(w), v * V(c.pre));  // NaN in v, the second operand, survives
    return (V(c.step_m) * m + V(c.step_g) * g) / (sqrt(w * V(c.inv_bias2) + V(c.eps_root)) + V(c.eps));
  }
};

}  // namespace
}  // namespace onepass
