// What a kernel unit exports and what a driver calls: plain data and plain pointers, so that no SIMD type and no
// template crosses the border between units that were compiled for different instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace onepass {

inline constexpr std::size_t kMaxSlots = 3;
inline constexpr std::size_t kMaxCoefficients = 12;

enum class Isa : std::uint8_t { scalar, avx2, avx512 };

// The names of a rule's slots or coefficients, in the order in which the rule takes them.
struct Names {
  const char* data[kMaxCoefficients];
  std::size_t count;
};

// The arrays of one tensor, or of a part of one. `grad` is read; `param` and `slots` are read and written.
struct Streams {
  void* param;
  const void* grad;
  void* slots[kMaxSlots];
};

// What surrounds every rule. A neutral value (scale 1, l1 0, l2 0, decay 1) means that the term is left out.
struct Around {
  double scale = 1.0;
  double l1 = 0.0;
  double l2 = 0.0;
  double decay = 1.0;
};

// Updates `count` consecutive elements. `coefficients` are the rule's, in float64, rounded once to the compute type.
// Returns the instruction set of the code that ran.
using UpdateFn = Isa (*)(const Streams& streams, std::size_t count, const double* coefficients, const Around& around);

struct Kernel {
  const char* rule;
  Names slots;
  Names coefficients;
  bool yardstick;  // trivial arithmetic over the same streams: what the memory alone would take
  UpdateFn update[DTypes::size];
};

namespace batchnorm {
struct Table;
}

struct KernelTable {
  Isa isa;
  const Kernel* kernels;
  std::size_t count;
  const batchnorm::Table* batchnorm;
};

}  // namespace onepass
