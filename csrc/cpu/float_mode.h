// The floating-point mode in which every kernel runs: round to nearest, subnormals are zero on input and output, no
// traps. The caller's own mode, sticky flags included, is restored on the way out.
//
// Without it the moments of units whose gradients stay zero decay into subnormals, and each operation on one costs a
// microcode assist on many CPUs: a step becomes 15 to 24 times slower, for ever. (Zen 5 needs none.)
#pragma once

#include <cstdint>

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace onepass {

class FloatMode {
 public:
#if defined(__SSE2__) || defined(_M_X64)
  FloatMode() : saved_(_mm_getcsr()) {
    constexpr unsigned flush_to_zero = 0x8000;
    constexpr unsigned denormals_are_zero = 0x0040;
    constexpr unsigned all_masked_to_nearest = 0x1F80;
    _mm_setcsr(flush_to_zero | denormals_are_zero | all_masked_to_nearest);
  }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    constexpr std::uint64_t flush_to_zero = std::uint64_t{1} << 24;
    __asm__ volatile("msr fpcr, %0" : : "r"(flush_to_zero));
  }
  ~FloatMode() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  std::uint64_t saved_ = 0;
#else
  FloatMode() = default;
  ~FloatMode() {}
#endif

 public:
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
};

}  // namespace onepass
