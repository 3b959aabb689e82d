// The value type with one lane: plain C++, on every machine. It says what all of them do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "core/target.h"

namespace onepass {
namespace {

// A constant, not a call: no function of the standard library may be left in a kernel unit.
template <class S>
constexpr S kSmallestNormal = std::numeric_limits<S>::min();

// An integer: the bits of a float, or random ones.
struct OneInteger {
  std::uint32_t value;

  HD explicit OneInteger(std::uint32_t x) : value(x) {}
  HD static OneInteger load(const std::uint32_t* from) { return OneInteger(*from); }
  HD void store(std::uint32_t* to) const { *to = value; }

  HD friend OneInteger operator+(OneInteger a, OneInteger b) { return OneInteger(a.value + b.value); }
  HD friend OneInteger operator-(OneInteger a, OneInteger b) { return OneInteger(a.value - b.value); }
  HD friend OneInteger operator&(OneInteger a, OneInteger b) { return OneInteger(a.value & b.value); }
  HD friend OneInteger operator^(OneInteger a, OneInteger b) { return OneInteger(a.value ^ b.value); }
  HD friend OneInteger operator<<(OneInteger a, int n) { return OneInteger(a.value << n); }
  HD friend OneInteger operator>>(OneInteger a, int n) { return OneInteger(a.value >> n); }
  // Of the lower 16 bits, of numbers below 2**16.
  HD friend OneInteger product16(OneInteger a, std::uint32_t x) { return OneInteger(a.value * x & 0xFFFFU); }
  HD friend OneInteger shift_right(OneInteger a, int n) {
    return OneInteger(static_cast<std::uint32_t>(static_cast<std::int32_t>(a.value) >> n));
  }
};

// A lane of Philox (philox.h).
struct OneWord {
  static constexpr std::size_t lanes = 1;
  static constexpr std::size_t parts = 1;  // that make a vector of integers
  std::uint64_t value;

  OneWord() = default;
  HD explicit OneWord(std::uint64_t x) : value(x) {}
  HD static OneWord counting(std::uint64_t start) { return OneWord(start); }  // start, start + parts, ...
  HD friend OneWord operator^(OneWord a, OneWord b) { return OneWord(a.value ^ b.value); }
  HD friend OneWord multiply(OneWord a, std::uint32_t x) { return OneWord((a.value & 0xFFFFFFFFU) * x); }
  HD friend OneWord upper(OneWord a) { return OneWord(a.value >> 32U); }
  // The lower halves of the parts, in turns.
  HD static OneInteger merge(const OneWord (&part)[parts]) {
    return OneInteger(static_cast<std::uint32_t>(part[0].value));
  }
};

template <class S>
struct OneLane {
  using Scalar = S;
  using Integers = OneInteger;
  static constexpr std::size_t lanes = 1;
  S value = 0;

  OneLane() = default;
  HD explicit OneLane(S x) : value(x) {}

  // memcpy: an array may start at any byte.
  template <class D>
  HD static OneLane load(const std::byte* from) {
    typename D::Storage x;
    __builtin_memcpy(&x, from, sizeof x);  // NOLINT(clang-analyzer-unix.cstring.UninitializedRead): lost in loops
    return OneLane(static_cast<S>(D::widen(x)));
  }
  // Of a value that is one of D: round() comes first, or store_nearest() does both.
  template <class D>
  HD void store(std::byte* to) const {
    const typename D::Storage x = D::narrow(value);
    __builtin_memcpy(to, &x, sizeof x);
  }
  template <class D>
  HD OneLane round() const {
    return OneLane(D::widen(D::narrow(value)));
  }
  // By chance, with 16 random bits.
  template <class D>
  HD OneLane round(OneInteger random) const {
    if constexpr (sizeof(typename D::Storage) < sizeof(S)) {
      return OneLane(D::widen(D::narrow(value, random.value)));
    } else {
      return *this;
    }
  }
  template <class D>
  HD void store_nearest(std::byte* to) const {
    store<D>(to);
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
  template <class D>
  HD void store_nearest_part(std::byte* to, std::size_t /*count*/) const {
    store<D>(to);
  }
  // Of split numbers.
  HD static OneLane join(const std::byte* high, const std::byte* low) {
    Split split;
    __builtin_memcpy(&split.high, high, sizeof split.high);
    __builtin_memcpy(&split.low, low, sizeof split.low);
    return OneLane(split.value());
  }
  HD static OneLane join_part(const std::byte* high, const std::byte* low, std::size_t /*count*/) {
    return join(high, low);
  }
  HD void split(std::byte* high, std::byte* low) const {
    const Split split = Split::of(value);
    __builtin_memcpy(high, &split.high, sizeof split.high);
    __builtin_memcpy(low, &split.low, sizeof split.low);
  }
  HD void split_part(std::byte* high, std::byte* low, std::size_t /*count*/) const { split(high, low); }
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
  HD friend OneLane min(OneLane a, OneLane b) { return a.value < b.value ? a : b; }
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

HD OneInteger bits_of(OneLane<float> a) { return OneInteger(onepass::bits_of(a.value)); }
HD OneLane<float> float_of(OneInteger a) { return OneLane<float>(onepass::float_of(a.value)); }
HD OneLane<float> to_float(OneInteger a) {
  return OneLane<float>(static_cast<float>(static_cast<std::int32_t>(a.value)));
}

}  // namespace
}  // namespace onepass
