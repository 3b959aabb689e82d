// Calls of the CUDA runtime, checked, and what a block's threads share.
//
// The runtime is used through its functions alone, never through `<<<>>>`, so that these sources are plain C++ as well:
// the tests compile them for the host, where a grid is a loop (tests/cuda_on_host).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace onepass::cuda {

// Throws std::bad_alloc for a lack of memory, std::runtime_error with `what` and CUDA's own words for anything else.
// The error is taken from the thread's state: the next call does not find it again.
void check(cudaError_t status, const std::string& what);

// The device that calls of this thread go to, for as long as this object lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) check(cudaSetDevice(device), "switching to device " + std::to_string(device));
    switched_ = device != before_;
  }
  ~OnDevice() {
    if (switched_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

// Enqueues a kernel; `name` is what an error calls it. Arguments are converted to the kernel's parameters, which are
// copied before this returns.
template <class... Params, class... Arguments>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  static_assert(sizeof...(Params) == sizeof...(Arguments));
  // A parameter is the argument itself where the types agree: tables of 32 KiB are not copied twice.
  const auto enqueue = [&](const Params&... params) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))...};
    return cudaLaunchKernel(kernel, grid, block, pointers, shared, stream);
  };
  check(enqueue(arguments...), std::string("launching ") + name);
}

#if defined(__CUDACC__) || defined(ONEPASS_CUDA_ON_HOST)
// Memory that the threads of a block share, as much as the launch asked for. One such array for a kernel.
template <class T>
__device__ inline T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) std::byte onepass_shared_memory[];
  return reinterpret_cast<T*>(onepass_shared_memory);
#else
  return static_cast<T*>(onepass_host_shared_memory());
#endif
}
#endif

}  // namespace onepass::cuda
