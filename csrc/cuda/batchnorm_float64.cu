#include "cuda/batchnorm_kernels.cuh"

namespace onepass::cuda {

template void batchnorm_forward_of<Float64>(const BatchnormForward&, const BatchnormTiling&, const BatchnormPlan&,
                                            void*);
template void batchnorm_backward_of<Float64>(const BatchnormBackward&, const BatchnormTiling&, const BatchnormPlan&,
                                             void*);

}  // namespace onepass::cuda
