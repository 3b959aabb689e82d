// 8 floats or 4 doubles.
#pragma once

#if !defined(__AVX2__)
#error "simd/avx2.h belongs into a unit that is compiled for AVX2"
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/kernel.h"
#include "simd/one_lane.h"

namespace onepass {
namespace {

constexpr Isa kIsa = Isa::avx2;

// 8 integers: the bits of floats, or random ones.
struct UInt32x8 {
  __m256i value;

  HD explicit UInt32x8(std::uint32_t x) : value(_mm256_set1_epi32(static_cast<int>(x))) {}
  HD explicit UInt32x8(__m256i x) : value(x) {}
  HD static UInt32x8 load(const std::uint32_t* from) {
    return UInt32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  HD void store(std::uint32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }

  HD friend UInt32x8 operator+(UInt32x8 a, UInt32x8 b) { return UInt32x8(_mm256_add_epi32(a.value, b.value)); }
  HD friend UInt32x8 operator-(UInt32x8 a, UInt32x8 b) { return UInt32x8(_mm256_sub_epi32(a.value, b.value)); }
  HD friend UInt32x8 operator&(UInt32x8 a, UInt32x8 b) { return UInt32x8(_mm256_and_si256(a.value, b.value)); }
  HD friend UInt32x8 operator^(UInt32x8 a, UInt32x8 b) { return UInt32x8(_mm256_xor_si256(a.value, b.value)); }
  HD friend UInt32x8 operator<<(UInt32x8 a, int n) { return UInt32x8(_mm256_slli_epi32(a.value, n)); }
  HD friend UInt32x8 operator>>(UInt32x8 a, int n) { return UInt32x8(_mm256_srli_epi32(a.value, n)); }
  // Of the lower 16 bits, of numbers below 2**16.
  HD friend UInt32x8 product16(UInt32x8 a, std::uint32_t x) {
    return UInt32x8(_mm256_mullo_epi16(a.value, UInt32x8(x).value));
  }
  HD friend UInt32x8 shift_right(UInt32x8 a, int n) { return UInt32x8(_mm256_srai_epi32(a.value, n)); }
};

// The lanes of Philox (philox.h): 4 of 64 bits.
struct Words64x4 {
  static constexpr std::size_t lanes = 4;
  static constexpr std::size_t parts = 2;  // that make a vector of integers
  __m256i value;

  Words64x4() = default;
  HD explicit Words64x4(std::uint64_t x) : value(_mm256_set1_epi64x(static_cast<long long>(x))) {}
  HD explicit Words64x4(__m256i x) : value(x) {}
  HD static Words64x4 counting(std::uint64_t start) {
    return Words64x4(_mm256_add_epi64(Words64x4(start).value, _mm256_setr_epi64x(0, 2, 4, 6)));
  }
  HD friend Words64x4 operator^(Words64x4 a, Words64x4 b) { return Words64x4(_mm256_xor_si256(a.value, b.value)); }
  HD friend Words64x4 multiply(Words64x4 a, std::uint32_t x) {
    return Words64x4(_mm256_mul_epu32(a.value, Words64x4(std::uint64_t{x}).value));
  }
  HD friend Words64x4 upper(Words64x4 a) { return Words64x4(_mm256_srli_epi64(a.value, 32)); }
  // The lower halves of the parts, in turns.
  HD static UInt32x8 merge(const Words64x4 (&part)[parts]) {
    return UInt32x8(_mm256_blend_epi32(part[0].value, _mm256_slli_epi64(part[1].value, 32), 0xAA));
  }
};

// Fewer than 8 numbers of 16 bits; AVX2 masks none so short.
HD __m128i load_halves(const std::byte* from, std::size_t count) {
  std::uint16_t halves[8] = {};
  std::size_t k = 0;
  if ((count & 4U) != 0) __builtin_memcpy(halves, from, 8), k = 4;
  if ((count & 2U) != 0) __builtin_memcpy(halves + k, from + 2 * k, 4), k += 2;
  if ((count & 1U) != 0) __builtin_memcpy(halves + k, from + 2 * k, 2);
  __m128i value;
  __builtin_memcpy(&value, halves, sizeof value);
  return value;
}
HD void store_halves(__m128i value, std::byte* to, std::size_t count) {
  std::uint16_t halves[8];
  __builtin_memcpy(halves, &value, sizeof value);
  std::size_t k = 0;
  if ((count & 4U) != 0) __builtin_memcpy(to, halves, 8), k = 4;
  if ((count & 2U) != 0) __builtin_memcpy(to + 2 * k, halves + k, 4), k += 2;
  if ((count & 1U) != 0) __builtin_memcpy(to + 2 * k, halves + k, 2);
}

struct Float32x8;
HD Float32x8 float_of(UInt32x8 a);
HD Float32x8 to_float(UInt32x8 a);

struct Float32x8 {
  using Scalar = float;
  using Integers = UInt32x8;
  static constexpr std::size_t lanes = 8;
  __m256 value;

