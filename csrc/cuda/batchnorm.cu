#include "cuda/batchnorm.h"

#include <algorithm>
#include <limits>

#include "core/type_list.h"
#include "cuda/backend.h"
#include "cuda/batchnorm_units.h"
#include "cuda/launch.h"

namespace onepass::cuda {
namespace {

constexpr unsigned kMostCluster = 8;  // of every device that has clusters

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "asking for a device's attribute");
  return value;
}

// One value for each channel.
template <class T>
__global__ void fill(const __grid_constant__ std::size_t count, T* first, T* second, T value) {
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    if (first != nullptr) first[i] = value;
    if (second != nullptr) second[i] = value;
  }
}

// Whether the code that runs on the current device knows clusters. What was compiled from PTX of an older architecture
// does not, whatever the device can do.
bool has_clusters(int device) {
  if (attribute_of(device, cudaDevAttrComputeCapabilityMajor) < 9) return false;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, fill<double>), "asking for a kernel's attributes");
  return attributes.ptxVersion >= 90;
}

BatchnormDevice device_of(int device, const BatchnormLimits& limits) {
  const auto ask = [&](cudaDeviceAttr attribute) { return static_cast<std::size_t>(attribute_of(device, attribute)); };
  const bool clusters = limits.cluster > 1 && has_clusters(device);
  return {.shared = std::min(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), limits.shared),
          .shared_of_processor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          .cluster = clusters ? std::min(limits.cluster, kMostCluster) : 1,
          .processors = ask(cudaDevAttrMultiProcessorCount)};
}

template <class T>
void fill_channels(const BatchnormShape& shape, void* first, void* second, T value, void* stream) {
  if (shape.channels == 0) return;
  constexpr unsigned threads = 256;
  const std::size_t blocks = std::min<std::size_t>(batchnorm::divide_up(shape.channels, threads), 1024);
  launch("the fill of an empty batch's statistics", fill<T>, dim3(static_cast<unsigned>(blocks)), threads, 0,
         static_cast<cudaStream_t>(stream), shape.channels, static_cast<T*>(first), static_cast<T*>(second), value);
}

// Calls body(D) with the dtype's struct.
template <class... Ds, class Body>
void with_dtype(TypeList<Ds...> /*dtypes*/, DType dtype, Body body) {
  ((dtype == Ds::id && (body(Ds{}), true)) || ...);
}

}  // namespace

std::size_t batchnorm_scratch_bytes(const BatchnormShape& shape) {
  if (shape.count() == 0) return 0;
  const BatchnormTiling t = tiling_of(shape);
  return t.channels * (t.tiles + 1) * 2 * sizeof(double);
}

void batchnorm_forward(const Place& place, const BatchnormForward& call) {
  const OnDevice on_device(place.device);
  if (call.count() == 0) {
    fill_channels(call, call.mean, call.invstd, std::numeric_limits<double>::quiet_NaN(), place.stream);
    return;
  }
  const BatchnormTiling t = tiling_of(call);
  BatchnormPlan plan;
  if (call.training) plan = plan_of(t, info(call.dtype).itemsize, 1, device_of(place.device, call.limits));
  with_dtype(DTypes{}, call.dtype, [&]<class D>(D /*dtype*/) { batchnorm_forward_of<D>(call, t, plan, place.stream); });
}

void batchnorm_backward(const Place& place, const BatchnormBackward& call) {
  const OnDevice on_device(place.device);
  if (call.count() == 0) {
    if (info(call.dtype).compute == DType::float64) {
      fill_channels(call, call.dweight, call.dbias, 0.0, place.stream);
    } else {
      fill_channels(call, call.dweight, call.dbias, 0.0F, place.stream);
    }
    return;
  }
  const BatchnormTiling t = tiling_of(call);
  BatchnormPlan plan;
  if (!call.frozen) plan = plan_of(t, info(call.dtype).itemsize, 2, device_of(place.device, call.limits));
  with_dtype(DTypes{}, call.dtype,
             [&]<class D>(D /*dtype*/) { batchnorm_backward_of<D>(call, t, plan, place.stream); });
}

}  // namespace onepass::cuda
