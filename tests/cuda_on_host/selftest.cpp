// Tests of the runtime on the host itself: that it runs kernels as a device does, and sees mistakes that a device would
// punish. Prints what is wrong; returns 1 if anything is.
#include <cuda/launch.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace onepass::cuda {
// The library's own is in csrc/cuda; this one says what the selftest needs.
void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}
}  // namespace onepass::cuda

namespace {

int failures = 0;

void expect(bool holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  std::printf("selftest.cpp:%d: %s\n", line, what);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)
#define EXPECT_STATUS(call, status)                                                                            \
  do {                                                                                                         \
    const cudaError_t got = call;                                                                              \
    expect(got == (status), (std::string(#call " gives ") + cudaGetErrorName(got) + ", not " #status).c_str(), \
           __LINE__);                                                                                          \
  } while (false)
#define OK(call) EXPECT_STATUS(call, cudaSuccess)

// Whether `body` aborts; what it prints is lost.
template <class Body>
bool dies(Body body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(2);
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) || WEXITSTATUS(status) == 1;  // sanitizers turn an abort into an exit
}
#define EXPECT_DEATH(...) EXPECT(dies([&] { __VA_ARGS__; }))

template <class T>
class Array {
 public:
  explicit Array(std::size_t size, const T* values = nullptr) : size_(size) {
    OK(cudaMalloc(&data_, size * sizeof(T)));
    if (values != nullptr) OK(cudaMemcpy(data_, values, size * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Array() { OK(cudaFree(data_)); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  operator T*() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    OK(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

// --- Kernels
// ---------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(256) who(unsigned* seen, unsigned* order, unsigned* turn) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned index = block * blockDim.x * blockDim.y * blockDim.z + thread;
  atomicAdd(&seen[index], 1U);
  order[atomicAdd(turn, 1U)] = index;
}

// The sum of a block by a tree in shared memory; `sums[block]`.
__global__ void tree(const unsigned* values, unsigned* sums) {
  __shared__ unsigned partial[1024];
  const unsigned i = threadIdx.x;
  partial[i] = values[blockIdx.x * blockDim.x + i];
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (i < step) partial[i] += partial[i + step];
    __syncthreads();
  }
  if (i == 0) sums[blockIdx.x] = partial[0];
}

// The same by shuffles within warps, then over the warps' sums in dynamic shared memory.
__global__ void warps(const std::uint64_t* values, std::uint64_t* sums) {
  auto* const partial = onepass::cuda::dynamic_shared<std::uint64_t>();
  std::uint64_t sum = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffU, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned i = 1; i < blockDim.x / 32; ++i) sum += partial[i];
  sums[blockIdx.x] = sum;
}

// Forgets the barrier between writing and reading: right in the order that happens to suit it.
__global__ void careless(unsigned* out) {
  auto* const partial = onepass::cuda::dynamic_shared<unsigned>();
  partial[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = threadIdx.x == 0 ? 0 : partial[threadIdx.x - 1];
}

__global__ void lanes(float* shuffled, unsigned* ballots) {
  const auto i = static_cast<int>(threadIdx.x);
  const auto value = static_cast<float>(i);
  float* const out = shuffled + i * 5;
  out[0] = __shfl_sync(0xffffffffU, value, 3);
  out[1] = __shfl_sync(0xffffffffU, value, 1, 8);
  out[2] = __shfl_xor_sync(0xffffffffU, value, 5);
  out[3] = __shfl_up_sync(0xffffffffU, value, 2);
  out[4] = __shfl_down_sync(0xffffffffU, value, 3, 16);
  ballots[i] = __ballot_sync(0xffffffffU, i % 3 == 0);
  // Two halves of a warp, each on its own.
  const unsigned half = i < 16 ? 0x0000ffffU : 0xffff0000U;
  ballots[i + 32] = __ballot_sync(half, 1);
  ballots[i + 64] = static_cast<unsigned>(__any_sync(half, i == 20));
  ballots[i + 96] = static_cast<unsigned>(__syncthreads_count(i < 7));
}

// Half of the threads return: the others meet without them.
__global__ void some_return(unsigned* out) {
  if (threadIdx.x % 2 == 1) return;
  __syncthreads();
  out[threadIdx.x] = static_cast<unsigned>(__syncthreads_count(1));
}

__global__ void stuck(int) {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void strange_mask(int) { (void)__shfl_sync(2U, 1.0F, 0); }

__global__ void scale(float* values, float by) { values[threadIdx.x] *= by; }

__global__ void past_the_end(float* values, unsigned n) { values[n] = 1; }

__global__ void past_shared(int) { onepass::cuda::dynamic_shared<char>()[100] = 1; }

__global__ void uninitialized(float* out) { out[0] = onepass::cuda::dynamic_shared<float>()[0]; }

// Each block shows its rank in its own shared memory; each reads its right neighbour's.
__global__ void neighbours(unsigned* out) {
  auto* const own = onepass::cuda::dynamic_shared<unsigned>();
  const unsigned rank = onepass_host_cluster_rank(), size = onepass_host_cluster_size();
  own[threadIdx.x] = 100 * rank + threadIdx.x;
  onepass_host_cluster_sync();
  const auto* const other = static_cast<unsigned*>(onepass_host_cluster_map(own, (rank + 1) % size));
  out[blockIdx.x * blockDim.x + threadIdx.x] = other[threadIdx.x];
  onepass_host_cluster_sync();
}

struct Big {
  std::array<double, 4000> values;
};
__global__ void big(const __grid_constant__ Big parameter, char tail, double* out) {
  out[threadIdx.x] = parameter.values[4000 - 1 - threadIdx.x] + tail;
}

// --- Tests
// -------------------------------------------------------------------------------------------------------------------

void test_coordinates_and_orders() {
  const dim3 grid(3, 2, 2), block(4, 3, 2);
  const unsigned count = 12 * 24;
  std::vector<std::vector<unsigned>> orders;
  for (const int kind : {onepass_host_forwards, onepass_host_backwards, onepass_host_shuffled}) {
    onepass_host_order(kind, kind, 5);
    const std::vector<unsigned> zeros(count, 0);
    const Array<unsigned> seen(count, zeros.data()), order(count), turn(1, zeros.data());
    onepass::cuda::launch("who", who, grid, block, 0, nullptr, static_cast<unsigned*>(seen),
                          static_cast<unsigned*>(order), static_cast<unsigned*>(turn));
    EXPECT(seen.host() == std::vector<unsigned>(count, 1));
    orders.push_back(order.host());
  }
  bool forwards = true, backwards = true, whole_blocks = true;
  for (unsigned i = 0; i < count; ++i) {
    forwards = forwards && orders[0][i] == i;
    backwards = backwards && orders[1][i] == count - 1 - i;
    whole_blocks = whole_blocks && orders[2][i] / 24 == orders[2][i / 24 * 24] / 24;
  }
  EXPECT(forwards && backwards && whole_blocks);
  EXPECT(orders[2] != orders[0]);
  onepass_host_reset();
}

void test_reductions() {
  for (const int kind : {onepass_host_forwards, onepass_host_backwards, onepass_host_shuffled}) {
    onepass_host_order(kind, kind, 1);
    std::vector<unsigned> values(3 * 256);
    std::vector<std::uint64_t> wide(values.size());
    std::vector<unsigned> sums(3, 0);
    std::vector<std::uint64_t> wide_sums(3, 0);
    for (unsigned i = 0; i < values.size(); ++i) {
      values[i] = i * i;
      wide[i] = std::uint64_t{i} << 33 | i;
      sums[i / 256] += values[i];
      wide_sums[i / 256] += wide[i];
    }
    const Array<unsigned> in(values.size(), values.data()), out(3);
    onepass::cuda::launch("tree", tree, 3, 256, 0, nullptr, static_cast<unsigned*>(in), static_cast<unsigned*>(out));
    EXPECT(out.host() == sums);
    const Array<std::uint64_t> wide_in(wide.size(), wide.data()), wide_out(3);
    onepass::cuda::launch("warps", warps, 3, 256, 64, nullptr, static_cast<std::uint64_t*>(wide_in),
                          static_cast<std::uint64_t*>(wide_out));
    EXPECT(wide_out.host() == wide_sums);
    onepass_host_reset();
  }
  // An order shows what a missing barrier hides.
  const Array<unsigned> out(64);
  onepass::cuda::launch("careless", careless, 1, 64, 256, nullptr, static_cast<unsigned*>(out));
  EXPECT(out.host()[63] == 62);
  onepass_host_order(onepass_host_forwards, onepass_host_backwards, 0);
  onepass::cuda::launch("careless", careless, 1, 64, 256, nullptr, static_cast<unsigned*>(out));
  EXPECT(out.host()[63] == 0xffffffffU);
  onepass_host_reset();
}

void test_lanes() {
  const Array<float> shuffled(32 * 5);
  const Array<unsigned> ballots(128);
  onepass::cuda::launch("lanes", lanes, 1, 32, 0, nullptr, static_cast<float*>(shuffled),
                        static_cast<unsigned*>(ballots));
  const std::vector<float> got = shuffled.host();
  const std::vector<unsigned> votes = ballots.host();
  for (unsigned i = 0; i < 32; ++i) {
    const std::array<unsigned, 5> from = {3, i / 8 * 8 + 1, i ^ 5, i < 2 ? i : i - 2, i % 16 < 13 ? i + 3 : i};
    for (unsigned k = 0; k < 5; ++k) EXPECT(got[i * 5 + k] == static_cast<float>(from[k]));
    EXPECT(votes[i] == 0x49249249U);
    EXPECT(votes[i + 32] == (i < 16 ? 0xffffU : 0xffff0000U));
    EXPECT(votes[i + 64] == (i < 16 ? 0 : 1));
    EXPECT(votes[i + 96] == 7);
  }
  const Array<unsigned> out(64);
  onepass::cuda::launch("some_return", some_return, 1, 64, 0, nullptr, static_cast<unsigned*>(out));
  EXPECT(out.host()[62] == 32);
  EXPECT_DEATH(onepass::cuda::launch("stuck", stuck, 1, 2, 0, nullptr, 0));
  EXPECT_DEATH(onepass::cuda::launch("strange_mask", strange_mask, 1, 2, 0, nullptr, 0));
}

void test_clusters() {
  const Array<unsigned> out(8 * 40);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {4, 1, 1};
  cudaLaunchConfig_t config{8, 40, 40 * sizeof(unsigned), nullptr, &attribute, 1};
  for (const int kind : {onepass_host_forwards, onepass_host_backwards, onepass_host_shuffled}) {
    onepass_host_order(kind, kind, 3);
    OK(cudaLaunchKernelEx(&config, neighbours, static_cast<unsigned*>(out)));
    const std::vector<unsigned> got = out.host();
    for (unsigned i = 0; i < got.size(); ++i) EXPECT(got[i] == 100 * ((i / 40 + 1) % 4) + i % 40);
  }
  onepass_host_reset();
  config.gridDim = 6;
  EXPECT_STATUS(cudaLaunchKernelEx(&config, neighbours, static_cast<unsigned*>(out)), cudaErrorInvalidConfiguration);
  config.gridDim = 16;
  attribute.val.clusterDim.x = 16;
  EXPECT_STATUS(cudaLaunchKernelEx(&config, neighbours, static_cast<unsigned*>(out)), cudaErrorInvalidClusterSize);
  EXPECT(cudaGetLastError() == cudaErrorInvalidClusterSize && cudaGetLastError() == cudaSuccess);
}

void test_parameters_and_limits() {
  const Array<double> out(1000);
  Big parameter;
  for (unsigned i = 0; i < 4000; ++i) parameter.values[i] = i;
  onepass_host_reset();
  onepass::cuda::launch("big", big, 1, 1000, 0, nullptr, parameter, 'a', static_cast<double*>(out));
  EXPECT(out.host()[999] == 4000 - 1000 + 'a');
  unsigned long long bytes = 0;
  EXPECT(onepass_host_launches(&bytes) == 1 && bytes == 32016);
  onepass_host_launch_info info;
  EXPECT(onepass_host_launch(0, &info) && info.block[0] == 1000 && !onepass_host_launch(1, &info));
  const auto shape = [&](dim3 grid, dim3 block, std::size_t shared) {
    float* values = nullptr;
    float by = 1;
    void* arguments[] = {&values, &by};
    return cudaLaunchKernel(scale, grid, block, arguments, shared);
  };
  EXPECT_STATUS(shape(0, 1, 0), cudaErrorInvalidConfiguration);
  EXPECT_STATUS(shape(1, 0, 0), cudaErrorInvalidConfiguration);
  EXPECT_STATUS(shape(1, 1025, 0), cudaErrorInvalidConfiguration);
  EXPECT_STATUS(shape(1, dim3(32, 33), 0), cudaErrorInvalidConfiguration);
  EXPECT_STATUS(shape(dim3(1, 65536), 1, 0), cudaErrorInvalidConfiguration);
  EXPECT_STATUS(shape(1, 1, 49153), cudaErrorInvalidValue);
  EXPECT_STATUS(cudaFuncSetAttribute(uninitialized, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449),
                cudaErrorInvalidValue);
  OK(cudaFuncSetAttribute(uninitialized, cudaFuncAttributeMaxDynamicSharedMemorySize, 232448));
  onepass::cuda::launch("uninitialized", uninitialized, 1, 1, 232448, nullptr, reinterpret_cast<float*>(&out[0]));
  EXPECT(std::isnan(reinterpret_cast<float*>(&out[0])[0]));
  EXPECT_DEATH(onepass::cuda::launch("past_shared", past_shared, 1, 1, 100, nullptr, 0));
  EXPECT(!dies([] { onepass::cuda::launch("past_shared", past_shared, 1, 1, 101, nullptr, 0); }));
  int blocks = 0;
  OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale, 256, 0));
  EXPECT(blocks == 8);
}

void test_arithmetic() {
  const float values[2] = {std::numeric_limits<float>::min(), std::numeric_limits<float>::denorm_min()};
  const Array<float> out(2, values);
  onepass::cuda::launch("scale", scale, 1, 2, 0, nullptr, static_cast<float*>(out), 0.5F);
  EXPECT(out.host() == std::vector<float>({0, 0}));  // a subnormal result, a subnormal operand
  volatile float smallest = values[0];
  EXPECT(smallest * 0.5F != 0);  // the caller's arithmetic is as it was
}

void test_memory() {
  EXPECT(onepass_host_allocated() == 0);
  {
    const Array<float> values(10);
    EXPECT(std::isnan(values.host()[9]) && onepass_host_allocated() == 40);
    cudaPointerAttributes attributes;
    OK(cudaPointerGetAttributes(&attributes, values + 3));
    EXPECT(attributes.type == cudaMemoryTypeDevice && attributes.device == 0);
    float host[11] = {};
    EXPECT_STATUS(cudaMemcpy(values, host, 44, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    EXPECT_STATUS(cudaMemcpy(values, host, 40, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
    OK(cudaMemsetAsync(values, 0, 40));
    EXPECT(values.host() == std::vector<float>(10, 0));
    EXPECT_STATUS(cudaFree(host), cudaErrorInvalidValue);
    EXPECT_DEATH(onepass::cuda::launch("past", past_the_end, 1, 1, 0, nullptr, static_cast<float*>(values), 10U);
                 (void)cudaFree(values));
    EXPECT_DEATH(onepass::cuda::launch("past", past_the_end, 1, 1, 0, nullptr, static_cast<float*>(values) - 1, 0U);
                 onepass_host_verify());
  }
  onepass_host_fail("cudaMalloc", cudaErrorMemoryAllocation, 2);
  void* first = nullptr;
  void* second = nullptr;
  OK(cudaMalloc(&first, 8));
  EXPECT_STATUS(cudaMalloc(&second, 8), cudaErrorMemoryAllocation);
  OK(cudaMalloc(&second, 8));
  EXPECT(onepass_host_calls("cudaMalloc") > 2);
  EXPECT_DEATH(onepass_host_fail("cudaMallok", 2, 1));
  OK(cudaSetDevice(1));
  void* third = nullptr;
  OK(cudaMalloc(&third, 8));
  OK(cudaMemcpyPeerAsync(third, 1, first, 0, 8));
  EXPECT_STATUS(cudaMemcpyPeerAsync(third, 0, first, 1, 8), cudaErrorInvalidValue);
  EXPECT_STATUS(cudaMalloc(&second, std::size_t{1} << 40), cudaErrorMemoryAllocation);
  EXPECT(second == nullptr);
  onepass_host_reset();
}

void test_streams() {
  cudaStream_t stream = nullptr, elsewhere = nullptr;
  OK(cudaStreamCreate(&stream));
  OK(cudaSetDevice(1));
  OK(cudaStreamCreateWithFlags(&elsewhere, cudaStreamNonBlocking));
  OK(cudaSetDevice(0));
  EXPECT_STATUS(cudaSetDevice(2), cudaErrorInvalidDevice);
  const Array<float> values(4);
  OK(cudaMemsetAsync(values, 0, 16));
  const auto scaled = [&](cudaStream_t where, float by = 2) {
    float* data = values;
    void* arguments[] = {&data, &by};
    return cudaLaunchKernel(scale, 1, 4, arguments, 0, where);
  };
  OK(scaled(stream));
  EXPECT_STATUS(scaled(elsewhere), cudaErrorInvalidResourceHandle);
  onepass_host_fail("cudaLaunchKernel", cudaErrorLaunchOutOfResources, 1);
  EXPECT_STATUS(scaled(stream), cudaErrorLaunchOutOfResources);
  EXPECT(cudaPeekAtLastError() == cudaErrorLaunchOutOfResources);
  OK(scaled(stream));
  OK(cudaStreamDestroy(stream));
  EXPECT_STATUS(scaled(stream), cudaErrorInvalidResourceHandle);
  EXPECT_STATUS(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
  EXPECT_STATUS(cudaStreamDestroy(stream), cudaErrorInvalidResourceHandle);
  onepass_host_set_devices(0);
  int count = 7;
  EXPECT_STATUS(cudaGetDeviceCount(&count), cudaErrorNoDevice);
  EXPECT(count == 0);
  onepass_host_reset();
}

void test_captures() {
  cudaStream_t stream = nullptr, other = nullptr;
  cudaEvent_t fork_event = nullptr, join_event = nullptr;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  OK(cudaStreamCreate(&other));
  OK(cudaEventCreateWithFlags(&fork_event, cudaEventDisableTiming));
  OK(cudaEventCreateWithFlags(&join_event, cudaEventDisableTiming));
  const float ones[4] = {1, 1, 1, 1};
  const Array<float> values(4, ones);
  float by = 2;
  const auto scaled = [&](cudaStream_t where) {
    float* data = values;
    void* arguments[] = {&data, &by};
    return cudaLaunchKernel(scale, 1, 4, arguments, 0, where);
  };
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;

  // Work is recorded with its parameters, and runs when it is replayed.
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  OK(cudaStreamIsCapturing(stream, &status));
  EXPECT(status == cudaStreamCaptureStatusActive);
  OK(scaled(stream));
  OK(cudaEventRecord(fork_event, stream));
  OK(cudaStreamWaitEvent(other, fork_event));
  by = 3;
  OK(scaled(other));
  OK(cudaEventRecord(join_event, other));
  OK(cudaStreamWaitEvent(stream, join_event));
  by = 0;
  OK(cudaStreamEndCapture(stream, &graph));
  EXPECT(values.host() == std::vector<float>(4, 1));
  OK(cudaGraphInstantiate(&executable, graph));
  OK(cudaGraphDestroy(graph));
  OK(cudaGraphLaunch(executable, stream));
  OK(cudaGraphLaunch(executable, nullptr));
  EXPECT(values.host() == std::vector<float>(4, 36));
  OK(cudaGraphExecDestroy(executable));
  EXPECT_STATUS(cudaGraphLaunch(executable, stream), cudaErrorInvalidValue);

  // Two branches that do not wait for each other run in the order asked for.
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  OK(cudaEventRecord(fork_event, stream));
  OK(cudaStreamWaitEvent(other, fork_event));
  OK(cudaMemsetAsync(values, 0, 16, stream));
  OK(cudaMemsetAsync(values, 1, 16, other));
  OK(cudaEventRecord(join_event, other));
  OK(cudaStreamWaitEvent(stream, join_event));
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphInstantiate(&executable, graph));
  OK(cudaGraphLaunch(executable, stream));
  EXPECT(values.host()[0] != 0);
  onepass_host_order(onepass_host_backwards, onepass_host_forwards, 0);
  OK(cudaGraphLaunch(executable, stream));
  EXPECT(values.host()[0] == 0);
  onepass_host_reset();

  // A branch that nobody waits for.
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  OK(cudaEventRecord(fork_event, stream));
  OK(cudaStreamWaitEvent(other, fork_event));
  OK(scaled(other));
  EXPECT_STATUS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureUnjoined);

  // What is forbidden, and what it does to the capture.
  const auto spoilt = [&](cudaStreamCaptureMode mode, auto call, cudaError_t error) {
    OK(cudaStreamBeginCapture(stream, mode));
    EXPECT_STATUS(call(), error);
    EXPECT_STATUS(scaled(stream), error == cudaSuccess ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
    EXPECT_STATUS(cudaStreamEndCapture(stream, &graph),
                  error == cudaSuccess ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
  };
  void* memory = nullptr;
  const auto allocate = [&] { return cudaMalloc(&memory, 4); };
  spoilt(cudaStreamCaptureModeGlobal, allocate, cudaErrorStreamCaptureUnsupported);
  spoilt(cudaStreamCaptureModeThreadLocal, allocate, cudaErrorStreamCaptureUnsupported);
  spoilt(cudaStreamCaptureModeRelaxed, allocate, cudaSuccess);
  const auto of_another_thread = [&] {
    cudaError_t result = cudaSuccess;
    std::thread([&] { result = allocate(); }).join();
    return result;
  };
  spoilt(cudaStreamCaptureModeGlobal, of_another_thread, cudaErrorStreamCaptureUnsupported);
  spoilt(cudaStreamCaptureModeThreadLocal, of_another_thread, cudaSuccess);
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed}) {
    spoilt(mode, [&] { return cudaStreamSynchronize(stream); }, cudaErrorStreamCaptureUnsupported);
    spoilt(mode, [&] { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported);
    // Not captured before.
    OK(cudaEventRecord(join_event, other));
    spoilt(mode, [&] { return cudaStreamWaitEvent(stream, join_event); }, cudaErrorStreamCaptureIsolation);
    spoilt(
        mode,
        [&] {
          OK(cudaEventRecord(fork_event, stream));
          return cudaEventSynchronize(fork_event);
        },
        cudaErrorCapturedEvent);
  }

  // The null stream does not mix with the capture of a stream that waits for it.
  OK(scaled(nullptr));
  OK(cudaStreamBeginCapture(other, cudaStreamCaptureModeRelaxed));
  EXPECT_STATUS(cudaStreamIsCapturing(nullptr, &status), cudaErrorStreamCaptureImplicit);
  EXPECT_STATUS(scaled(nullptr), cudaErrorStreamCaptureImplicit);
  EXPECT_STATUS(cudaStreamEndCapture(other, &graph), cudaErrorStreamCaptureInvalidated);
  EXPECT_STATUS(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  OK(cudaStreamDestroy(stream));
  OK(cudaStreamDestroy(other));
  onepass_host_reset();
}

void test_threads_of_the_host() {
  std::vector<std::thread> threads;
  std::array<bool, 4> right{};
  for (unsigned t = 0; t < right.size(); ++t) {
    threads.emplace_back([t, &right] {
      onepass::cuda::check(cudaSetDevice(static_cast<int>(t % 2)), "device");
      right[t] = true;
      for (unsigned k = 0; k < 50; ++k) {
        std::vector<unsigned> values(256, t + k);
        const Array<unsigned> in(256, values.data()), out(1);
        onepass::cuda::launch("tree", tree, 1, 256, 0, nullptr, static_cast<unsigned*>(in),
                              static_cast<unsigned*>(out));
        right[t] = right[t] && out.host()[0] == 256 * (t + k);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const bool one : right) EXPECT(one);
}

}  // namespace

int main() {
  onepass_host_order(onepass_host_forwards, onepass_host_forwards, 0);
  test_memory();
  test_coordinates_and_orders();
  test_reductions();
  test_lanes();
  test_clusters();
  test_parameters_and_limits();
  test_arithmetic();
  test_streams();
  test_captures();
  test_threads_of_the_host();
  onepass_host_verify();
  if (failures == 0) std::puts("cuda_on_host: all well");
  return failures == 0 ? 0 : 1;
}
