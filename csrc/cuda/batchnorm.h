// Batch normalization on a CUDA device: what a call consists of. Plain C++, without a header of CUDA.
//
// Arrays over a whole batch are C-contiguous, (outer, channels, inner), and of `dtype`. Those of one value for each
// channel are of its compute type, unless they are double. All lie in the device's memory, each aligned to its items,
// and what is written overlaps with nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace onepass::cuda {

struct Place;

// At most what a device offers. Less of it takes other ways to the same bits.
struct BatchnormLimits {
  std::size_t shared = SIZE_MAX;  // bytes that a block may use
  unsigned cluster = 8;           // blocks; 1: none
};

struct BatchnormShape {
  DType dtype = DType::float32;
  std::size_t outer = 0;
  std::size_t channels = 0;
  std::size_t inner = 0;
  BatchnormLimits limits;

  std::size_t per_channel() const { return outer * inner; }
  std::size_t count() const { return outer * channels * inner; }
};

struct BatchnormCall : BatchnormShape {
  const void* x = nullptr;
  const void* weight = nullptr;  // null: 1
  const void* bias = nullptr;    // null: 0
  bool relu = false;
  std::byte* scratch = nullptr;  // batchnorm_scratch_bytes(), aligned to 16 bytes; unused outside of training
};

struct BatchnormForward : BatchnormCall {
  const void* residual = nullptr;  // null: none
  void* y = nullptr;               // outside of training it may be x
  double eps = 0;
  bool training = false;
  // In training null, or updated: (1 - momentum) * running + momentum * new. Otherwise the statistics that are used.
  void* running_mean = nullptr;
  void* running_var = nullptr;
  double momentum = 0;
  bool unbiased = true;    // the variance that enters running_var
  double* mean = nullptr;  // what was used, for the backward pass
  double* invstd = nullptr;
  void* weight_used = nullptr;  // likewise, copies; null: not wanted
  void* bias_used = nullptr;
};

struct BatchnormBackward : BatchnormCall {
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

// Of a forward pass in training, and of a backward pass.
std::size_t batchnorm_scratch_bytes(const BatchnormShape& shape);

// Bits depend on the shape and the values alone. An empty batch leaves running statistics alone; mean and invstd are
// NaN then, and gradients of parameters are zero.
void batchnorm_forward(const Place& place, const BatchnormForward& call);
void batchnorm_backward(const Place& place, const BatchnormBackward& call);

}  // namespace onepass::cuda
