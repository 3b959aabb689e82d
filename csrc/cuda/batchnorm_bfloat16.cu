#include "cuda/batchnorm_kernels.cuh"

namespace onepass::cuda {

template void batchnorm_forward_of<BFloat16>(const BatchnormForward&, const BatchnormTiling&, const BatchnormPlan&,
                                             void*);
template void batchnorm_backward_of<BFloat16>(const BatchnormBackward&, const BatchnormTiling&, const BatchnormPlan&,
                                              void*);

}  // namespace onepass::cuda
