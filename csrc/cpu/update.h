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

// How streams that lie in another order than the parameter are walked.
struct Walk {
  std::vector<Axis> axes[kStreams];
  bool gather[kStreams] = {};
};

// A parameter as the weights of units, in the order of its memory: `outer` times `depth` rows of `units` runs of `run`
// elements. A unit's weights are `depth` runs; their norm is held below `limit`.
struct Units {
  std::size_t outer = 1;
  std::size_t depth = 1;
  std::size_t units = 1;
  std::size_t run = 1;
  double limit = 0.0;
};

struct Tensor {
  const Kernel* kernel = nullptr;
  std::size_t storage = 0;  // in Storages
  std::size_t count = 0;    // elements
  Streams streams{};
  DType dtypes[kStreams] = {};
  const double* coefficients = nullptr;
  const Around* around = nullptr;
  double clip = 1.0;             // a factor of the gradient
  const Walk* walk = nullptr;    // null: all streams in the parameter's order
  const Units* units = nullptr;  // null: no limit
  RandomKey key{};
  bool stochastic = false;  // rounding of what is stored in fewer bits than it is computed in
  bool sum_starts = false;  // nothing is in the accumulator yet

  void set(std::size_t stream, const void* data, DType dtype) {
    streams.data[stream] = static_cast<std::byte*>(const_cast<void*>(data));
    dtypes[stream] = dtype;
  }
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
