// Norms and what they decide, on the device. Each sum has the order that the CPU gives it: 16 lanes of a block of
// kSquaresBlock elements, then a tensor's blocks and the tensors in kSumLanes lanes, and a tree over lanes.
#include "core/step.h"
#include "cuda/elementwise.h"
#include "cuda/support.h"

namespace onepass::cuda {
namespace {

constexpr unsigned kLanes = kGroupLanes;
constexpr unsigned kTogether = 8;  // loads of a lane that are on their way at a time

// The tree over the lanes of each of the sums that a block makes side by side.
template <unsigned lanes>
__device__ void add_tree(DeviceSquares* all, unsigned lane) {
  for (unsigned half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) {
      all[lane].sum = sum(all[lane].sum, all[lane + half].sum);
      all[lane].bad |= all[lane + half].bad;
    }
  }
}

template <class D>
struct Measured {
  using C = ComputeType<D>;
  using V = Pack<typename C::Storage, 1>;
  const MeasuredEntry& entry;
  typename C::Storage scale;

  // What a norm is taken of: the gradient, or a sum to which it is added.
  HD double at(std::uint64_t i) const {
    using X = Pack<double, 1>;
    if (entry.accumulator == nullptr) return X::template load<D>(entry.grad + i * kItem<D>).value[0];
    V total(typename C::Storage(0));
    if (!entry.sum_starts) total = V::template load<C>(entry.accumulator + i * kItem<C>);
    if (entry.grad != nullptr) {
      V g = V::template load<D>(entry.grad + i * kItem<D>);
      if (!(scale == 1) || entry.sum_starts) g = V(scale) * g;
      total = entry.sum_starts ? g : total + g;
    }
    return as_read(static_cast<double>(total.value[0]));
  }
};

template <class D>
__global__ void __launch_bounds__(kThreads, 4) measure_kernel(const __grid_constant__ MeasureTable table) {
  __shared__ DeviceSquares shared[kThreads];
  const std::uint32_t k =
      entry_of(blockIdx.x, table.tensors, [&](std::uint32_t e) { return table.entries[e].first_block; });
  const MeasuredEntry& entry = table.entries[k];
  const Measured<D> measured{entry, static_cast<typename ComputeType<D>::Storage>(table.scale)};
  const unsigned lane = threadIdx.x % kLanes;
  const std::uint64_t part = std::uint64_t{blockIdx.x - entry.first_block} * kPartsOfBlock + threadIdx.x / kLanes;
  const std::uint64_t begin = part * kSquaresBlock;
  const std::uint64_t behind = begin + kSquaresBlock;
  const std::uint64_t end = behind < entry.count ? behind : entry.count;
  DeviceSquares own{0.0, 0};
  const auto add = [&](double x) {
    own.sum = sum(own.sum, product(x, x));
    own.bad |= static_cast<std::uint64_t>(!(x - x == 0.0));
  };
  std::uint64_t i = begin + lane;
  for (; i + (kTogether - 1) * kLanes < end; i += kTogether * kLanes) {
    double x[kTogether];
    ONEPASS_UNROLL
    for (unsigned j = 0; j < kTogether; ++j) x[j] = measured.at(i + j * kLanes);
    ONEPASS_UNROLL
    for (unsigned j = 0; j < kTogether; ++j) add(x[j]);
  }
  for (; i < end; i += kLanes) add(measured.at(i));
  shared[threadIdx.x] = own;
  add_tree<kLanes>(shared + threadIdx.x / kLanes * kLanes, lane);
  if (lane == 0 && begin < entry.count) table.parts[entry.first_part + part] = shared[threadIdx.x];
}

// A block of kSumLanes threads for each tensor.
__global__ void __launch_bounds__(kSumLanes) sum_kernel(const __grid_constant__ SumTable table) {
  __shared__ DeviceSquares shared[kSumLanes];
  const SummedEntry& entry = table.entries[blockIdx.x];
  const unsigned lane = threadIdx.x;
  DeviceSquares own{0.0, 0};
  for (std::uint64_t part = lane; part < entry.parts; part += kSumLanes) {
    const DeviceSquares of_part = table.parts[entry.first_part + part];
    own.sum = sum(own.sum, of_part.sum);
    own.bad |= of_part.bad;
  }
  shared[lane] = own;
  add_tree<kSumLanes>(shared, lane);
  if (lane == 0) table.sums[entry.position] = shared[0];
}

__global__ void __launch_bounds__(kThreads, 1) judge_kernel(const __grid_constant__ JudgeParams params) {
  __shared__ DeviceSquares shared[kSumLanes];
  const unsigned lane = threadIdx.x;
  if (lane < kSumLanes) {
    DeviceSquares own{0.0, 0};
    for (std::uint64_t k = lane; k < params.tensors; k += kSumLanes) {
      own.sum = sum(own.sum, params.sums[k].sum);
      own.bad |= params.sums[k].bad;
    }
    shared[lane] = own;
  }
  add_tree<kSumLanes>(shared, lane);
  __syncthreads();
  const double norm = norm_of(shared[0].sum, params.scaling, params.summed);
  const bool skip = params.skips && shared[0].bad != 0;
  if (lane == 0) {
    params.verdict->norm = norm;
    params.verdict->skip = skip ? 1 : 0;
    if (params.grad_norm != nullptr) *params.grad_norm = norm;
    if (params.skipped_now != nullptr) *params.skipped_now = skip;
    if (params.skipped != nullptr) {
      const std::int64_t skipped = *params.skipped + (skip ? 1 : 0);
      *params.skipped = skipped;
      if (params.feedback != nullptr) {
        *static_cast<volatile std::uint64_t*>(params.feedback) =
            params.call << 32U | (static_cast<std::uint64_t>(skipped) & 0xFFFFFFFFU);
        __threadfence_system();
      }
    }
  }
  if (params.clips == nullptr) return;
  for (std::uint64_t k = lane; k < params.tensors; k += kThreads) {
    double clip = 1.0;
    if (params.max_grad_norm >= 0.0) clip = clip_factor(norm, params.max_grad_norm);
    if (params.clip_norm >= 0.0) {
      clip = clip_factor(norm_of(params.sums[k].sum, params.scaling, params.summed), params.clip_norm);
    }
    params.clips[k] = clip;
  }
}

template <class S>
__device__ void put_setting(const Row& row, Around around, bool left_out, Setting<S>* to) {
  Setting<S> setting;
  round_coefficients(row.coefficients, kMaxCoefficients, setting.coefficients);
  around.decay = row.decay;
  around.noise = row.noise;
  around.ema_decay = row.ema_decay;
  around.ema_starts = row.t == 1;
  setting.around = Surroundings<S>(around);
  setting.around.set_scale(around.scaling, 1.0, false);
  setting.scaling = around.scaling;
  setting.t = static_cast<std::uint64_t>(row.t);
  setting.left_out = left_out;
  *to = setting;
}

// One thread: the next count of steps, and the row that belongs to it.
__global__ void __launch_bounds__(1) settle_kernel(const __grid_constant__ SettleParams params) {
  const bool skip = params.verdict != nullptr && params.verdict->skip != 0;
  const std::int64_t t = params.clock[0] + 1;
  const bool left_out = !skip && (t < params.first || t - params.first >= params.count);
  if (left_out) params.clock[1] = params.clock[1] + 1;
  if (!skip && !left_out) params.clock[0] = t;
  const Row* const rows = params.rows != nullptr ? params.rows : params.given;
  const Row& row = rows[skip || left_out ? 0 : t - params.first];
  put_setting(row, params.around, left_out, params.as_float);
  put_setting(row, params.around, left_out, params.as_double);
}

}  // namespace

MeasureKernel measure_for(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return measure_kernel<Float64>;
    case DType::bfloat16:
      return measure_kernel<BFloat16>;
    case DType::float16:
      return measure_kernel<Float16>;
    default:
      return measure_kernel<Float32>;
  }
}

void (*const sum_parts)(SumTable) = sum_kernel;
void (*const judge)(JudgeParams) = judge_kernel;
void (*const settle)(SettleParams) = settle_kernel;

}  // namespace onepass::cuda
