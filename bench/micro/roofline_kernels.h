// What the roofline's unit of an instruction set exports (roofline_kernels.cpp).
#pragma once

#include <cstddef>

#include "core/kernel.h"

namespace onepass::roofline {

struct Kernels {
  Isa isa;
  std::size_t elements;  // that one round of the two below works on, in registers
  // to[i] += scale * times[i]
  void (*triad)(float* to, const float* times, float scale, std::size_t count);
  // One multiplication and one addition of each element in each round. The sum is there to be looked at.
  float (*multiply_add)(std::size_t rounds);
  // One root and one division, and an addition that is done beside them.
  float (*divide_root)(std::size_t rounds);
};

}  // namespace onepass::roofline
