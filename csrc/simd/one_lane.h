// The value type with one lane: plain C++, on every machine. It is also the tail of every other one.
#pragma once

#include <cstddef>
#include <limits>

#include "core/target.h"

namespace onepass {
namespace {

// A constant, not a call: no function of the standard library may be left in a kernel unit.
template <class S>
constexpr S kSmallestNormal = std::numeric_limits<S>::min();

template <class S>
struct OneLane {
  using Scalar = S;
  static constexpr std::size_t lanes = 1;
  S value = 0;

  OneLane() = default;
  HD explicit OneLane(S x) : value(x) {}

  // memcpy: an array may start at any byte.
  template <class D>
  HD static OneLane load(const std::byte* from) {
    typename D::Storage x;
    __builtin_memcpy(&x, from, sizeof x);
    return OneLane(D::widen(x));
  }
  template <class D>
  HD void store(std::byte* to) const {
    const typename D::Storage x = D::narrow(value);
    __builtin_memcpy(to, &x, sizeof x);
  }

  HD friend OneLane operator+(OneLane a, OneLane b) { return OneLane(a.value + b.value); }
  HD friend OneLane operator-(OneLane a, OneLane b) { return OneLane(a.value - b.value); }
  HD friend OneLane operator*(OneLane a, OneLane b) { return OneLane(a.value * b.value); }
  HD friend OneLane operator/(OneLane a, OneLane b) { return OneLane(a.value / b.value); }
  HD friend OneLane max(OneLane a, OneLane b) { return a.value > b.value ? a : b; }
  HD friend OneLane sqrt(OneLane a) { return OneLane(root(a.value)); }
  // A subnormal as a zero of its sign. Arithmetic does this by itself, in the mode in which kernels run.
  HD friend OneLane flush(OneLane a) {
    return magnitude(a.value) < kSmallestNormal<S> ? OneLane(static_cast<S>(__builtin_copysign(S(0), a.value))) : a;
  }
  HD friend OneLane sign(OneLane a) {  // 1, -1, or +0 for a zero of either sign; NaN stays NaN
    if (a.value > S(0)) return OneLane(S(1));
    if (a.value < S(0)) return OneLane(S(-1));
    return a.value == S(0) ? OneLane(S(0)) : a;
  }

 private:
  HD static float magnitude(float x) { return __builtin_fabsf(x); }
  HD static double magnitude(double x) { return __builtin_fabs(x); }
  HD static float root(float x) { return __builtin_sqrtf(x); }
  HD static double root(double x) { return __builtin_sqrt(x); }
};

}  // namespace
}  // namespace onepass