  Float32x8() = default;
  HD explicit Float32x8(float x) : value(_mm256_set1_ps(x)) {}
  HD explicit Float32x8(__m256 x) : value(x) {}

  template <class D>
  HD static Float32x8 load(const std::byte* from) {
    if constexpr (std::is_same_v<D, Float32>) {
      return Float32x8(_mm256_loadu_ps(reinterpret_cast<const float*>(from)));
    } else {
      return widen<D>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
  }
  template <class D>
  HD void store(std::byte* to) const {
    if constexpr (std::is_same_v<D, Float32>) {
      _mm256_storeu_ps(reinterpret_cast<float*>(to), value);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pack<D>());
    }
  }
  template <class D>
  HD static Float32x8 load_part(const std::byte* from, std::size_t count) {
    if constexpr (std::is_same_v<D, Float32>) {
      return Float32x8(_mm256_maskload_ps(reinterpret_cast<const float*>(from), first_lanes(count)));
    } else {
      return widen<D>(load_halves(from, count));
    }
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    if constexpr (std::is_same_v<D, Float32>) {
      _mm256_maskstore_ps(reinterpret_cast<float*>(to), first_lanes(count), value);
    } else {
      store_halves(pack<D>(), to, count);
    }
  }
  template <class D>
  HD Float32x8 round() const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(nearest() & UInt32x8(0xFFFF0000U));
    } else if constexpr (std::is_same_v<D, Float16>) {
      return widen<D>(pack<D>());
    } else {
      return *this;
    }
  }
  template <class D>
  HD Float32x8 round(UInt32x8 random) const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(raised(random) & UInt32x8(0xFFFF0000U));
    } else if constexpr (std::is_same_v<D, Float16>) {
      const __m256 magnitude = _mm256_set1_ps(-0.0F);
      const __m128i truncated = _mm256_cvtps_ph(value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
      const __m256 below = _mm256_andnot_ps(magnitude, _mm256_cvtph_ps(truncated));
      const __m256 rest = _mm256_sub_ps(_mm256_andnot_ps(magnitude, value), below);
      const __m256 exponent = float_of(bits_of(Float32x8(below)) & UInt32x8(0x7F800000U)).value;
      const __m256 unit = _mm256_max_ps(_mm256_mul_ps(exponent, _mm256_set1_ps(0x1p-10F)), _mm256_set1_ps(0x1p-24F));
      const Float32x8 share = to_float(UInt32x8(65536U) - random) * Float32x8(0x1p-16F);
      const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(rest, _mm256_mul_ps(unit, share.value), _CMP_GE_OQ));
      const __m128i minus_one = _mm_packs_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
      return widen<D>(_mm_sub_epi16(truncated, minus_one));
    } else {
      return *this;
    }
  }
  template <class D>
  HD void store_nearest(std::byte* to) const {
    round_for_store<D>().template store<D>(to);
  }
  template <class D>
  HD void store_nearest_part(std::byte* to, std::size_t count) const {
    round_for_store<D>().template store_part<D>(to, count);
  }
  HD static Float32x8 join(const std::byte* high, const std::byte* low) {
    return joined(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)),
                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
  }
  HD static Float32x8 join_part(const std::byte* high, const std::byte* low, std::size_t count) {
    return joined(load_halves(high, count), load_halves(low, count));
  }
  HD void split(std::byte* high, std::byte* low) const {
    const UInt32x8 bits = split_bits();
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), upper_halves(bits + UInt32x8(0x8000U)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), lower_halves(bits));
  }
  HD void split_part(std::byte* high, std::byte* low, std::size_t count) const {
    const UInt32x8 bits = split_bits();
    store_halves(upper_halves(bits + UInt32x8(0x8000U)), high, count);
    store_halves(lower_halves(bits), low, count);
  }
  template <class D>
  HD void stream(std::byte* to) const {
    static_assert(std::is_same_v<D, Float32>);
    _mm256_stream_ps(reinterpret_cast<float*>(to), value);
  }
  HD static void fence() { _mm_sfence(); }
  HD friend Float32x8 first(std::size_t count, Float32x8 a, Float32x8 b) {
    return Float32x8(_mm256_blendv_ps(b.value, a.value, _mm256_castsi256_ps(first_lanes(count))));
  }

  HD friend Float32x8 operator+(Float32x8 a, Float32x8 b) { return Float32x8(_mm256_add_ps(a.value, b.value)); }
  HD friend Float32x8 operator-(Float32x8 a, Float32x8 b) { return Float32x8(_mm256_sub_ps(a.value, b.value)); }
  HD friend Float32x8 operator*(Float32x8 a, Float32x8 b) { return Float32x8(_mm256_mul_ps(a.value, b.value)); }
  HD friend Float32x8 operator/(Float32x8 a, Float32x8 b) { return Float32x8(_mm256_div_ps(a.value, b.value)); }
  HD friend Float32x8 max(Float32x8 a, Float32x8 b) { return Float32x8(_mm256_max_ps(a.value, b.value)); }
  HD friend Float32x8 min(Float32x8 a, Float32x8 b) { return Float32x8(_mm256_min_ps(a.value, b.value)); }
  HD friend UInt32x8 bits_of(Float32x8 a) { return UInt32x8(_mm256_castps_si256(a.value)); }
  HD friend Float32x8 float_of(UInt32x8 a) { return Float32x8(_mm256_castsi256_ps(a.value)); }
  HD friend Float32x8 to_float(UInt32x8 a) { return Float32x8(_mm256_cvtepi32_ps(a.value)); }
  HD friend Float32x8 sqrt(Float32x8 a) { return Float32x8(_mm256_sqrt_ps(a.value)); }
  HD friend Float32x8 flush(Float32x8 a) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), a.value);
    const __m256 subnormal = _mm256_cmp_ps(magnitude, _mm256_set1_ps(kSmallestNormal<float>), _CMP_LT_OQ);
    return Float32x8(_mm256_andnot_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0F), subnormal), a.value));
  }
  HD friend Float32x8 gate(Float32x8 a, Float32x8 y) {
    const __m256 closed = _mm256_cmp_ps(y.value, _mm256_setzero_ps(), _CMP_LE_OQ);
    return Float32x8(_mm256_andnot_ps(closed, a.value));
  }
  HD friend Float32x8 sign(Float32x8 a) {
    const __m256 zero = _mm256_setzero_ps();
    const __m256 up = _mm256_and_ps(_mm256_cmp_ps(a.value, zero, _CMP_GT_OQ), _mm256_set1_ps(1.0F));
    const __m256 down = _mm256_and_ps(_mm256_cmp_ps(a.value, zero, _CMP_LT_OQ), _mm256_set1_ps(-1.0F));
    const __m256 nan = _mm256_and_ps(_mm256_cmp_ps(a.value, a.value, _CMP_UNORD_Q), a.value);
    return Float32x8(_mm256_or_ps(_mm256_or_ps(up, down), nan));
  }

 private:
  HD static __m256i first_lanes(std::size_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // 8 numbers below 2**16, as 16 bits each.
  HD static __m128i narrow(__m256i value) {
    return _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  }
  HD static __m128i upper_halves(UInt32x8 a) {
    const __m256i odd = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(a.value, odd), 0x08));
  }
  HD static __m128i lower_halves(UInt32x8 a) { return narrow((a & UInt32x8(0xFFFFU)).value); }
  template <class D>
  HD static Float32x8 widen(__m128i halves) {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(UInt32x8(_mm256_cvtepu16_epi32(halves)) << 16);
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return Float32x8(_mm256_cvtph_ps(halves));
    }
  }
  template <class D>
  HD __m128i pack() const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return upper_halves(bits_of(*this));
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
  }
  // The bits, raised so that their upper halves are the bfloat16. NaN, which comes out of arithmetic and is quiet,
  // stays.
  HD UInt32x8 raised(UInt32x8 increment) const {
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q));
    return bits_of(*this) + UInt32x8(_mm256_and_si256(increment.value, number));
  }
  HD UInt32x8 nearest() const { return raised(UInt32x8(0x7FFFU) + ((bits_of(*this) >> 16) & UInt32x8(1U))); }
  // What store() rounds or cuts off as it should.
  template <class D>
  HD Float32x8 round_for_store() const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(nearest());
    } else {
      return *this;
    }
  }
  HD static Float32x8 joined(__m128i high, __m128i low) {
    const UInt32x8 upper = UInt32x8(_mm256_cvtepu16_epi32(high)) << 16;
    const __m256i missing = _mm256_cvtepi16_epi32(low);
    const __m256i magnitude = (upper & UInt32x8(0x7FFFFFFFU)).value;
    const __m256i infinite = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    const __m256i alone =
        _mm256_or_si256(_mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256()),
                        _mm256_and_si256(infinite, _mm256_cmpgt_epi32(missing, _mm256_setzero_si256())));
    return float_of(upper + UInt32x8(_mm256_andnot_si256(alone, missing)));
  }
  HD UInt32x8 split_bits() const {
    const __m256 sign = _mm256_and_ps(value, _mm256_set1_ps(-0.0F));
    const __m256 quiet = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return bits_of(Float32x8(_mm256_blendv_ps(value, quiet, nan)));
  }
};

