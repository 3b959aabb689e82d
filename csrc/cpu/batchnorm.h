// Batch normalization over a C-contiguous array (outer, channels, inner). The library's face for C++: validate, fill in
// a call, and run it.
#pragma once

#include <cstddef>

#include "core/dtype.h"
#include "core/kernel.h"

namespace onepass::batchnorm {

// All arrays are of `dtype` unless they are double, and hold outer * channels * inner values or one for each channel.
// Those that are written do not overlap with any other.
struct Batch {
  DType dtype = DType::float32;
  std::size_t outer = 0;
  std::size_t channels = 0;
  std::size_t inner = 0;
  const void* weight = nullptr;  // null: 1
  const void* bias = nullptr;    // null: 0
  const void* x = nullptr;
  bool relu = false;

  std::size_t per_channel() const { return outer * inner; }
  std::size_t count() const { return outer * channels * inner; }
};

struct ForwardCall : Batch {
  const void* residual = nullptr;  // null: none
  void* y = nullptr;
  double eps = 0;
  bool training = false;
  // In training null, or updated: (1 - momentum) * running + momentum * new. Otherwise the statistics that are used.
  void* running_mean = nullptr;
  void* running_var = nullptr;
  double momentum = 0;
  bool unbiased = true;    // the variance that enters running_var
  double* mean = nullptr;  // what was used, for the backward pass
  double* invstd = nullptr;
};

struct BackwardCall : Batch {
  const void* dy = nullptr;
  const void* y = nullptr;  // of the forward pass, where there was a residual and relu; else null
  bool frozen = false;      // the forward pass was not in training
  const double* mean = nullptr;
  const double* invstd = nullptr;
  void* dx = nullptr;
  void* dresidual = nullptr;  // null: not wanted. Without relu it would be dy
  void* dweight = nullptr;    // null: not wanted
  void* dbias = nullptr;
};

// Bits do not depend on `threads`. An empty batch leaves running statistics alone; mean and invstd are NaN.
Isa forward(const ForwardCall& call, std::size_t threads);
Isa backward(const BackwardCall& call, std::size_t threads);

}  // namespace onepass::batchnorm
