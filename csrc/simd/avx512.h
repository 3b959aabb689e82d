// 16 floats or 8 doubles.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512DQ__)
#error "simd/avx512.h belongs into a unit that is compiled for AVX-512"
#endif

#include <immintrin.h>

#include <cstddef>
#include <type_traits>

#include "core/dtype.h"
#include "core/kernel.h"
#include "simd/one_lane.h"

namespace onepass {
namespace {

constexpr Isa kIsa = Isa::avx512;

struct Float32x16 {
  using Scalar = float;
  static constexpr std::size_t lanes = 16;
  __m512 value;

  Float32x16() = default;
  HD explicit Float32x16(float x) : value(_mm512_set1_ps(x)) {}
  HD explicit Float32x16(__m512 x) : value(x) {}

  template <class D>
  HD static Float32x16 load(const std::byte* from) {
    static_assert(std::is_same_v<D, Float32>);
    return Float32x16(_mm512_loadu_ps(reinterpret_cast<const float*>(from)));
  }
  template <class D>
  HD void store(std::byte* to) const {
    static_assert(std::is_same_v<D, Float32>);
    _mm512_storeu_ps(reinterpret_cast<float*>(to), value);
  }
  template <class D>
  HD static Float32x16 load_part(const std::byte* from, std::size_t count) {
    static_assert(std::is_same_v<D, Float32>);
    return Float32x16(_mm512_maskz_loadu_ps(first_lanes(count), reinterpret_cast<const float*>(from)));
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    static_assert(std::is_same_v<D, Float32>);
    _mm512_mask_storeu_ps(reinterpret_cast<float*>(to), first_lanes(count), value);
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
    static_assert(std::is_same_v<D, Float64>);
    return Float64x8(_mm512_loadu_pd(reinterpret_cast<const double*>(from)));
  }
  template <class D>
  HD void store(std::byte* to) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm512_storeu_pd(reinterpret_cast<double*>(to), value);
  }
  template <class D>
  HD static Float64x8 load_part(const std::byte* from, std::size_t count) {
    static_assert(std::is_same_v<D, Float64>);
    return Float64x8(_mm512_maskz_loadu_pd(first_lanes(count), reinterpret_cast<const double*>(from)));
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm512_mask_storeu_pd(reinterpret_cast<double*>(to), first_lanes(count), value);
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
};

template <class S>
using Wide = std::conditional_t<std::is_same_v<S, float>, Float32x16, Float64x8>;

}  // namespace
}  // namespace onepass