struct Float64x4 {
  using Scalar = double;
  static constexpr std::size_t lanes = 4;
  __m256d value;

  Float64x4() = default;
  HD explicit Float64x4(double x) : value(_mm256_set1_pd(x)) {}
  HD explicit Float64x4(__m256d x) : value(x) {}

  template <class D>
  HD static Float64x4 load(const std::byte* from) {
    if constexpr (std::is_same_v<D, Float64>) {
      return Float64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(from)));
    } else if constexpr (std::is_same_v<D, Float32>) {
      return Float64x4(_mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(from))));
    } else {
      return widen<D>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    }
  }
  template <class D>
  HD void store(std::byte* to) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm256_storeu_pd(reinterpret_cast<double*>(to), value);
  }
  template <class D>
  HD static Float64x4 load_part(const std::byte* from, std::size_t count) {
    if constexpr (std::is_same_v<D, Float64>) {
      return Float64x4(_mm256_maskload_pd(reinterpret_cast<const double*>(from), first_lanes(count)));
    } else if constexpr (std::is_same_v<D, Float32>) {
      const __m128i lanes_read = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count)), _mm_setr_epi32(0, 1, 2, 3));
      return Float64x4(_mm256_cvtps_pd(_mm_maskload_ps(reinterpret_cast<const float*>(from), lanes_read)));
    } else {
      return widen<D>(load_halves(from, count));
    }
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm256_maskstore_pd(reinterpret_cast<double*>(to), first_lanes(count), value);
  }
  template <class D>
  HD Float64x4 round() const {
    static_assert(std::is_same_v<D, Float64>);
    return *this;
  }
  template <class D>
  HD void store_nearest(std::byte* to) const {
    if constexpr (std::is_same_v<D, Float64>) {
      store<D>(to);
    } else {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), pack<D>());
    }
  }
  template <class D>
  HD void store_nearest_part(std::byte* to, std::size_t count) const {
    if constexpr (std::is_same_v<D, Float64>) {
      store_part<D>(to, count);
    } else {
      store_halves(pack<D>(), to, count);
    }
  }
  template <class D>
  HD void stream(std::byte* to) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm256_stream_pd(reinterpret_cast<double*>(to), value);
  }
  HD static void fence() { _mm_sfence(); }
  HD friend Float64x4 first(std::size_t count, Float64x4 a, Float64x4 b) {
    return Float64x4(_mm256_blendv_pd(b.value, a.value, _mm256_castsi256_pd(first_lanes(count))));
  }

  HD friend Float64x4 operator+(Float64x4 a, Float64x4 b) { return Float64x4(_mm256_add_pd(a.value, b.value)); }
  HD friend Float64x4 operator-(Float64x4 a, Float64x4 b) { return Float64x4(_mm256_sub_pd(a.value, b.value)); }
  HD friend Float64x4 operator*(Float64x4 a, Float64x4 b) { return Float64x4(_mm256_mul_pd(a.value, b.value)); }
  HD friend Float64x4 operator/(Float64x4 a, Float64x4 b) { return Float64x4(_mm256_div_pd(a.value, b.value)); }
  HD friend Float64x4 max(Float64x4 a, Float64x4 b) { return Float64x4(_mm256_max_pd(a.value, b.value)); }
  HD friend Float64x4 min(Float64x4 a, Float64x4 b) { return Float64x4(_mm256_min_pd(a.value, b.value)); }
  HD friend Float64x4 sqrt(Float64x4 a) { return Float64x4(_mm256_sqrt_pd(a.value)); }
  HD friend Float64x4 flush(Float64x4 a) {
    const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), a.value);
    const __m256d subnormal = _mm256_cmp_pd(magnitude, _mm256_set1_pd(kSmallestNormal<double>), _CMP_LT_OQ);
    return Float64x4(_mm256_andnot_pd(_mm256_andnot_pd(_mm256_set1_pd(-0.0), subnormal), a.value));
  }
  HD friend Float64x4 gate(Float64x4 a, Float64x4 y) {
    const __m256d closed = _mm256_cmp_pd(y.value, _mm256_setzero_pd(), _CMP_LE_OQ);
    return Float64x4(_mm256_andnot_pd(closed, a.value));
  }
  HD friend Float64x4 sign(Float64x4 a) {
    const __m256d zero = _mm256_setzero_pd();
    const __m256d up = _mm256_and_pd(_mm256_cmp_pd(a.value, zero, _CMP_GT_OQ), _mm256_set1_pd(1.0));
    const __m256d down = _mm256_and_pd(_mm256_cmp_pd(a.value, zero, _CMP_LT_OQ), _mm256_set1_pd(-1.0));
    const __m256d nan = _mm256_and_pd(_mm256_cmp_pd(a.value, a.value, _CMP_UNORD_Q), a.value);
    return Float64x4(_mm256_or_pd(_mm256_or_pd(up, down), nan));
  }

 private:
  HD static __m256i first_lanes(std::size_t count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(static_cast<long long>(count)), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  template <class D>
  HD static Float64x4 widen(__m128i halves) {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return Float64x4(_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16))));
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return Float64x4(_mm256_cvtps_pd(_mm_cvtph_ps(halves)));
    }
  }
  // The lower halves of four 64-bit lanes.
  HD static __m128i lower(__m256d mask) {
    const __m256i even =
        _mm256_permutevar8x32_epi32(_mm256_castpd_si256(mask), _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0));
    return _mm256_castsi256_si128(even);
  }
  // To nearest, by way of floats that were rounded to odd (dtype.h).
  template <class D>
  HD __m128i pack() const {
    const __m256d sign = _mm256_set1_pd(-0.0);
    const __m256d smallest = _mm256_set1_pd(static_cast<double>(kSmallestFloat));
    const __m256d small = _mm256_cmp_pd(_mm256_andnot_pd(sign, value), smallest, _CMP_LT_OQ);
    const __m256d kept = _mm256_andnot_pd(_mm256_andnot_pd(sign, small), value);
    const __m256d magnitude = _mm256_andnot_pd(sign, kept);
    const __m128 nearest = _mm256_cvtpd_ps(kept);
    const __m256d back = _mm256_andnot_pd(sign, _mm256_cvtps_pd(nearest));
    const __m128i above = lower(_mm256_cmp_pd(back, magnitude, _CMP_GT_OQ));  // -1 where the float is too large
    const __m128i inexact = lower(_mm256_cmp_pd(back, magnitude, _CMP_NEQ_OQ));
    __m128i odd = _mm_add_epi32(_mm_castps_si128(nearest), above);
    odd = _mm_or_si128(odd, _mm_srli_epi32(inexact, 31));
    if constexpr (std::is_same_v<D, BFloat16>) {
      const __m128i last = _mm_and_si128(_mm_srli_epi32(odd, 16), _mm_set1_epi32(1));
      const __m128i sum = _mm_add_epi32(odd, _mm_add_epi32(last, _mm_set1_epi32(0x7FFF)));
      const __m128 quiet = _mm_castsi128_ps(_mm_or_si128(odd, _mm_set1_epi32(0x400000)));
      const __m128 nan = _mm_cmpunord_ps(nearest, nearest);
      const __m128i rounded = _mm_castps_si128(_mm_blendv_ps(_mm_castsi128_ps(sum), quiet, nan));
      return _mm_packus_epi32(_mm_srli_epi32(rounded, 16), _mm_setzero_si128());
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return _mm_cvtps_ph(_mm_castsi128_ps(odd), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
  }
};

template <class S>
using Wide = std::conditional_t<std::is_same_v<S, float>, Float32x8, Float64x4>;
using WideWords = Words64x4;

}  // namespace
}  // namespace onepass
