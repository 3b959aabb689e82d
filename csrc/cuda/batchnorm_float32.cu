#include "cuda/batchnorm_kernels.cuh"

namespace onepass::cuda {

template void batchnorm_forward_of<Float32>(const BatchnormForward&, const BatchnormTiling&, const BatchnormPlan&,
                                            void*);
template void batchnorm_backward_of<Float32>(const BatchnormBackward&, const BatchnormTiling&, const BatchnormPlan&,
                                             void*);

}  // namespace onepass::cuda
