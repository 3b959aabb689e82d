// 16 floats or 8 doubles.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512DQ__)
#error "simd/avx512.h belongs into a unit that is compiled for AVX-512"
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

constexpr Isa kIsa = Isa::avx512;

// 16 integers: the bits of floats, or random ones.
struct UInt32x16 {
  __m512i value;

  HD explicit UInt32x16(std::uint32_t x) : value(_mm512_set1_epi32(static_cast<int>(x))) {}
  HD explicit UInt32x16(__m512i x) : value(x) {}
  HD static UInt32x16 load(const std::uint32_t* from) { return UInt32x16(_mm512_loadu_si512(from)); }
  HD void store(std::uint32_t* to) const { _mm512_storeu_si512(to, value); }

  HD friend UInt32x16 operator+(UInt32x16 a, UInt32x16 b) { return UInt32x16(_mm512_add_epi32(a.value, b.value)); }
  HD friend UInt32x16 operator-(UInt32x16 a, UInt32x16 b) { return UInt32x16(_mm512_sub_epi32(a.value, b.value)); }
  HD friend UInt32x16 operator&(UInt32x16 a, UInt32x16 b) { return UInt32x16(_mm512_and_si512(a.value, b.value)); }
  HD friend UInt32x16 operator^(UInt32x16 a, UInt32x16 b) { return UInt32x16(_mm512_xor_si512(a.value, b.value)); }
  HD friend UInt32x16 operator<<(UInt32x16 a, unsigned n) { return UInt32x16(_mm512_slli_epi32(a.value, n)); }
  HD friend UInt32x16 operator>>(UInt32x16 a, unsigned n) { return UInt32x16(_mm512_srli_epi32(a.value, n)); }
  // Of the lower 16 bits, of numbers below 2**16.
  HD friend UInt32x16 product16(UInt32x16 a, std::uint32_t x) {
    return UInt32x16(_mm512_mullo_epi16(a.value, UInt32x16(x).value));
  }
  HD friend UInt32x16 shift_right(UInt32x16 a, unsigned n) { return UInt32x16(_mm512_srai_epi32(a.value, n)); }
};

// The lanes of Philox (philox.h): 8 of 64 bits.
struct Words64x8 {
  static constexpr std::size_t lanes = 8;
  static constexpr std::size_t parts = 2;  // that make a vector of integers
  __m512i value;

  Words64x8() = default;
  HD explicit Words64x8(std::uint64_t x) : value(_mm512_set1_epi64(static_cast<long long>(x))) {}
  HD explicit Words64x8(__m512i x) : value(x) {}
  HD static Words64x8 counting(std::uint64_t start) {
    return Words64x8(_mm512_add_epi64(Words64x8(start).value, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14)));
  }
  HD friend Words64x8 operator^(Words64x8 a, Words64x8 b) { return Words64x8(_mm512_xor_si512(a.value, b.value)); }
  HD friend Words64x8 multiply(Words64x8 a, std::uint32_t x) {
    return Words64x8(_mm512_mul_epu32(a.value, Words64x8(std::uint64_t{x}).value));
  }
  HD friend Words64x8 upper(Words64x8 a) { return Words64x8(_mm512_srli_epi64(a.value, 32)); }
  // The lower halves of the parts, in turns.
  HD static UInt32x16 merge(const Words64x8 (&part)[parts]) {
    return UInt32x16(_mm512_mask_shuffle_epi32(part[0].value, 0xAAAA, part[1].value, _MM_PERM_CCAA));
  }
};

struct Float32x16;
HD Float32x16 float_of(UInt32x16 a);
HD Float32x16 to_float(UInt32x16 a);

struct Float32x16 {
  using Scalar = float;
  using Integers = UInt32x16;
  static constexpr std::size_t lanes = 16;
  __m512 value;

  Float32x16() = default;
  HD explicit Float32x16(float x) : value(_mm512_set1_ps(x)) {}
  HD explicit Float32x16(__m512 x) : value(x) {}

