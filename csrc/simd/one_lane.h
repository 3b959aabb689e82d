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
    __builtin_memcpy(&x, from, sizeof x);  // NOLINT(clang-analyzer-unix.cstring.UninitializedRead): lost in loops
    return OneLane(D::widen(x));
  }
  template <class D>
  HD void store(std::byte* to) const {
    const typename D::Storage x = D::narrow(value);
    __builtin_memcpy(to, &x, sizeof x);
  }
  // The first `count` lanes, 0 < count < lanes; the others are 0, or stay as they are in memory. One lane has no part.
  template <class D>
  HD static OneLane load_part(const std::byte* from, std::size_t /*count*/) {
    return load<D>(from);
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t /*count*/) const {
    store<D>(to);
  }
  // To an aligned address, past the caches where the machine can. Before others may read what was written so, fence().
  template <class D>
  HD void stream(std::byte* to) const {
    store<D>(to);
  }
  HD static void fence() {}
  HD friend OneLane first(std::size_t /*count*/, OneLane a, OneLane /*b*/) { return a; }  // then the lanes of b

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
  HD friend OneLane gate(OneLane a, OneLane y) { return y.value <= S(0) ? OneLane(S(0)) : a; }  // NaN passes a
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
