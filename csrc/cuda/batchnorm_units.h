// What the units of batch normalization export: one for each dtype, so that they are compiled side by side.
#pragma once

#include "core/dtype.h"
#include "cuda/batchnorm.h"
#include "cuda/batchnorm_plan.h"

namespace onepass::cuda {

// Of a batch with elements, on the current device.
template <class D>
void batchnorm_forward_of(const BatchnormForward& call, const BatchnormTiling& t, const BatchnormPlan& plan,
                          void* stream);
template <class D>
void batchnorm_backward_of(const BatchnormBackward& call, const BatchnormTiling& t, const BatchnormPlan& plan,
                           void* stream);

}  // namespace onepass::cuda