  template <class D>
  HD static Float32x16 load(const std::byte* from) {
    if constexpr (std::is_same_v<D, Float32>) {
      return Float32x16(_mm512_loadu_ps(reinterpret_cast<const float*>(from)));
    } else {
      return widen<D>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
  }
  template <class D>
  HD void store(std::byte* to) const {
    if constexpr (std::is_same_v<D, Float32>) {
      _mm512_storeu_ps(reinterpret_cast<float*>(to), value);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pack<D>());
    }
  }
  template <class D>
  HD static Float32x16 load_part(const std::byte* from, std::size_t count) {
    if constexpr (std::is_same_v<D, Float32>) {
      return Float32x16(_mm512_maskz_loadu_ps(first_lanes(count), reinterpret_cast<const float*>(from)));
    } else {
      return widen<D>(_mm256_maskz_loadu_epi16(first_lanes(count), from));
    }
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    if constexpr (std::is_same_v<D, Float32>) {
      _mm512_mask_storeu_ps(reinterpret_cast<float*>(to), first_lanes(count), value);
    } else {
      _mm256_mask_storeu_epi16(to, first_lanes(count), pack<D>());
    }
  }
  template <class D>
  HD Float32x16 round() const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(nearest() & UInt32x16(0xFFFF0000U));
    } else if constexpr (std::is_same_v<D, Float16>) {
      return widen<D>(pack<D>());
    } else {
      return *this;
    }
  }
  template <class D>
  HD Float32x16 round(UInt32x16 random) const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(raised(random) & UInt32x16(0xFFFF0000U));
    } else if constexpr (std::is_same_v<D, Float16>) {
      const __m256i truncated = _mm512_cvtps_ph(value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
      const __m512 below = _mm512_cvtph_ps(truncated);
      const __m512 rest = _mm512_sub_ps(_mm512_abs_ps(value), _mm512_abs_ps(below));
      const __m512 exponent = float_of(bits_of(Float32x16(below)) & UInt32x16(0x7F800000U)).value;
      const __m512 unit = _mm512_max_ps(_mm512_mul_ps(exponent, _mm512_set1_ps(0x1p-10F)), _mm512_set1_ps(0x1p-24F));
      const Float32x16 share = to_float(UInt32x16(65536U) - random) * Float32x16(0x1p-16F);
      const auto up = _mm512_cmp_ps_mask(rest, _mm512_mul_ps(unit, share.value), _CMP_GE_OQ);
      return widen<D>(_mm256_mask_add_epi16(truncated, up, truncated, _mm256_set1_epi16(1)));
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
  HD static Float32x16 join(const std::byte* high, const std::byte* low) {
    return joined(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)),
                  _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  }
  HD static Float32x16 join_part(const std::byte* high, const std::byte* low, std::size_t count) {
    return joined(_mm256_maskz_loadu_epi16(first_lanes(count), high),
                  _mm256_maskz_loadu_epi16(first_lanes(count), low));
  }
  HD void split(std::byte* high, std::byte* low) const {
    const UInt32x16 bits = split_bits();
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), upper_halves(bits + UInt32x16(0x8000U)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_cvtepi32_epi16(bits.value));
  }
  HD void split_part(std::byte* high, std::byte* low, std::size_t count) const {
    const UInt32x16 bits = split_bits();
    _mm256_mask_storeu_epi16(high, first_lanes(count), upper_halves(bits + UInt32x16(0x8000U)));
    _mm256_mask_storeu_epi16(low, first_lanes(count), _mm512_cvtepi32_epi16(bits.value));
  }
  template <class D>
  HD void stream(std::byte* to) const {
    static_assert(std::is_same_v<D, Float32>);
    _mm512_stream_ps(reinterpret_cast<float*>(to), value);
  }
  HD static void fence() { _mm_sfence(); }
  HD friend Float32x16 first(std::size_t count, Float32x16 a, Float32x16 b) {
    return Float32x16(_mm512_mask_mov_ps(b.value, first_lanes(count), a.value));
  }

  HD friend Float32x16 operator+(Float32x16 a, Float32x16 b) { return Float32x16(_mm512_add_ps(a.value, b.value)); }
  HD friend Float32x16 operator-(Float32x16 a, Float32x16 b) { return Float32x16(_mm512_sub_ps(a.value, b.value)); }
  HD friend Float32x16 operator*(Float32x16 a, Float32x16 b) { return Float32x16(_mm512_mul_ps(a.value, b.value)); }
  HD friend Float32x16 operator/(Float32x16 a, Float32x16 b) { return Float32x16(_mm512_div_ps(a.value, b.value)); }
  HD friend Float32x16 max(Float32x16 a, Float32x16 b) { return Float32x16(_mm512_max_ps(a.value, b.value)); }
  HD friend Float32x16 min(Float32x16 a, Float32x16 b) { return Float32x16(_mm512_min_ps(a.value, b.value)); }
  HD friend UInt32x16 bits_of(Float32x16 a) { return UInt32x16(_mm512_castps_si512(a.value)); }
  HD friend Float32x16 float_of(UInt32x16 a) { return Float32x16(_mm512_castsi512_ps(a.value)); }
  HD friend Float32x16 to_float(UInt32x16 a) { return Float32x16(_mm512_cvtepi32_ps(a.value)); }
  HD friend Float32x16 sqrt(Float32x16 a) { return Float32x16(_mm512_sqrt_ps(a.value)); }
  HD friend Float32x16 flush(Float32x16 a) {
    const auto subnormal =
        _mm512_cmp_ps_mask(_mm512_abs_ps(a.value), _mm512_set1_ps(kSmallestNormal<float>), _CMP_LT_OQ);
    return Float32x16(_mm512_mask_and_ps(a.value, subnormal, a.value, _mm512_set1_ps(-0.0F)));
  }
  HD friend Float32x16 gate(Float32x16 a, Float32x16 y) {
    const auto closed = _mm512_cmp_ps_mask(y.value, _mm512_setzero_ps(), _CMP_LE_OQ);
    return Float32x16(_mm512_mask_mov_ps(a.value, closed, _mm512_setzero_ps()));
  }
  HD friend Float32x16 sign(Float32x16 a) {
    const __m512 zero = _mm512_setzero_ps();
    const __m512 up = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.value, zero, _CMP_GT_OQ), _mm512_set1_ps(1.0F));
    const __m512 up_down = _mm512_mask_mov_ps(up, _mm512_cmp_ps_mask(a.value, zero, _CMP_LT_OQ), _mm512_set1_ps(-1.0F));
    return Float32x16(_mm512_mask_mov_ps(up_down, _mm512_cmp_ps_mask(a.value, a.value, _CMP_UNORD_Q), a.value));
  }

 private:
  HD static __mmask16 first_lanes(std::size_t count) { return static_cast<__mmask16>((1U << (count % lanes)) - 1U); }
  // One permutation of words each way, for a shift and a conversion: Adam in bfloat16 alone, in the cache, 12 % less.
  HD static __m256i upper_halves(UInt32x16 a) {
    const __m512i odd = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000B0009, 0x000F000D, 0x00130011, 0x00170015,
                                          0x001B0019, 0x001F001D, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, a.value));
  }
  HD static UInt32x16 as_upper_halves(__m256i halves) {
    const __m512i places =
        _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    return UInt32x16(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAU, places, _mm512_castsi256_si512(halves)));
  }
  template <class D>
  HD static Float32x16 widen(__m256i halves) {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(as_upper_halves(halves));
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return Float32x16(_mm512_cvtph_ps(halves));
    }
  }
  template <class D>
  HD __m256i pack() const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return upper_halves(bits_of(*this));
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
  }
  // The bits, raised so that their upper halves are the bfloat16. NaN, which comes out of arithmetic and is quiet,
  // stays.
  HD UInt32x16 raised(UInt32x16 increment) const {
    const __m512i bits = _mm512_castps_si512(value);
    const auto number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    return UInt32x16(_mm512_mask_add_epi32(bits, number, bits, increment.value));
  }
  HD UInt32x16 nearest() const { return raised(UInt32x16(0x7FFFU) + ((bits_of(*this) >> 16) & UInt32x16(1U))); }
  // What store() rounds or cuts off as it should.
  template <class D>
  HD Float32x16 round_for_store() const {
    if constexpr (std::is_same_v<D, BFloat16>) {
      return float_of(nearest());
    } else {
      return *this;
    }
  }
  HD static Float32x16 joined(__m256i high, __m256i low) {
    const UInt32x16 upper = as_upper_halves(high);
    const __m512i missing = _mm512_cvtepi16_epi32(low);
    const __m512i magnitude = (upper & UInt32x16(0x7FFFFFFFU)).value;
    const auto infinite = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    const auto alone = static_cast<__mmask16>(_mm512_testn_epi32_mask(magnitude, magnitude) |
                                              _mm512_mask_cmpgt_epi32_mask(infinite, missing, _mm512_setzero_si512()));
    return float_of(UInt32x16(_mm512_mask_add_epi32(upper.value, _knot_mask16(alone), upper.value, missing)));
  }
  HD UInt32x16 split_bits() const {
    const UInt32x16 bits = bits_of(*this);
    const auto nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i quiet =
        _mm512_or_si512(_mm512_and_si512(bits.value, _mm512_set1_epi32(INT32_MIN)), _mm512_set1_epi32(0x7FC00000));
    return UInt32x16(_mm512_mask_mov_epi32(bits.value, nan, quiet));
  }
};

