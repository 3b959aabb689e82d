// The value type of a CUDA thread: N numbers of a compute type, which lie together in memory and are loaded and stored
// in pieces of up to 16 bytes. Arithmetic is that of simd/one_lane.h, number by number.
//
// The compiler flushes subnormals of float (--ftz=true). There is no such mode for double, so here its operations do.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/target.h"

namespace onepass::cuda {
namespace {

// --- Memory ----------------------------------------------------------------------------------------------------------

template <std::size_t bytes>
struct alignas(bytes) Chunk {
  std::uint32_t word[bytes / 4];
};
template <>
struct Chunk<2> {
  std::uint16_t word;
};

// N items of a storage type, from and to memory that is aligned to all of them, or to 16 bytes.
template <class T, std::size_t N>
struct Items {
  static constexpr std::size_t bytes = N * sizeof(T);
  static constexpr std::size_t piece = bytes < 16 ? bytes : 16;
  static_assert(bytes % piece == 0);
  T item[N];

  HD static Items load(const std::byte* from) {
    Items items;
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < bytes / piece; ++k) {
      const auto chunk = reinterpret_cast<const Chunk<piece>*>(from)[k];
      __builtin_memcpy(&items.item[k * piece / sizeof(T)], &chunk, piece);
    }
    return items;
  }
  HD void store(std::byte* to) const {
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < bytes / piece; ++k) {
      Chunk<piece> chunk;
      __builtin_memcpy(&chunk, &item[k * piece / sizeof(T)], piece);
      reinterpret_cast<Chunk<piece>*>(to)[k] = chunk;
    }
  }
};

// --- Arithmetic ------------------------------------------------------------------------------------------------------

inline constexpr double kSmallestDouble = 0x1p-1022;  // that is not subnormal

// A zero of the same sign in the place of a subnormal.
HD double without_subnormals(double x) { return __builtin_fabs(x) < kSmallestDouble ? __builtin_copysign(0.0, x) : x; }

template <class S>
HD S as_read(S x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<S, double>) return without_subnormals(x);
#endif
  return x;
}

// What processors that flush make of a product or quotient: they judge the result as it would be rounded if the
// exponent had no end. Where it was rounded up to the smallest normal number only because the end was near, it is zero.
// `scaled`: the same product or quotient, times 2**600.
template <class Scaled>
HD double flushed(double result, Scaled scaled) {
  if (__builtin_fabs(result) > kSmallestDouble || result != result) return result;
  const bool tiny = __builtin_fabs(result) < kSmallestDouble || __builtin_fabs(scaled()) < 0x1p-422;
  return tiny ? __builtin_copysign(0.0, result) : result;
}

HD float sum(float a, float b) { return a + b; }
HD float difference(float a, float b) { return a - b; }
HD float product(float a, float b) { return a * b; }
HD float quotient(float a, float b) { return a / b; }
HD float root(float a) { return __builtin_sqrtf(a); }
HD double root(double a) { return __builtin_sqrt(a); }
#if defined(__CUDA_ARCH__)
HD double sum(double a, double b) { return without_subnormals(a + b); }  // exact where it is subnormal
HD double difference(double a, double b) { return without_subnormals(a - b); }
HD double product(double a, double b) {
  return flushed(a * b, [=] { return a * 0x1p600 * b; });
}
HD double quotient(double a, double b) {
  return flushed(a / b, [=] { return a * 0x1p600 / b; });
}
#else
HD double sum(double a, double b) { return a + b; }
HD double difference(double a, double b) { return a - b; }
HD double product(double a, double b) { return a * b; }
HD double quotient(double a, double b) { return a / b; }
#endif

HD float smallest_normal(float /*of*/) { return kSmallestFloat; }
HD double smallest_normal(double /*of*/) { return kSmallestDouble; }
HD float magnitude(float x) { return __builtin_fabsf(x); }
HD double magnitude(double x) { return __builtin_fabs(x); }

// --- Narrow types ----------------------------------------------------------------------------------------------------

// D::narrow() of N numbers.
template <class D, class S, std::size_t N>
HD void narrow(const S (&value)[N], typename D::Storage (&to)[N]) {
  ONEPASS_UNROLL
  for (std::size_t k = 0; k < N; ++k) to[k] = D::narrow(value[k]);
}

#if defined(__CUDA_ARCH__)
// One instruction for two numbers, where it took 14. It makes every NaN the same one.
template <>
HD void narrow<BFloat16, float, 1>(const float (&value)[1], std::uint16_t (&to)[1]) {
  std::uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value[0]));
  to[0] = value[0] != value[0] ? static_cast<std::uint16_t>(bits_of(value[0]) >> 16U | 0x40U) : bits;
}
template <std::size_t N>
HD void narrow_pairs(const float (&value)[N], std::uint16_t (&to)[N]) {
  ONEPASS_UNROLL
  for (std::size_t k = 0; k < N; k += 2) {
    std::uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(value[k + 1]), "f"(value[k]));
    const std::uint32_t low = bits_of(value[k]) >> 16U | 0x40U;
    const std::uint32_t high = bits_of(value[k + 1]) >> 16U | 0x40U;
    to[k] = static_cast<std::uint16_t>(value[k] != value[k] ? low : bits & 0xFFFFU);
    to[k + 1] = static_cast<std::uint16_t>(value[k + 1] != value[k + 1] ? high : bits >> 16U);
  }
}
template <>
HD void narrow<BFloat16, float, 2>(const float (&value)[2], std::uint16_t (&to)[2]) {
  narrow_pairs(value, to);
}
template <>
HD void narrow<BFloat16, float, 4>(const float (&value)[4], std::uint16_t (&to)[4]) {
  narrow_pairs(value, to);
}
template <>
HD void narrow<BFloat16, float, 8>(const float (&value)[8], std::uint16_t (&to)[8]) {
  narrow_pairs(value, to);
}
#endif

