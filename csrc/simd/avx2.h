// 8 floats or 4 doubles.
#pragma once

#if !defined(__AVX2__)
#error "simd/avx2.h belongs into a unit that is compiled for AVX2"
#endif

#include <immintrin.h>

#include <cstddef>
#include <type_traits>

#include "core/dtype.h"
#include "core/kernel.h"
#include "simd/one_lane.h"

namespace onepass {
namespace {

constexpr Isa kIsa = Isa::avx2;

struct Float32x8 {
  using Scalar = float;
  static constexpr std::size_t lanes = 8;
  __m256 value;

  Float32x8() = default;
  HD explicit Float32x8(float x) : value(_mm256_set1_ps(x)) {}
  HD explicit Float32x8(__m256 x) : value(x) {}

  template <class D>
  HD static Float32x8 load(const std::byte* from) {
    static_assert(std::is_same_v<D, Float32>);
    return Float32x8(_mm256_loadu_ps(reinterpret_cast<const float*>(from)));
  }
  template <class D>
  HD void store(std::byte* to) const {
    static_assert(std::is_same_v<D, Float32>);
    _mm256_storeu_ps(reinterpret_cast<float*>(to), value);
  }
  template <class D>
  HD static Float32x8 load_part(const std::byte* from, std::size_t count) {
    static_assert(std::is_same_v<D, Float32>);
    return Float32x8(_mm256_maskload_ps(reinterpret_cast<const float*>(from), first_lanes(count)));
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    static_assert(std::is_same_v<D, Float32>);
    _mm256_maskstore_ps(reinterpret_cast<float*>(to), first_lanes(count), value);
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
    static_assert(std::is_same_v<D, Float64>);
    return Float64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(from)));
  }
  template <class D>
  HD void store(std::byte* to) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm256_storeu_pd(reinterpret_cast<double*>(to), value);
  }
  template <class D>
  HD static Float64x4 load_part(const std::byte* from, std::size_t count) {
    static_assert(std::is_same_v<D, Float64>);
    return Float64x4(_mm256_maskload_pd(reinterpret_cast<const double*>(from), first_lanes(count)));
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t count) const {
    static_assert(std::is_same_v<D, Float64>);
    _mm256_maskstore_pd(reinterpret_cast<double*>(to), first_lanes(count), value);
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
};

template <class S>
using Wide = std::conditional_t<std::is_same_v<S, float>, Float32x8, Float64x4>;

}  // namespace
}  // namespace onepass
