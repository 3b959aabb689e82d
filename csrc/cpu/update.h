// One step over many tensors. This is the library's face for C++: validate, fill in a Tensor for each parameter, call
// update().
#pragma once

#include <cstddef>
#include <span>

#include "core/kernel.h"
#include "core/tensor.h"

namespace onepass {

// A step of fewer bytes runs on the calling thread. Adam on 2 CPUs: a single step after a pause, when workers sleep,
// breaks even at 5 MB (4 MB: 77 us alone, 84 in two); steps back to back at 1 MB (4 MB: 31 us and 23).
std::size_t serial_bytes();
void set_serial_bytes(std::size_t bytes);  // 0: every step is divided, as tests want it

// Updates all tensors. Arrays that are written must not overlap with any other array of the step. Bits do not depend on
// `threads`. Returns the instruction set of the kernels that ran (of the active table, if there was nothing to do).
Isa update(std::span<const Tensor> tensors, std::size_t threads);

// For each tensor the sum of the squares of its gradient, or of what the accumulator holds after it was added. The
// order of a sum depends on the number of elements alone.
void measure(std::span<const Tensor> tensors, std::size_t threads, std::span<Squares> sums);

// Adds gradients, times Around::scale, to the accumulators.
void accumulate(std::span<const Tensor> tensors, std::size_t threads);

void zero_gradients(std::span<const Tensor> tensors, std::size_t threads);

// Exchanges parameters and their averages; mirrors follow the parameters.
void exchange(std::span<const Tensor> tensors, std::size_t threads);

// Mirrors take the parameters as they are.
void show(std::span<const Tensor> tensors, std::size_t threads);

}  // namespace onepass