// --- The value -------------------------------------------------------------------------------------------------------

template <std::size_t N>
struct IntegerPack {
  std::uint32_t value[N];

  // Of the lower 16 bits, of numbers below 2**16.
  HD friend IntegerPack product16(IntegerPack a, std::uint32_t x) {
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < N; ++k) a.value[k] = a.value[k] * x & 0xFFFFU;
    return a;
  }
};

template <class S, std::size_t N>
struct Pack {
  using Scalar = S;
  using Integers = IntegerPack<N>;
  static constexpr std::size_t lanes = N;
  S value[N];

  Pack() = default;
  HD explicit Pack(S x) {
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < N; ++k) value[k] = x;
  }

  // Aligned as Items has it.
  template <class D>
  HD static Pack load(const std::byte* from) {
    const auto items = Items<typename D::Storage, N>::load(from);
    Pack pack;
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < N; ++k) pack.value[k] = as_read(static_cast<S>(D::widen(items.item[k])));
    return pack;
  }
  // Of values that are some of D: round() comes first, or store_nearest() does both.
  template <class D>
  HD void store(std::byte* to) const {
    Items<typename D::Storage, N> items;
    narrow<D>(value, items.item);
    items.store(to);
  }
  template <class D>
  HD void store_nearest(std::byte* to) const {
    store<D>(to);
  }
  template <class D>
  HD Pack round() const {
    if constexpr (std::is_same_v<typename D::Storage, S>) {
      return *this;
    } else {
      typename D::Storage items[N];
      narrow<D>(value, items);
      Pack pack;
      ONEPASS_UNROLL
      for (std::size_t k = 0; k < N; ++k) pack.value[k] = static_cast<S>(D::widen(items[k]));
      return pack;
    }
  }
  // By chance, with 16 random bits for each.
  template <class D>
  HD Pack round(IntegerPack<N> random) const {
    if constexpr (sizeof(typename D::Storage) < sizeof(S)) {
      Pack pack;
      ONEPASS_UNROLL
      for (std::size_t k = 0; k < N; ++k) {
        pack.value[k] = static_cast<S>(D::widen(D::narrow(value[k], random.value[k])));
      }
      return pack;
    } else {
      return *this;
    }
  }
  // Of split numbers.
  HD static Pack join(const std::byte* high, const std::byte* low) {
    const auto upper = Items<std::uint16_t, N>::load(high);
    const auto lower = Items<std::uint16_t, N>::load(low);
    Pack pack;
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < N; ++k) pack.value[k] = Split{upper.item[k], lower.item[k]}.value();
    return pack;
  }
  HD void split(std::byte* high, std::byte* low) const {
    Items<std::uint16_t, N> upper;
    Items<std::uint16_t, N> lower;
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < N; ++k) {
      const Split split = Split::of(value[k]);
      upper.item[k] = split.high;
      lower.item[k] = split.low;
    }
    upper.store(high);
    lower.store(low);
  }

  HD friend Pack operator+(const Pack& a, const Pack& b) {
    return each(a, b, [](S x, S y) { return sum(x, y); });
  }
  HD friend Pack operator-(const Pack& a, const Pack& b) {
    return each(a, b, [](S x, S y) { return difference(x, y); });
  }
  HD friend Pack operator*(const Pack& a, const Pack& b) {
    return each(a, b, [](S x, S y) { return product(x, y); });
  }
  HD friend Pack operator/(const Pack& a, const Pack& b) {
    return each(a, b, [](S x, S y) { return quotient(x, y); });
  }
  HD friend Pack max(const Pack& a, const Pack& b) {
    return each(a, b, [](S x, S y) { return x > y ? x : y; });
  }
  HD friend Pack min(const Pack& a, const Pack& b) {
    return each(a, b, [](S x, S y) { return x < y ? x : y; });
  }
  HD friend Pack sqrt(const Pack& a) {
    return each(a, a, [](S x, S /*x*/) { return root(x); });
  }
  // A subnormal as a zero of its sign. Arithmetic does this by itself.
  HD friend Pack flush(const Pack& a) {
    return each(a, a, [](S x, S /*x*/) {
      return magnitude(x) < smallest_normal(x) ? static_cast<S>(__builtin_copysign(S(0), x)) : x;
    });
  }
  HD friend Pack gate(const Pack& a, const Pack& y) {  // NaN passes a
    return each(a, y, [](S x, S z) { return z <= S(0) ? S(0) : x; });
  }
  HD friend Pack sign(const Pack& a) {  // 1, -1, or +0 for a zero of either sign; NaN stays NaN
    return each(a, a, [](S x, S /*x*/) {
      if (x > S(0)) return S(1);
      if (x < S(0)) return S(-1);
      return x == S(0) ? S(0) : x;
    });
  }

 private:
  template <class Operation>
  HD static Pack each(const Pack& a, const Pack& b, Operation operation) {
    Pack result;
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < N; ++k) result.value[k] = operation(a.value[k], b.value[k]);
    return result;
  }
};

}  // namespace
}  // namespace onepass::cuda
