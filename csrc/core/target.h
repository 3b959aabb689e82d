// How the code that runs on every device is marked.
#pragma once

#if defined(__CUDACC__)
#define HD __host__ __device__ __forceinline__
#else
// Always inlined: no formula may survive as a function of its own. A copy that was compiled for AVX-512 and merged by
// the linker with one from another unit would run on machines that cannot execute it.
#define HD inline __attribute__((always_inline))
#endif

// Before a loop whose body is to be written out as often as it runs.
#if defined(__CUDACC__)
#define ONEPASS_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define ONEPASS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ONEPASS_UNROLL _Pragma("GCC unroll 16")
#endif
