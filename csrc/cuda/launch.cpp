#include "cuda/launch.h"

#include <new>

namespace onepass::cuda {

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
  std::string message = what + " failed: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")";
  if (status == cudaErrorNoKernelImageForDevice) {
    message +=
        "; onepass was built without code for this device: build it again with CUDAARCHS set to its architecture";
  } else if (status == cudaErrorInsufficientDriver) {
    message += "; there is no CUDA driver, or it is older than the CUDA that onepass was built with";
  } else if (status == cudaErrorInvalidResourceHandle || status == cudaErrorContextIsDestroyed) {
    message += "; CuPy's current stream was destroyed, or belongs to another device";
  }
  throw std::runtime_error(message);
}

}  // namespace onepass::cuda
