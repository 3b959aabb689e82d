// The CUDA runtime on the host: what csrc/cuda uses of it, so that g++ compiles those sources and a test runs them.
//
// This header is found in the place of NVIDIA's. A kernel is a plain function; a launch calls it once for each thread,
// on a stack of the thread's own, so that threads meet at barriers and in shuffles as they do on a device
// (runtime.cpp). Whatever is not here is not needed: a source that uses it does not compile.
#pragma once

#if defined(__CUDACC__)
#error "This header stands for CUDA's on the host; nvcc has its own."
#endif

// What tells sources that they are compiled for the host.
#if !defined(ONEPASS_CUDA_ON_HOST)
#define ONEPASS_CUDA_ON_HOST 1
#endif

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

// --- How functions and variables are marked
// ---------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// The blocks of a launch run one after another on the calling thread, so one copy for each thread of the host is right.
// It keeps the values of the block before: only dynamic shared memory is poisoned. Not for kernels with clusters.
#define __shared__ static thread_local

// --- Vectors
// ----------------------------------------------------------------------------------------------------------

#define ONEPASS_HOST_VECTORS(name, scalar)                                                            \
  struct __align__(2 * sizeof(scalar)) name##2 { scalar x, y; };                                      \
  struct name##3 { scalar x, y, z; };                                                                 \
  struct __align__(4 * sizeof(scalar) > 16 ? 16 : 4 * sizeof(scalar)) name##4 { scalar x, y, z, w; }; \
  constexpr name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                             \
  constexpr name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }                \
  constexpr name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

ONEPASS_HOST_VECTORS(uchar, unsigned char)
ONEPASS_HOST_VECTORS(ushort, unsigned short)
ONEPASS_HOST_VECTORS(int, int)
ONEPASS_HOST_VECTORS(uint, unsigned int)
ONEPASS_HOST_VECTORS(longlong, long long)
ONEPASS_HOST_VECTORS(ulonglong, unsigned long long)
ONEPASS_HOST_VECTORS(float, float)
ONEPASS_HOST_VECTORS(double, double)
#undef ONEPASS_HOST_VECTORS

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// --- Types of the runtime
// ---------------------------------------------------------------------------------------------

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorCudartUnloading = 4,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevicePointer = 17,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorStubLibrary = 34,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorDeviceUninitialized = 201,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorECCUncorrectable = 214,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalState = 401,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorPeerAccessAlreadyEnabled = 704,
  cudaErrorContextIsDestroyed = 709,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotPermitted = 800,
  cudaErrorNotSupported = 801,
  cudaErrorSystemNotReady = 802,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureMerge = 902,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorStreamCaptureImplicit = 906,
  cudaErrorCapturedEvent = 907,
  cudaErrorStreamCaptureWrongThread = 908,
  cudaErrorInvalidClusterSize = 912,
  cudaErrorUnknown = 999,
};
using cudaError_t = cudaError;

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;
#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(std::uintptr_t{1}))
#define cudaStreamPerThread (reinterpret_cast<cudaStream_t>(std::uintptr_t{2}))

inline constexpr unsigned int cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
inline constexpr unsigned int cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
inline constexpr unsigned int cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3,
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void* devicePointer;
  void* hostPointer;
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem;
  std::size_t sharedMemPerBlock;
  int regsPerBlock;
  int warpSize;
  int maxThreadsPerBlock;
  int maxThreadsDim[3];
  int maxGridSize[3];
  int major;
  int minor;
  int multiProcessorCount;
  int l2CacheSize;
  int maxThreadsPerMultiProcessor;
  std::size_t sharedMemPerMultiprocessor;
  std::size_t sharedMemPerBlockOptin;
  std::size_t reservedSharedMemPerBlock;
  int regsPerMultiprocessor;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
  std::size_t constSizeBytes;
  std::size_t localSizeBytes;
  int maxThreadsPerBlock;
  int numRegs;
  int ptxVersion;
  int binaryVersion;
  int cacheModeCA;
  int maxDynamicSharedSizeBytes;
  int preferredShmemCarveout;
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4,
};
union cudaLaunchAttributeValue {
  char pad[64];
  struct {
    unsigned int x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned int numAttrs;
};

// --- Functions of the runtime
// -----------------------------------------------------------------------------------------

extern "C" {
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags = 0);

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, std::size_t bytes,
                                cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMalloc(void** pointer, std::size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned int flags);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
}

template <class T>
cudaError_t cudaMalloc(T** pointer, std::size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}

// --- What tests ask of this runtime (for ctypes as well)
// --------------------------------------------------------------

