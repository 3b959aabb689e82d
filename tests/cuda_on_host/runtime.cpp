// The functions of the runtime: devices, streams, captures, memory, and faults on demand.
//
// A launch runs at once, on the calling thread. What a device would refuse is refused here, with the same error: a
// stream of another device, a call that a capture forbids, a configuration beyond the limits of sm_90.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "execution.h"

namespace {

using onepass_host::Launch;
using onepass_host::Order;

// What can be made to fail and is counted.
constexpr auto functions = std::to_array<std::string_view>({
    "cudaGetDeviceCount",
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaGetDeviceProperties",
    "cudaDeviceGetAttribute",
    "cudaDeviceSynchronize",
    "cudaDriverGetVersion",
    "cudaRuntimeGetVersion",
    "cudaStreamCreate",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamSynchronize",
    "cudaStreamQuery",
    "cudaStreamGetDevice",
    "cudaStreamWaitEvent",
    "cudaStreamIsCapturing",
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
    "cudaThreadExchangeStreamCaptureMode",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaEventCreateWithFlags",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaEventQuery",
    "cudaEventDestroy",
    "cudaMemcpy",
    "cudaMemcpyAsync",
    "cudaMemcpyPeerAsync",
    "cudaMemsetAsync",
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaFreeHost",
    "cudaMemGetInfo",
    "cudaPointerGetAttributes",
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaFuncSetAttribute",
    "cudaFuncGetAttributes",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
    "cudaOccupancyMaxPotentialClusterSize",
    "cudaOccupancyMaxActiveClusters",
});

// --- Limits of the devices, those of an H100 but for the memory
// --------------------------------------------------------

constexpr std::size_t device_memory = std::size_t{8} << 30;
constexpr std::size_t shared_without_asking = std::size_t{48} << 10;
constexpr std::size_t shared_at_most = std::size_t{227} << 10;
constexpr std::size_t shared_of_multiprocessor = std::size_t{228} << 10;
constexpr std::size_t shared_reserved = std::size_t{1} << 10;
constexpr int multiprocessors = 132;
constexpr int threads_of_multiprocessor = 2048;
constexpr int blocks_of_multiprocessor = 32;
constexpr int registers_assumed = 32;
constexpr unsigned cluster_portable = 8, cluster_at_most = 16;

// --- What captures record
// ----------------------------------------------------------------------------------------------

using Task = std::function<void()>;

struct Node {
  Task task;
  std::set<std::size_t> after;
};
using Nodes = std::vector<Node>;

struct Capture {
  cudaStreamCaptureMode mode;
  cudaStream_t origin;
  std::thread::id thread;
  bool active = true, valid = true;
  Nodes nodes;
};

}  // namespace

struct CUstream_st {
  int device = 0;
  bool legacy = false, blocking = true, alive = true;
  std::shared_ptr<Capture> capture;
  std::set<std::size_t> tail;  // the nodes that the next one comes after
};
struct CUevent_st {
  int device = 0;
  bool alive = true;
  std::shared_ptr<Capture> capture;
  std::set<std::size_t> tail;
};
struct CUgraph_st {
  bool alive = true;
  std::shared_ptr<const Nodes> nodes;
};
struct CUgraphExec_st {
  bool alive = true;
  std::shared_ptr<const Nodes> nodes;
};

