// One step over many tensors. This is the library's face for C++: validate, fill in a Tensor for each parameter, call
// update().
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/dtype.h"
#include "core/kernel.h"
#include "core/layout.h"

namespace onepass {

// How streams that lie in another order than the parameter are walked: position 0 is the gradient, 1 + k is slot k.
struct Walk {
  std::vector<Axis> axes[1 + kMaxSlots];
  bool gather[1 + kMaxSlots] = {};
};

struct Tensor {
  const Kernel* kernel = nullptr;
  DType dtype = DType::float32;
  std::size_t count = 0;  // elements
  Streams streams{};
  const double* coefficients = nullptr;
  const Around* around = nullptr;
  const Walk* walk = nullptr;  // null: all streams in the parameter's order
};

// Bytes that a step over this tensor reads and writes.
std::size_t traffic(const Tensor& tensor);

// A step of fewer bytes runs on the calling thread. Adam on 2 CPUs: a single step after a pause, when workers sleep,
// breaks even at 5 MB (4 MB: 77 us alone, 84 in two); steps back to back at 1 MB (4 MB: 31 us and 23).
std::size_t serial_bytes();
void set_serial_bytes(std::size_t bytes);  // 0: every step is divided, as tests want it

// Updates all tensors. Arrays that are written must not overlap with any other array of the step. Bits do not depend on
// `threads`. Returns the instruction set of the kernels that ran (of the active table, if there was nothing to do).
Isa update(std::span<const Tensor> tensors, std::size_t threads);

}  // namespace onepass