extern "C" {
// The n-th next call of `function` (1 is the next one) fails with `error`, once; n = 0 takes that back. A kernel's
// launch is cudaLaunchKernel or cudaLaunchKernelExC. A name that this runtime does not have aborts.
void onepass_host_fail(const char* function, int error, int n);
// How often `function` was called since the reset.
unsigned long long onepass_host_calls(const char* function);

// Launches that were accepted since the reset (a recorded one counts when it is recorded, replays do not), and the
// bytes of all their parameters where the pointer is not null.
unsigned long long onepass_host_launches(unsigned long long* parameter_bytes);
struct onepass_host_launch_info {
  unsigned long long grid[3], block[3], cluster[3], shared_bytes, parameter_bytes, device, stream, captured;
};
// The i-th launch since the reset; false where there is none. The first 65,536 are kept.
bool onepass_host_launch(unsigned long long i, onepass_host_launch_info* info);
// Kernels that ran since the reset: launches and replays.
unsigned long long onepass_host_runs();
// Whether launches are looked at and do not run, so that the time of what makes them can be taken.
void onepass_host_pretend(bool pretends);

// Takes back faults, orders, counts, the number of devices, the driver's version and this thread's last error, its
// device and its capture mode. Memory, streams and graphs live on.
void onepass_host_reset();
// 2 at first; 0 makes calls fail with cudaErrorNoDevice.
void onepass_host_set_devices(int count);
void onepass_host_set_driver(int version);
void onepass_host_set_compute_capability(int major, int minor);

// The order in which the blocks of a grid run (and the nodes of a graph that do not depend on each other), and the
// order in which the threads of a block run from barrier to barrier. At first what the environment says:
// ONEPASS_CUDA_ON_HOST_BLOCKS and ONEPASS_CUDA_ON_HOST_THREADS, each forwards, backwards, shuffled or shuffled:<seed>.
enum onepass_host_order_kind { onepass_host_forwards = 0, onepass_host_backwards = 1, onepass_host_shuffled = 2 };
void onepass_host_order(int blocks, int threads, unsigned long long seed);

// Aborts if the surroundings of any block of cudaMalloc were written to; cudaFree does so for its block.
void onepass_host_verify();
// Overwrites a block of cudaMalloc as if it had been freed; its surroundings are verified.
void onepass_host_poison(void* pointer);
// Bytes of cudaMalloc that were not freed, on all devices.
unsigned long long onepass_host_allocated();
}

// --- Launches
// ---------------------------------------------------------------------------------------------------------

namespace onepass_host {

// A kernel with its arguments: what one thread does.
struct Work {
  Work() = default;
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  virtual ~Work() = default;
  virtual void thread() const = 0;
};

template <class... Params>
class Kernel final : public Work {
 public:
  Kernel(void (*kernel)(Params...), void** arguments)
      : Kernel(kernel, arguments, std::index_sequence_for<Params...>()) {}
  void thread() const override { std::apply(kernel_, arguments_); }

 private:
  template <std::size_t... i>
  Kernel(void (*kernel)(Params...), [[maybe_unused]] void** arguments, std::index_sequence<i...>)
      : kernel_(kernel), arguments_(*static_cast<const Params*>(arguments[i])...) {}

  void (*kernel_)(Params...);
  std::tuple<Params...> arguments_;
};

// Bytes of parameters as the device lays them out.
template <class... Params>
constexpr std::size_t parameter_bytes() {
  std::size_t offset = 0;
  ((offset = (offset + alignof(Params) - 1) / alignof(Params) * alignof(Params) + sizeof(Params)), ...);
  return offset;
}

// `check` makes all of a launch's checks; only a launch that passed them copies its arguments.
struct Launch {
  const void* function;
  dim3 grid, block, cluster;
  std::size_t shared, parameter_bytes;
  cudaStream_t stream;
};
cudaError_t check(const char* function, const Launch& launch);
cudaError_t enqueue(const Launch& launch, std::shared_ptr<const Work> work);
// False (and an error that launches report) where an attribute is unknown.
bool read_attributes(const cudaLaunchConfig_t& config, dim3& cluster);

cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* function);
cudaError_t occupancy(int* blocks, const void* function, int threads, std::size_t shared);
cudaError_t cluster_occupancy(int* result, const void* function, const cudaLaunchConfig_t* config, bool size);

template <class... Params>
cudaError_t launch(const char* name, void (*kernel)(Params...), Launch what, void** arguments) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "parameters of a kernel are copied as bytes");
  static_assert(parameter_bytes<Params...>() <= 32764, "parameters of a kernel have no more than 32,764 bytes");
  what.function = reinterpret_cast<const void*>(kernel);
  what.parameter_bytes = parameter_bytes<Params...>();
  if (const cudaError_t status = check(name, what); status != cudaSuccess) return status;
  return enqueue(what, std::make_shared<Kernel<Params...>>(kernel, arguments));
}

}  // namespace onepass_host

template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** arguments, std::size_t shared = 0,
                             cudaStream_t stream = nullptr) {
  return onepass_host::launch("cudaLaunchKernel", kernel, {nullptr, grid, block, {}, shared, 0, stream}, arguments);
}

// NVIDIA's takes the kernel as a `const void*`, which does not say the types of the parameters.
template <class... Params>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, void (*kernel)(Params...), void** arguments) {
  dim3 cluster;
  if (!onepass_host::read_attributes(*config, cluster)) return cudaErrorNotSupported;
  return onepass_host::launch(
      "cudaLaunchKernelExC", kernel,
      {nullptr, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, 0, config->stream}, arguments);
}