namespace {

struct Memory {
  std::size_t bytes;
  int device;
  bool host;
  std::byte* base;
};

struct Attributes {
  std::size_t shared = shared_without_asking;
  bool large_clusters = false;
};

struct Fault {
  cudaError_t error = cudaSuccess;
  int calls = 0;
};

Order order_of_environment() {
  Order order;
  const auto read = [&](const char* name) {
    const char* const text = std::getenv(name);
    const std::string_view value = text == nullptr || *text == 0 ? "forwards" : text;
    if (value == "forwards") return onepass_host_forwards;
    if (value == "backwards") return onepass_host_backwards;
    if (value.starts_with("shuffled")) {
      if (value.size() > 9) order.seed = std::strtoull(value.data() + 9, nullptr, 10);
      return onepass_host_shuffled;
    }
    std::fprintf(stderr, "cuda_on_host: %s is '%s'; it may be forwards, backwards, shuffled or shuffled:<seed>\n", name,
                 text);
    std::abort();
  };
  order.blocks = read("ONEPASS_CUDA_ON_HOST_BLOCKS");
  order.threads = read("ONEPASS_CUDA_ON_HOST_THREADS");
  return order;
}

struct Settings {
  int devices = 2, driver = 13000, major = 9, minor = 0;
  Order order = order_of_environment();
  bool pretends = false;
};

// All that is shared between threads of the host.
struct Runtime {
  std::mutex mutex;
  Settings settings;
  std::array<Fault, functions.size()> faults;
  std::array<unsigned long long, functions.size()> calls{};
  std::vector<onepass_host_launch_info> log;
  unsigned long long launches = 0, parameter_bytes = 0, runs = 0;
  std::map<std::uintptr_t, Memory> memory;
  std::map<int, std::size_t> in_use;
  // Objects are kept after they were destroyed: no handle comes twice, so the use of an old one is always seen.
  std::map<void*, std::unique_ptr<CUstream_st>> streams;
  std::map<void*, std::unique_ptr<CUevent_st>> events;
  std::map<void*, std::unique_ptr<CUgraph_st>> graphs;
  std::map<void*, std::unique_ptr<CUgraphExec_st>> executables;
  std::map<int, std::unique_ptr<CUstream_st>> legacy;
  std::map<const void*, Attributes> attributes;
};

// Never destroyed: threads may outlive main().
Runtime& runtime() {
  static Runtime& one = *new Runtime;
  return one;
}

thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

std::size_t index_of(std::string_view name) {
  const auto* const found = std::find(functions.begin(), functions.end(), name);
  if (found == functions.end()) {
    std::fprintf(stderr, "cuda_on_host: there is no function '%s' that can fail\n", std::string(name).c_str());
    std::abort();
  }
  return static_cast<std::size_t>(found - functions.begin());
}

// Counts a call; the error that it was told to give. The lock is held.
cudaError_t enter(std::string_view name, bool needs_device = true) {
  Runtime& r = runtime();
  if (onepass_host::running()) onepass_host::die("a function of the runtime was called inside a kernel");
  const std::size_t i = index_of(name);
  ++r.calls[i];
  if (r.faults[i].calls > 0 && --r.faults[i].calls == 0) return r.faults[i].error;
  return needs_device && r.settings.devices == 0 ? cudaErrorNoDevice : cudaSuccess;
}

#define ENTER(...)                             \
  const std::lock_guard lock(runtime().mutex); \
  if (const cudaError_t told = enter(__func__ __VA_OPT__(, ) __VA_ARGS__); told != cudaSuccess) return fail(told)

// --- Streams and captures (the lock is held)
// -----------------------------------------------------------------------------

template <class T>
T* find(std::map<void*, std::unique_ptr<T>>& all, T* handle) {
  const auto found = all.find(handle);
  return found == all.end() || !found->second->alive ? nullptr : handle;
}

// Null for a handle that was never given out or was destroyed.
CUstream_st* stream_of(cudaStream_t stream) {
  Runtime& r = runtime();
  if (stream != nullptr && stream != cudaStreamLegacy && stream != cudaStreamPerThread) return find(r.streams, stream);
  std::unique_ptr<CUstream_st>& own = r.legacy[device];
  if (own == nullptr) {
    own = std::make_unique<CUstream_st>();
    own->device = device;
    own->legacy = true;
  }
  return own.get();
}

bool capturing(const CUstream_st& stream) { return stream.capture != nullptr && stream.capture->active; }

// Captures that forbid this thread what may harm them, by CUDA's rule for the modes.
bool invalidate_for_unsafe_call() {
  if (capture_mode == cudaStreamCaptureModeRelaxed) return false;
  bool any = false;
  for (const auto& entry : runtime().streams) {
    const std::shared_ptr<Capture>& capture = entry.second->capture;
    if (capture == nullptr || !capture->active) continue;
    const bool own = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    const bool global = capture->mode == cudaStreamCaptureModeGlobal && capture_mode == cudaStreamCaptureModeGlobal;
    if (own || global) {
      capture->valid = false;
      any = true;
    }
  }
  return any;
}

#define FORBIDDEN_DURING_CAPTURE() \
  if (invalidate_for_unsafe_call()) return fail(cudaErrorStreamCaptureUnsupported)

// Whether work may go to the stream now.
cudaError_t usable(CUstream_st* stream, bool invalidate = true) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream->legacy) {
    bool any = false;
    for (const auto& entry : runtime().streams) {
      CUstream_st& other = *entry.second;
      if (other.alive && other.blocking && other.device == stream->device && capturing(other)) {
        if (invalidate) other.capture->valid = false;
        any = true;
      }
    }
    if (any) return cudaErrorStreamCaptureImplicit;
  }
  if (capturing(*stream) && !stream->capture->valid) return cudaErrorStreamCaptureInvalidated;
  return cudaSuccess;
}

bool record(CUstream_st& stream, const Task& task) {
  if (!capturing(stream)) return false;
  Nodes& nodes = stream.capture->nodes;
  nodes.push_back({task, stream.tail});
  stream.tail = {nodes.size() - 1};
  return true;
}