struct Float64x8 {
  using Scalar = double;
  static constexpr std::size_t lanes = 8;
  __m512d value;

  Float64x8() = default;
  HD explicit Float64x8(double x) : value(_mm512_set1_pd(x)) {}
  HD explicit Float64x8(__m512d x) : value(x) {}

  template <class D>
  HD static Float64x8 load(const std::byte* from) {
    if constexpr (std::is_same_v<D, Float64>) {
      return Float64x8(_mm512_loadu_pd(reinterpret_cast<const double*>(from)));
    } else if constexpr (std::is_same_v<D, Float32>) {
      return Float64x8(_mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(from))));
    } else {
      return widen<D>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
  }
  template <class D>
  HD void store(std::byte* to) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm512_storeu_pd(reinterpret_cast<double*>(to), value);
  }
  template <class D>
  HD static Float64x8 load_part(const std::byte* from, std::size_t count) {
    if constexpr (std::is_same_v<D, Float64>) {
      return Float64x8(_mm512_maskz_loadu_pd(first_lanes(count), reinterpret_cast<const double*>(from)));
    } else if constexpr (std::is_same_v<D, Float32>) {
      return Float64x8(
          _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_lanes(count), reinterpret_cast<const float*>(from))));
    } else {
      return widen<D>(_mm_maskz_loadu_epi16(first_lanes(count), from));
    }
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm512_mask_storeu_pd(reinterpret_cast<double*>(to), first_lanes(count), value);
  }
  template <class D>
  HD Float64x8 round() const {
    static_assert(std::is_same_v<D, Float64>);
    return *this;
  }
  template <class D>
  HD void store_nearest(std::byte* to) const {
    if constexpr (std::is_same_v<D, Float64>) {
      store<D>(to);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pack<D>());
    }
  }
  template <class D>
  HD void store_nearest_part(std::byte* to, std::size_t count) const {
    if constexpr (std::is_same_v<D, Float64>) {
      store_part<D>(to, count);
    } else {
      _mm_mask_storeu_epi16(to, first_lanes(count), pack<D>());
    }
  }
  template <class D>
  HD void stream(std::byte* to) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm512_stream_pd(reinterpret_cast<double*>(to), value);
  }
  HD static void fence() { _mm_sfence(); }
  HD friend Float64x8 first(std::size_t count, Float64x8 a, Float64x8 b) {
    return Float64x8(_mm512_mask_mov_pd(b.value, first_lanes(count), a.value));
  }

  HD friend Float64x8 operator+(Float64x8 a, Float64x8 b) { return Float64x8(_mm512_add_pd(a.value, b.value)); }
  HD friend Float64x8 operator-(Float64x8 a, Float64x8 b) { return Float64x8(_mm512_sub_pd(a.value, b.value)); }
  HD friend Float64x8 operator*(Float64x8 a, Float64x8 b) { return Float64x8(_mm512_mul_pd(a.value, b.value)); }
  HD friend Float64x8 operator/(Float64x8 a, Float64x8 b) { return Float64x8(_mm512_div_pd(a.value, b.value)); }
  HD friend Float64x8 max(Float64x8 a, Float64x8 b) { return Float64x8(_mm512_max_pd(a.value, b.value)); }
  HD friend Float64x8 min(Float64x8 a, Float64x8 b) { return Float64x8(_mm512_min_pd(a.value, b.value)); }
  HD friend Float64x8 sqrt(Float64x8 a) { return Float64x8(_mm512_sqrt_pd(a.value)); }
  HD friend Float64x8 flush(Float64x8 a) {
    const auto subnormal =
        _mm512_cmp_pd_mask(_mm512_abs_pd(a.value), _mm512_set1_pd(kSmallestNormal<double>), _CMP_LT_OQ);
    return Float64x8(_mm512_mask_and_pd(a.value, subnormal, a.value, _mm512_set1_pd(-0.0)));
  }
  HD friend Float64x8 gate(Float64x8 a, Float64x8 y) {
    const auto closed = _mm512_cmp_pd_mask(y.value, _mm512_setzero_pd(), _CMP_LE_OQ);
    return Float64x8(_mm512_mask_mov_pd(a.value, closed, _mm512_setzero_pd()));
  }
  HD friend Float64x8 sign(Float64x8 a) {
    const __m512d zero = _mm512_setzero_pd();
    const __m512d up = _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.value, zero, _CMP_GT_OQ), _mm512_set1_pd(1.0));
    const __m512d up_down = _mm512_mask_mov_pd(up, _mm512_cmp_pd_mask(a.value, zero, _CMP_LT_OQ), _mm512_set1_pd(-1.0));
    return Float64x8(_mm512_mask_mov_pd(up_down, _mm512_cmp_pd_mask(a.value, a.value, _CMP_UNORD_Q), a.value));
  }

 private:
  HD static __mmask8 first_lanes(std::size_t count) { return static_cast<__mmask8>((1U << (count % lanes)) - 1U); }
  template <class D>
  HD static Float64x8 widen(__m128i halves) {
    if constexpr (std::is_same_v<D, BFloat16>) {
      const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
      return Float64x8(_mm512_cvtps_pd(_mm256_castsi256_ps(bits)));
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return Float64x8(_mm512_cvtps_pd(_mm256_cvtph_ps(halves)));
    }
  }
  // To nearest, by way of floats that were rounded to odd (dtype.h).
  template <class D>
  HD __m128i pack() const {
    const __m512d magnitude = _mm512_abs_pd(value);
    const auto small = _mm512_cmp_pd_mask(magnitude, _mm512_set1_pd(static_cast<double>(kSmallestFloat)), _CMP_LT_OQ);
    const __m512d kept = _mm512_mask_and_pd(value, small, value, _mm512_set1_pd(-0.0));
    const __m256 nearest = _mm512_cvtpd_ps(kept);
    const __m512d back = _mm512_abs_pd(_mm512_cvtps_pd(nearest));
    const auto above = _mm512_cmp_pd_mask(back, _mm512_abs_pd(kept), _CMP_GT_OQ);
    const auto inexact = _mm512_cmp_pd_mask(back, _mm512_abs_pd(kept), _CMP_NEQ_OQ);
    __m256i odd = _mm256_castps_si256(nearest);
    odd = _mm256_mask_sub_epi32(odd, above, odd, _mm256_set1_epi32(1));
    odd = _mm256_mask_or_epi32(odd, inexact, odd, _mm256_set1_epi32(1));
    if constexpr (std::is_same_v<D, BFloat16>) {
      const __m256i last = _mm256_and_si256(_mm256_srli_epi32(odd, 16), _mm256_set1_epi32(1));
      const __m256i sum = _mm256_add_epi32(odd, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF)));
      const auto nan = _mm256_cmp_ps_mask(nearest, nearest, _CMP_UNORD_Q);
      const __m256i quiet = _mm256_or_si256(odd, _mm256_set1_epi32(0x400000));
      return _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_mask_mov_epi32(sum, nan, quiet), 16));
    } else {
      static_assert(std::is_same_v<D, Float16>);
      return _mm256_cvtps_ph(_mm256_castsi256_ps(odd), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
  }
};

template <class S>
using Wide = std::conditional_t<std::is_same_v<S, float>, Float32x16, Float64x8>;
using WideWords = Words64x8;

}  // namespace
}  // namespace onepass
