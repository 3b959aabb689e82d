// A cluster of blocks, which see each other's shared memory (compute capability 9.0). Elsewhere each block is its own
// cluster.
#pragma once

#include <cuda_runtime.h>

namespace onepass::cuda {
namespace {

#if !defined(__CUDACC__)

inline unsigned cluster_size() { return onepass_host_cluster_size(); }
inline unsigned cluster_rank() { return onepass_host_cluster_rank(); }
inline void cluster_sync() { onepass_host_cluster_sync(); }
inline void cluster_arrive() {}
inline void cluster_wait() { onepass_host_cluster_sync(); }
template <class T>
const T* of_rank(const T* shared, unsigned rank) {
  return static_cast<const T*>(onepass_host_cluster_map(const_cast<T*>(shared), rank));
}

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks meet, and see what the others wrote before they arrived.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The place of `shared` in the block of that rank.
template <class T>
__device__ __forceinline__ const T* of_rank(const T* shared, unsigned rank) {
  const T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
}

#else

__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ const T* of_rank(const T* shared, unsigned /*rank*/) {
  return shared;
}

#endif

}  // namespace
}  // namespace onepass::cuda