// Nodes that do not depend on each other run in the order asked for: a capture that forgot to wait shows.
void run_nodes(const Nodes& nodes, Order order) {
  onepass_host::Shuffle shuffle(order.seed);
  std::vector<std::size_t> waiting(nodes.size());
  std::vector<std::vector<std::size_t>> followers(nodes.size());
  std::vector<std::size_t> ready;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    waiting[i] = nodes[i].after.size();
    for (const std::size_t j : nodes[i].after) followers[j].push_back(i);
    if (waiting[i] == 0) ready.push_back(i);
  }
  while (!ready.empty()) {
    auto next = order.blocks == onepass_host_backwards ? std::max_element(ready.begin(), ready.end())
                                                       : std::min_element(ready.begin(), ready.end());
    if (order.blocks == onepass_host_shuffled)
      next = ready.begin() + static_cast<std::ptrdiff_t>(shuffle(ready.size()));
    const std::size_t i = *next;
    ready.erase(next);
    nodes[i].task();
    for (const std::size_t j : followers[i]) {
      if (--waiting[j] == 0) ready.push_back(j);
    }
  }
}

// Runs the task now or records it. The lock is held by `lock`, and given up to run.
cudaError_t submit(std::unique_lock<std::mutex>& lock, CUstream_st* stream, const Task& task) {
  if (const cudaError_t status = usable(stream); status != cudaSuccess) return fail(status);
  if (record(*stream, task)) return cudaSuccess;
  lock.unlock();
  task();
  return cudaSuccess;
}

#define ENTER_UNIQUE()                                \
  std::unique_lock<std::mutex> lock(runtime().mutex); \
  if (const cudaError_t told = enter(__func__); told != cudaSuccess) return fail(told)

// --- Memory (the lock is held)
// -------------------------------------------------------------------------------------------

constexpr std::size_t memory_guard = 512;
constexpr auto poison = std::byte{0xff};  // a NaN in every format

std::byte* address(const std::pair<const std::uintptr_t, Memory>& block) { return block.second.base + memory_guard; }

void verify(const std::pair<const std::uintptr_t, Memory>& block) {
  const std::byte* const from = address(block);
  for (std::size_t i = 0; i < memory_guard; ++i) {
    const bool before = from[-1 - static_cast<std::ptrdiff_t>(i)] != poison;
    if (before || from[block.second.bytes + i] != poison) {
      std::fprintf(stderr, "cuda_on_host: byte %zu %s a block of %zu bytes on device %d was written to\n", i + 1,
                   before ? "before" : "after", block.second.bytes, block.second.device);
      std::abort();
    }
  }
}

cudaError_t allocate(void** pointer, std::size_t bytes, bool host) {
  Runtime& r = runtime();
  if (pointer == nullptr) return cudaErrorInvalidValue;
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (!host && (bytes > device_memory || r.in_use[device] + bytes > device_memory)) return cudaErrorMemoryAllocation;
  const std::size_t all = (bytes + 2 * memory_guard + 511) / 512 * 512;
  auto* const base = static_cast<std::byte*>(std::aligned_alloc(512, all));
  if (base == nullptr) return cudaErrorMemoryAllocation;
  std::memset(base, std::to_integer<int>(poison), all);
  *pointer = base + memory_guard;
  r.memory[reinterpret_cast<std::uintptr_t>(*pointer)] = {bytes, device, host, base};
  if (!host) r.in_use[device] += bytes;
  return cudaSuccess;
}

cudaError_t release(void* pointer, bool host) {
  Runtime& r = runtime();
  if (pointer == nullptr) return cudaSuccess;
  const auto found = r.memory.find(reinterpret_cast<std::uintptr_t>(pointer));
  if (found == r.memory.end() || found->second.host != host) return cudaErrorInvalidValue;
  verify(*found);
  std::memset(pointer, std::to_integer<int>(poison), found->second.bytes);
  if (!host) r.in_use[found->second.device] -= found->second.bytes;
  std::free(found->second.base);
  r.memory.erase(found);
  return cudaSuccess;
}

// The block that a place lies in (its end counts), or null.
const std::pair<const std::uintptr_t, Memory>* block_of(const void* pointer) {
  auto& memory = runtime().memory;
  const auto place = reinterpret_cast<std::uintptr_t>(pointer);
  auto after = memory.upper_bound(place);
  if (after == memory.begin()) return nullptr;
  --after;
  return place - after->first <= after->second.bytes ? &*after : nullptr;
}

// Whether the bytes lie on a device (that one, unless it is -1), or on the host.
bool lies(const void* pointer, std::size_t bytes, bool on_device, int which = -1) {
  if (bytes == 0) return true;
  const auto* const block = block_of(pointer);
  if (block == nullptr) return !on_device;
  const std::size_t offset = reinterpret_cast<std::uintptr_t>(pointer) - block->first;
  if (bytes > block->second.bytes - offset) return false;
  return block->second.host != on_device && (which < 0 || block->second.device == which);
}