template <class... Params, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Arguments&&... arguments) {
  static_assert(sizeof...(Params) == sizeof...(Arguments));
  const auto call = [&](const Params&... params) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))..., nullptr};
    return cudaLaunchKernelExC(config, kernel, pointers);
  };
  return call(std::forward<Arguments>(arguments)...);
}

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return onepass_host::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Params...)) {
  return onepass_host::get_attributes(attributes, reinterpret_cast<const void*>(kernel));
}

template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Params...), int threads,
                                                          std::size_t shared) {
  return onepass_host::occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, shared);
}

template <class... Params>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, void (*kernel)(Params...),
                                                 const cudaLaunchConfig_t* config) {
  return onepass_host::cluster_occupancy(size, reinterpret_cast<const void*>(kernel), config, true);
}

template <class... Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Params...), const cudaLaunchConfig_t* config) {
  return onepass_host::cluster_occupancy(clusters, reinterpret_cast<const void*>(kernel), config, false);
}

// --- What a running thread sees
// ---------------------------------------------------------------------------------------

// `constinit` says that no initialiser has to run, so that a use is a plain load.
extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// The dynamic shared memory of the running block, aligned to 16 bytes; 0xFF at the block's start.
void* onepass_host_shared_memory();

// The cluster of blocks that run together: one block where the launch names none.
unsigned onepass_host_cluster_rank();
unsigned onepass_host_cluster_size();
void onepass_host_cluster_sync();
// The place of `shared` (in dynamic shared memory of the running block) in the block of that rank.
void* onepass_host_cluster_map(void* shared, unsigned rank);

namespace onepass_host {

// All threads of the block that have not returned meet here. Their values: how many are not 0.
unsigned barrier(unsigned value);
// All lanes of the mask that have not returned meet here, and see each other's values; those of all other lanes are
// 0xFF. `what` has to be the same for all of them.
struct Lanes {
  std::uint64_t values[32];
  std::uint32_t present;
  unsigned self;
};
void exchange(const char* what, std::uint32_t mask, std::uint64_t value, Lanes& lanes);

[[noreturn]] void die(const char* message);

template <class T>
T shuffle(const char* what, std::uint32_t mask, T value, int width, auto&& source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a shuffle moves 32 or 64 bits");
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) die("a shuffle's width is a power of two up to 32");
  Lanes lanes;
  exchange(what, mask, std::bit_cast<Bits>(value), lanes);
  const unsigned from = source(lanes.self, static_cast<unsigned>(width));
  return std::bit_cast<T>(static_cast<Bits>(lanes.values[from]));
}

}  // namespace onepass_host

inline void __syncthreads() { onepass_host::barrier(0); }
inline int __syncthreads_count(int predicate) { return static_cast<int>(onepass_host::barrier(predicate != 0)); }
inline int __syncthreads_or(int predicate) { return onepass_host::barrier(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return onepass_host::barrier(predicate == 0) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffU) {
  onepass_host::Lanes lanes;
  onepass_host::exchange("__syncwarp", mask, 0, lanes);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return onepass_host::shuffle("__shfl_sync", mask, value, width, [&](unsigned self, unsigned w) {
    return (self & ~(w - 1)) | (static_cast<unsigned>(lane) & (w - 1));
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return onepass_host::shuffle("__shfl_up_sync", mask, value, width, [&](unsigned self, unsigned w) {
    return (self & (w - 1)) >= delta ? self - delta : self;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return onepass_host::shuffle("__shfl_down_sync", mask, value, width, [&](unsigned self, unsigned w) {
    return delta < w && (self & (w - 1)) + delta < w ? self + delta : self;
  });
}
// The lane may lie in an earlier group of `width` lanes, never in a later one: such a lane gets its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return onepass_host::shuffle("__shfl_xor_sync", mask, value, width, [&](unsigned self, unsigned w) {
    const unsigned from = (self ^ static_cast<unsigned>(lanes)) & 31;
    return from > (self | (w - 1)) ? self : from;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  onepass_host::Lanes lanes;
  onepass_host::exchange("__ballot_sync", mask, predicate != 0, lanes);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((lanes.present >> i & 1) != 0 && lanes.values[i] != 0) result |= 1U << i;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }

// Several threads of the host may run kernels on the same memory.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// For integers alone: a sum of floats would depend on the order.
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
inline int atomicOr(int* at, int value) { return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST); }
inline unsigned atomicOr(unsigned* at, unsigned value) { return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST); }
inline unsigned atomicExch(unsigned* at, unsigned value) { return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST); }
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  unsigned old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
  while (
      !__atomic_compare_exchange_n(at, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
inline unsigned atomicCAS(unsigned* at, unsigned expected, unsigned value) {
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

// Loads and stores with a hint for the caches.
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldlu(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
__extension__ using onepass_host_wide = unsigned __int128;
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(onepass_host_wide{a} * b >> 64);
}

[[noreturn]] inline void __trap() { onepass_host::die("__trap()"); }
