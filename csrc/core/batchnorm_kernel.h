// What a batch-normalization unit exports: plain data and plain pointers, as in kernel.h.
#pragma once

#include <cstddef>

#include "batchnorm/plan.h"
#include "core/dtype.h"
#include "core/kernel.h"

namespace onepass::batchnorm {

// Arrays over a whole batch share one layout. Arrays of one value per channel are in the compute type.

struct Region {
  Range channels;  // of one tile
  Range blocks;
};

struct Forward {
  const void* x;
  const void* residual;  // null: none
  void* y;
  bool relu;
  bool bypass_cache;                  // y is too large to be found in a cache later: written past it
  const void *high, *scale, *offset;  // formulas.h
};

struct Backward {
  const void* x;
  const void* dy;
  const void* y;  // null: not needed, or recomputed from x
  bool relu;      // dy counts only where the output was positive
  bool frozen;    // the statistics were not those of the batch
  void* dx;
  void* dresidual;  // null: not wanted
  bool bypass_cache;
  const void *high, *scale, *offset;  // as in the forward pass
  const void *level, *slope;          // used by input_gradients(), unless frozen
};

struct Kernels {
  // Mean and sum of squared deviations of each channel of a region: mean[0] and m2[0] are those of its first channel.
  Isa (*moments)(const Plan& plan, const Region& region, const void* x, double* mean, double* m2);
  Isa (*normalize)(const Plan& plan, const Region& region, const Forward& pass);
  // The sums of dy and of dy * (x - high) over each channel of a region.
  Isa (*sums)(const Plan& plan, const Region& region, const Backward& pass, double* dy, double* dy_x);
  Isa (*input_gradients)(const Plan& plan, const Region& region, const Backward& pass);
};

struct Table {
  Kernels kernels[ComputeTypes::size];
};

}  // namespace onepass::batchnorm