bool ends_fit(const void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  switch (kind) {
    case cudaMemcpyHostToHost:
      return lies(to, bytes, false) && lies(from, bytes, false);
    case cudaMemcpyHostToDevice:
      return lies(to, bytes, true) && lies(from, bytes, false);
    case cudaMemcpyDeviceToHost:
      return lies(to, bytes, false) && lies(from, bytes, true);
    case cudaMemcpyDeviceToDevice:
      return lies(to, bytes, true) && lies(from, bytes, true);
    case cudaMemcpyDefault:
      return (lies(to, bytes, true) || lies(to, bytes, false)) && (lies(from, bytes, true) || lies(from, bytes, false));
  }
  return false;
}

bool is_device(int which) { return which >= 0 && which < runtime().settings.devices; }

Task copy(void* to, const void* from, std::size_t bytes) {
  return [=] {
    if (bytes > 0) std::memmove(to, from, bytes);
  };
}

}  // namespace

// --- Devices
// ---------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  if (count != nullptr) *count = 0;
  ENTER();
  *count = runtime().settings.devices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* which) {
  ENTER();
  *which = device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int which) {
  ENTER();
  if (!is_device(which)) return fail(cudaErrorInvalidDevice);
  device = which;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int which) {
  ENTER();
  if (!is_device(which)) return fail(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "CUDA on the host, device %d", which);
  properties->totalGlobalMem = device_memory;
  properties->sharedMemPerBlock = shared_without_asking;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  for (int i = 0; i < 3; ++i) {
    properties->maxThreadsDim[i] = i < 2 ? 1024 : 64;
    properties->maxGridSize[i] = i == 0 ? std::numeric_limits<int>::max() : 65535;
  }
  properties->major = runtime().settings.major;
  properties->minor = runtime().settings.minor;
  properties->multiProcessorCount = multiprocessors;
  properties->l2CacheSize = 50 << 20;
  properties->maxThreadsPerMultiProcessor = threads_of_multiprocessor;
  properties->sharedMemPerMultiprocessor = shared_of_multiprocessor;
  properties->sharedMemPerBlockOptin = shared_at_most;
  properties->reservedSharedMemPerBlock = shared_reserved;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int which) {
  ENTER();
  if (!is_device(which)) return fail(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = shared_without_asking;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = threads_of_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = runtime().settings.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = runtime().settings.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared_of_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_at_most;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = shared_reserved;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = runtime().settings.major >= 9 ? 1 : 0;
      return cudaSuccess;
  }
  return fail(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize() {
  ENTER();
  bool any = false;
  for (const auto& entry : runtime().streams) {
    const CUstream_st& stream = *entry.second;
    if (stream.device == device && capturing(stream)) {
      stream.capture->valid = false;
      any = true;
    }
  }
  if (any) return fail(cudaErrorStreamCaptureUnsupported);
  FORBIDDEN_DURING_CAPTURE();
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  ENTER(false);
  *version = runtime().settings.driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  ENTER(false);
  *version = 13000;
  return cudaSuccess;
}

// --- Errors
// ------------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

namespace {

struct Words {
  cudaError_t error;
  const char *name, *text;
};
#define WORDS(name, text) {name, #name, text}
constexpr Words words[] = {
    WORDS(cudaSuccess, "no error"),
    WORDS(cudaErrorInvalidValue, "invalid argument"),
    WORDS(cudaErrorMemoryAllocation, "out of memory"),
    WORDS(cudaErrorInitializationError, "initialization error"),
    WORDS(cudaErrorCudartUnloading, "driver shutting down"),
    WORDS(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    WORDS(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    WORDS(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    WORDS(cudaErrorStubLibrary, "CUDA driver is a stub library"),
    WORDS(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    WORDS(cudaErrorCallRequiresNewerDriver, "API call is not supported in the installed CUDA driver"),
    WORDS(cudaErrorDevicesUnavailable, "CUDA-capable device(s) is/are busy or unavailable"),
    WORDS(cudaErrorInvalidDeviceFunction, "invalid device function"),
    WORDS(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    WORDS(cudaErrorInvalidDevice, "invalid device ordinal"),
    WORDS(cudaErrorInvalidKernelImage, "device kernel image is invalid"),
    WORDS(cudaErrorDeviceUninitialized, "invalid device context"),
    WORDS(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    WORDS(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    WORDS(cudaErrorUnsupportedPtxVersion, "the provided PTX was compiled with an unsupported toolchain."),
    WORDS(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    WORDS(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    WORDS(cudaErrorNotReady, "device not ready"),
    WORDS(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    WORDS(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    WORDS(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    WORDS(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled"),
    WORDS(cudaErrorContextIsDestroyed, "context is destroyed"),
    WORDS(cudaErrorMisalignedAddress, "misaligned address"),
    WORDS(cudaErrorLaunchFailure, "unspecified launch failure"),
    WORDS(cudaErrorNotPermitted, "operation not permitted"),
    WORDS(cudaErrorNotSupported, "operation not supported"),
    WORDS(cudaErrorSystemNotReady, "system not yet initialized"),
    WORDS(cudaErrorSystemDriverMismatch, "system has unsupported display driver / cuda driver combination"),
    WORDS(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    WORDS(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    WORDS(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    WORDS(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    WORDS(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    WORDS(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    WORDS(cudaErrorStreamCaptureImplicit,
          "operation would make the legacy stream depend on a capturing blocking stream"),
    WORDS(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    WORDS(cudaErrorStreamCaptureWrongThread,
          "attempt to terminate a thread-local capture sequence from another thread"),
    WORDS(cudaErrorInvalidClusterSize, "invalid cluster size"),
    WORDS(cudaErrorUnknown, "unknown error"),
};
#undef WORDS

const Words* words_of(cudaError_t error) {
  const Words* const found =
      std::find_if(std::begin(words), std::end(words), [&](auto& w) { return w.error == error; });
  return found == std::end(words) ? nullptr : found;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  const Words* const found = words_of(error);
  return found == nullptr ? "unrecognized error code" : found->name;
}

const char* cudaGetErrorString(cudaError_t error) {
  const Words* const found = words_of(error);
  return found == nullptr ? "unrecognized error code" : found->text;
}

// --- Streams
// -----------------------------------------------------------------------------------------------------------------

namespace {

cudaStream_t new_stream(unsigned flags) {
  auto made = std::make_unique<CUstream_st>();
  made->device = device;
  made->blocking = (flags & cudaStreamNonBlocking) == 0;
  cudaStream_t const handle = made.get();
  runtime().streams[handle] = std::move(made);
  return handle;
}

}  // namespace

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  ENTER();
  *stream = new_stream(cudaStreamDefault);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  ENTER();
  if (flags > cudaStreamNonBlocking) return fail(cudaErrorInvalidValue);
  *stream = new_stream(flags);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  ENTER();
  CUstream_st* const found = find(runtime().streams, stream);
  if (found == nullptr) return fail(cudaErrorInvalidResourceHandle);
  found->alive = false;
  if (found->capture != nullptr) found->capture->valid = false;
  found->capture.reset();
  return cudaSuccess;
}

namespace {

cudaError_t wait_for(cudaStream_t stream) {
  CUstream_st* const found = stream_of(stream);
  if (const cudaError_t status = usable(found); status != cudaSuccess) return fail(status);
  if (capturing(*found)) {
    found->capture->valid = false;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  FORBIDDEN_DURING_CAPTURE();
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ENTER();
  return wait_for(stream);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  ENTER();
  return wait_for(stream);
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* which) {
  ENTER();
  const CUstream_st* const found = stream_of(stream);
  if (found == nullptr) return fail(cudaErrorInvalidResourceHandle);
  *which = found->device;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
  ENTER();
  CUstream_st* const waiter = stream_of(stream);
  const CUevent_st* const what = find(runtime().events, event);
  if (what == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (flags != 0) return fail(cudaErrorInvalidValue);
  if (const cudaError_t status = usable(waiter); status != cudaSuccess) return fail(status);
  if (what->capture == nullptr) {
    if (!capturing(*waiter)) return cudaSuccess;
    waiter->capture->valid = false;
    return fail(cudaErrorStreamCaptureIsolation);
  }
  if (!what->capture->active) return fail(cudaErrorCapturedEvent);
  if (!what->capture->valid) return fail(cudaErrorStreamCaptureInvalidated);
  if (waiter->legacy) {
    what->capture->valid = false;
    return fail(cudaErrorStreamCaptureImplicit);
  }
  if (!capturing(*waiter)) {
    waiter->capture = what->capture;
    waiter->tail.clear();
  } else if (waiter->capture != what->capture) {
    waiter->capture->valid = what->capture->valid = false;
    return fail(cudaErrorStreamCaptureMerge);
  }
  waiter->tail.insert(what->tail.begin(), what->tail.end());
  return cudaSuccess;
}

// --- Captures and graphs
// -------------------------------------------------------------------------------------------------

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  ENTER();
  CUstream_st* const found = stream_of(stream);
  if (found == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (found->legacy) {
    if (const cudaError_t error = usable(found, false); error != cudaSuccess) return fail(error);
  }
  *status = !capturing(*found)      ? cudaStreamCaptureStatusNone
            : found->capture->valid ? cudaStreamCaptureStatusActive
                                    : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  ENTER();
  CUstream_st* const found = stream_of(stream);
  if (found == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (found->legacy) return fail(cudaErrorStreamCaptureUnsupported);
  if (capturing(*found)) return fail(cudaErrorIllegalState);
  found->capture = std::make_shared<Capture>();
  found->capture->mode = mode;
  found->capture->origin = stream;
  found->capture->thread = std::this_thread::get_id();
  found->tail.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  ENTER();
  CUstream_st* const found = stream_of(stream);
  if (found == nullptr) return fail(cudaErrorInvalidResourceHandle);
  *graph = nullptr;
  if (!capturing(*found)) return fail(cudaErrorIllegalState);
  const std::shared_ptr<Capture> capture = found->capture;
  if (capture->origin != stream) {
    capture->valid = false;
    return fail(cudaErrorStreamCaptureUnmatched);
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    return fail(cudaErrorStreamCaptureWrongThread);
  }
  capture->active = false;
  std::set<std::size_t> leaves;
  for (std::size_t i = 0; i < capture->nodes.size(); ++i) leaves.insert(i);
  for (const Node& node : capture->nodes) {
    for (const std::size_t i : node.after) leaves.erase(i);
  }
  const bool joined = std::includes(found->tail.begin(), found->tail.end(), leaves.begin(), leaves.end());
  for (const auto& entry : runtime().streams) {
    if (entry.second->capture == capture) entry.second->capture.reset();
  }
  if (!capture->valid) return fail(cudaErrorStreamCaptureInvalidated);
  if (!joined) return fail(cudaErrorStreamCaptureUnjoined);
  auto made = std::make_unique<CUgraph_st>();
  made->nodes = std::make_shared<const Nodes>(std::move(capture->nodes));
  *graph = made.get();
  runtime().graphs[*graph] = std::move(made);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  ENTER();
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  ENTER();
  const CUgraph_st* const found = find(runtime().graphs, graph);
  if (found == nullptr || flags != 0) return fail(cudaErrorInvalidValue);
  auto made = std::make_unique<CUgraphExec_st>();
  made->nodes = found->nodes;
  *executable = made.get();
  runtime().executables[*executable] = std::move(made);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  ENTER_UNIQUE();
  const CUgraphExec_st* const found = find(runtime().executables, executable);
  if (found == nullptr) return fail(cudaErrorInvalidValue);
  const Order order = runtime().settings.order;
  return submit(lock, stream_of(stream), [nodes = found->nodes, order] { run_nodes(*nodes, order); });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  ENTER();
  CUgraph_st* const found = find(runtime().graphs, graph);
  if (found == nullptr) return fail(cudaErrorInvalidValue);
  found->alive = false;
  found->nodes.reset();
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  ENTER();
  CUgraphExec_st* const found = find(runtime().executables, executable);
  if (found == nullptr) return fail(cudaErrorInvalidValue);
  found->alive = false;
  found->nodes.reset();
  return cudaSuccess;
}

// --- Events
// ----------------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  ENTER();
  if (flags > (cudaEventBlockingSync | cudaEventDisableTiming)) return fail(cudaErrorInvalidValue);
  auto made = std::make_unique<CUevent_st>();
  made->device = device;
  *event = made.get();
  runtime().events[*event] = std::move(made);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  ENTER();
  CUstream_st* const found = stream_of(stream);
  CUevent_st* const what = find(runtime().events, event);
  if (what == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (const cudaError_t status = usable(found); status != cudaSuccess) return fail(status);
  if (found->device != what->device) return fail(cudaErrorInvalidResourceHandle);
  what->capture = capturing(*found) ? found->capture : nullptr;
  what->tail = found->tail;
  return cudaSuccess;
}

namespace {

cudaError_t wait_for(cudaEvent_t event) {
  const CUevent_st* const what = find(runtime().events, event);
  if (what == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (what->capture != nullptr) {
    what->capture->valid = false;
    return fail(cudaErrorCapturedEvent);
  }
  FORBIDDEN_DURING_CAPTURE();
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER();
  return wait_for(event);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER();
  return wait_for(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  ENTER();
  CUevent_st* const what = find(runtime().events, event);
  if (what == nullptr) return fail(cudaErrorInvalidResourceHandle);
  what->alive = false;
  return cudaSuccess;
}

// --- Memory
// ----------------------------------------------------------------------------------------------------------------

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  ENTER_UNIQUE();
  if (!ends_fit(to, from, bytes, kind)) return fail(cudaErrorInvalidValue);
  FORBIDDEN_DURING_CAPTURE();
  return submit(lock, stream_of(nullptr), copy(to, from, bytes));
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  ENTER_UNIQUE();
  if (!ends_fit(to, from, bytes, kind)) return fail(cudaErrorInvalidValue);
  return submit(lock, stream_of(stream), copy(to, from, bytes));
}

cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, std::size_t bytes,
                                cudaStream_t stream) {
  ENTER_UNIQUE();
  if (!is_device(to_device) || !is_device(from_device)) return fail(cudaErrorInvalidDevice);
  if (!lies(to, bytes, true, to_device) || !lies(from, bytes, true, from_device)) return fail(cudaErrorInvalidValue);
  return submit(lock, stream_of(stream), copy(to, from, bytes));
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  ENTER_UNIQUE();
  if (!lies(to, bytes, true)) return fail(cudaErrorInvalidValue);
  return submit(lock, stream_of(stream), [=] {
    if (bytes > 0) std::memset(to, value, bytes);
  });
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  ENTER();
  FORBIDDEN_DURING_CAPTURE();
  return fail(allocate(pointer, bytes, false));
}

cudaError_t cudaFree(void* pointer) {
  ENTER();
  FORBIDDEN_DURING_CAPTURE();
  return fail(release(pointer, false));
}

cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned int flags) {
  ENTER();
  FORBIDDEN_DURING_CAPTURE();
  if (flags > 7) return fail(cudaErrorInvalidValue);
  return fail(allocate(pointer, bytes, true));
}

cudaError_t cudaFreeHost(void* pointer) {
  ENTER();
  FORBIDDEN_DURING_CAPTURE();
  return fail(release(pointer, true));
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  ENTER();
  *total = device_memory;
  *free = device_memory - runtime().in_use[device];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  ENTER();
  const auto* const block = block_of(pointer);
  void* const place = const_cast<void*>(pointer);
  if (block == nullptr) {
    *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, place};
  } else if (block->second.host) {
    *attributes = {cudaMemoryTypeHost, block->second.device, place, place};
  } else {
    *attributes = {cudaMemoryTypeDevice, block->second.device, place, nullptr};
  }
  return cudaSuccess;
}

// --- Launches
// --------------------------------------------------------------------------------------------------------------

namespace onepass_host {

bool read_attributes(const cudaLaunchConfig_t& config, dim3& cluster) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
    } else if (attribute.id != cudaLaunchAttributeIgnore) {
      fail(cudaErrorNotSupported);
      return false;
    }
  }
  return true;
}

cudaError_t check(const char* function, const Launch& launch) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  if (const cudaError_t told = enter(function); told != cudaSuccess) return fail(told);
  const auto [shared, large_clusters] = r.attributes[launch.function];
  const dim3 &grid = launch.grid, &block = launch.block, &cluster = launch.cluster;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      block.x == 0 || block.y == 0 || block.z == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      std::size_t{block.x} * block.y * block.z > 1024) {
    return fail(cudaErrorInvalidConfiguration);
  }
  const std::size_t blocks = std::size_t{cluster.x} * cluster.y * cluster.z;
  if (blocks == 0 || blocks > (large_clusters ? cluster_at_most : cluster_portable) ||
      (blocks > 1 && r.settings.major < 9)) {
    return fail(cudaErrorInvalidClusterSize);
  }
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return fail(cudaErrorInvalidConfiguration);
  }
  if (launch.shared > shared) return fail(cudaErrorInvalidValue);
  const CUstream_st* const stream = stream_of(launch.stream);
  if (stream == nullptr || stream->device != device) return fail(cudaErrorInvalidResourceHandle);
  return cudaSuccess;
}

cudaError_t enqueue(const Launch& launch, std::shared_ptr<const Work> work) {
  Runtime& r = runtime();
  std::unique_lock<std::mutex> lock(r.mutex);
  CUstream_st* const stream = stream_of(launch.stream);
  if (const cudaError_t status = usable(stream); status != cudaSuccess) return fail(status);
  ++r.launches;
  r.parameter_bytes += launch.parameter_bytes;
  if (r.log.size() < 65536) {
    const auto three = [](const dim3& from, unsigned long long* to) {
      to[0] = from.x;
      to[1] = from.y;
      to[2] = from.z;
    };
    onepass_host_launch_info& info = r.log.emplace_back();
    three(launch.grid, info.grid);
    three(launch.block, info.block);
    three(launch.cluster, info.cluster);
    info.shared_bytes = launch.shared;
    info.parameter_bytes = launch.parameter_bytes;
    info.device = static_cast<unsigned long long>(device);
    info.stream = reinterpret_cast<unsigned long long>(launch.stream);
    info.captured = capturing(*stream) ? 1 : 0;
  }
  if (r.settings.pretends) return cudaSuccess;
  return submit(lock, stream, [launch, work = std::move(work)] {
    Order order;
    {
      const std::lock_guard inner(runtime().mutex);
      order = runtime().settings.order;
      order.seed += runtime().runs++;
    }
    onepass_host::run(launch, *work, order);
  });
}

cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  if (const cudaError_t told = enter("cudaFuncSetAttribute"); told != cudaSuccess) return fail(told);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || static_cast<std::size_t>(value) > shared_at_most) return fail(cudaErrorInvalidValue);
      r.attributes[function].shared = std::max(static_cast<std::size_t>(value), shared_without_asking);
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return value < -1 || value > 100 ? fail(cudaErrorInvalidValue) : cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      r.attributes[function].large_clusters = value != 0;
      return cudaSuccess;
  }
  return fail(cudaErrorInvalidValue);
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* function) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  if (const cudaError_t told = enter("cudaFuncGetAttributes"); told != cudaSuccess) return fail(told);
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = registers_assumed;
  attributes->ptxVersion = attributes->binaryVersion = 10 * r.settings.major + r.settings.minor;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(r.attributes[function].shared);
  attributes->preferredShmemCarveout = -1;
  return cudaSuccess;
}

namespace {

int blocks_that_fit(int threads, std::size_t shared) {
  if (threads < 1 || threads > 1024 || shared > shared_at_most) return 0;
  const int rounded = (threads + 31) / 32 * 32;
  const int by_threads = std::min(threads_of_multiprocessor, 65536 / registers_assumed) / rounded;
  const int by_memory = static_cast<int>(shared_of_multiprocessor / (shared + shared_reserved));
  return std::min({by_threads, by_memory, blocks_of_multiprocessor});
}

}  // namespace

cudaError_t occupancy(int* blocks, const void* function, int threads, std::size_t shared) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  const cudaError_t told = enter("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (told != cudaSuccess) return fail(told);
  if (threads < 1) return fail(cudaErrorInvalidValue);
  *blocks = shared > r.attributes[function].shared ? 0 : blocks_that_fit(threads, shared);
  return cudaSuccess;
}

cudaError_t cluster_occupancy(int* result, const void* function, const cudaLaunchConfig_t* config, bool size) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  const cudaError_t told = enter(size ? "cudaOccupancyMaxPotentialClusterSize" : "cudaOccupancyMaxActiveClusters");
  if (told != cudaSuccess) return fail(told);
  dim3 cluster;
  if (!read_attributes(*config, cluster)) return cudaErrorNotSupported;
  const auto [shared, large_clusters] = r.attributes[function];
  const dim3& block = config->blockDim;
  const int fit = config->dynamicSmemBytes > shared
                      ? 0
                      : blocks_that_fit(static_cast<int>(block.x * block.y * block.z), config->dynamicSmemBytes);
  const unsigned most = r.settings.major < 9 ? 1 : large_clusters ? cluster_at_most : cluster_portable;
  const unsigned asked = cluster.x * cluster.y * cluster.z;
  if (size) {
    *result = fit == 0 ? 0 : static_cast<int>(most);
  } else {
    *result = asked == 0 || asked > most ? 0 : fit * multiprocessors / static_cast<int>(asked);
  }
  return cudaSuccess;
}

}  // namespace onepass_host

// --- What tests ask
// ----------------------------------------------------------------------------------------------------------

void onepass_host_fail(const char* function, int error, int n) {
  const std::lock_guard lock(runtime().mutex);
  runtime().faults[index_of(function)] = {static_cast<cudaError_t>(error), n};
}

unsigned long long onepass_host_calls(const char* function) {
  const std::lock_guard lock(runtime().mutex);
  return runtime().calls[index_of(function)];
}

unsigned long long onepass_host_launches(unsigned long long* parameter_bytes) {
  const std::lock_guard lock(runtime().mutex);
  if (parameter_bytes != nullptr) *parameter_bytes = runtime().parameter_bytes;
  return runtime().launches;
}

bool onepass_host_launch(unsigned long long i, onepass_host_launch_info* info) {
  const std::lock_guard lock(runtime().mutex);
  if (i >= runtime().log.size()) return false;
  *info = runtime().log[i];
  return true;
}

unsigned long long onepass_host_runs() {
  const std::lock_guard lock(runtime().mutex);
  return runtime().runs;
}

void onepass_host_pretend(bool pretends) {
  const std::lock_guard lock(runtime().mutex);
  runtime().settings.pretends = pretends;
}

void onepass_host_reset() {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  r.settings = {};
  r.faults = {};
  r.calls = {};
  r.log.clear();
  r.launches = r.parameter_bytes = r.runs = 0;
  device = 0;
  last_error = cudaSuccess;
  capture_mode = cudaStreamCaptureModeGlobal;
}

void onepass_host_set_devices(int count) {
  const std::lock_guard lock(runtime().mutex);
  runtime().settings.devices = count;
}

void onepass_host_set_driver(int version) {
  const std::lock_guard lock(runtime().mutex);
  runtime().settings.driver = version;
}

void onepass_host_set_compute_capability(int major, int minor) {
  const std::lock_guard lock(runtime().mutex);
  runtime().settings.major = major;
  runtime().settings.minor = minor;
}

void onepass_host_order(int blocks, int threads, unsigned long long seed) {
  const std::lock_guard lock(runtime().mutex);
  runtime().settings.order = {blocks, threads, seed};
}

void onepass_host_verify() {
  const std::lock_guard lock(runtime().mutex);
  for (const auto& block : runtime().memory) verify(block);
}

void onepass_host_poison(void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  const auto found = runtime().memory.find(reinterpret_cast<std::uintptr_t>(pointer));
  if (found == runtime().memory.end()) onepass_host::die("only a block of cudaMalloc can be poisoned");
  verify(*found);
  std::memset(pointer, std::to_integer<int>(poison), found->second.bytes);
}

unsigned long long onepass_host_allocated() {
  const std::lock_guard lock(runtime().mutex);
  unsigned long long all = 0;
  for (const auto& entry : runtime().in_use) all += entry.second;
  return all;
}
