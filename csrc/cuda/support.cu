// What surrounds the update and knows no rule.
#include "cuda/support.h"

#include <algorithm>

#include "cuda/elementwise.h"

namespace onepass::cuda {
namespace {

template <class D>
struct AllEntries {
  using Scalar = typename ComputeType<D>::Storage;
  using TableType = WholeTable<Scalar>;
  using EntryType = Entry<kStreams>;
  static constexpr bool has_random = false;
  static constexpr unsigned blocks = 1;
  bool needed = true;
};

// Adds gradients to their sums.
template <class D>
struct Accumulate : AllEntries<D> {
  using Base = AllEntries<D>;
  using typename Base::Scalar;
  using C = ComputeType<D>;
  static constexpr unsigned lanes = 16 / kItem<D>;
  const std::byte* grad;
  std::byte* total;
  Scalar scale;
  bool starts, zero;

  HD Accumulate(const typename Base::TableType& table, const typename Base::EntryType& entry)
      : grad(entry.data[kGrad]),
        total(entry.data[kAccumulator]),
        scale(static_cast<Scalar>(setting_of(table, entry).scaling.scale)),
        starts(entry.rounds),
        zero(setting_of(table, entry).around.zero_grads) {
    if (is_skipped(table)) {  // gradients are zeroed all the same
      total = nullptr;
      this->needed = zero;
    }
  }
  template <class V, class Random>
  HD void run(std::uint64_t i, const Random& /*random*/) const {
    if (total != nullptr) {
      V g(Scalar(-0.0));  // a sum to which nothing was added: neutral for zeros of both signs
      if (grad != nullptr) {
        g = V::template load<D>(grad + i * kItem<D>);
        // The first gradient of a sum is multiplied by 1 too: a copy would keep its subnormals.
        if (!(scale == 1) || starts) g = V(scale) * g;
        if (!starts) g = V::template load<C>(total + i * kItem<C>) + g;
      }
      g.template store<C>(total + i * kItem<C>);
    }
    if (zero && grad != nullptr) V(0).template store<D>(const_cast<std::byte*>(grad) + i * kItem<D>);
  }
};

template <class D>
struct Zero : AllEntries<D> {
  using Base = AllEntries<D>;
  static constexpr unsigned lanes = 16 / kItem<D>;
  std::byte* grad;
  HD Zero(const typename Base::TableType& /*table*/, const typename Base::EntryType& entry) : grad(entry.data[kGrad]) {}
  template <class V, class Random>
  HD void run(std::uint64_t i, const Random& /*random*/) const {
    V(0).template store<D>(grad + i * kItem<D>);
  }
};

// Mirrors take parameters, as numbers in the compute type.
template <class D, class V>
HD void show_in_mirror(V p, const Streams& streams, DType mirror, std::uint64_t i) {
  if (streams.data[kMirror] != nullptr) store_mirror(p, streams.data[kMirror], mirror, i, AllLanes{});
}

template <class D>
struct Show : AllEntries<D> {
  using Base = AllEntries<D>;
  using typename Base::Scalar;
  static constexpr unsigned lanes = 16 / kItem<D>;
  Streams streams;
  DType mirror;
  Scalar one;
  HD Show(const typename Base::TableType& table, const typename Base::EntryType& entry)
      : streams(streams_of(entry)), mirror(entry.mirror), one(setting_of(table, entry).around.decay) {}
  template <class V, class Random>
  HD void run(std::uint64_t i, const Random& /*random*/) const {
    // Arithmetic makes every NaN quiet and subnormals zero; the compiler does not know that it is a 1.
    show_in_mirror<D>(V(one) * load_param<D, V>(streams, i, AllLanes{}), streams, mirror, i);
  }
};

// Exchanges parameters and averages, bit by bit, or those of split numbers.
template <class D>
struct Exchange : AllEntries<D> {
  using Base = AllEntries<D>;
  using typename Base::Scalar;
  using T = typename D::Storage;
  static constexpr unsigned lanes = 16 / kItem<D>;
  Streams streams;
  DType mirror;
  Scalar one;
  HD Exchange(const typename Base::TableType& table, const typename Base::EntryType& entry)
      : streams(streams_of(entry)), mirror(entry.mirror), one(setting_of(table, entry).around.decay) {}
  template <class V, class Random>
  HD void run(std::uint64_t i, const Random& /*random*/) const {
    std::byte* const param = streams.data[kParam] + i * kItem<D>;
    if constexpr (std::is_same_v<D, BFloat16>) {
      if (streams.data[kRemainder] != nullptr) {
        exchange_split<V>(i);
        if (streams.data[kMirror] != nullptr) show<V>(i);
        return;
      }
    }
    std::byte* const ema = streams.data[kEma] + i * kItem<D>;
    const auto p = Items<T, V::lanes>::load(param);
    const auto e = Items<T, V::lanes>::load(ema);
    e.store(param);
    p.store(ema);
    if (streams.data[kMirror] != nullptr) show<V>(i);
  }

 private:
  template <class V>
  HD void show(std::uint64_t i) const {
    show_in_mirror<D>(V(one) * load_param<D, V>(streams, i, AllLanes{}), streams, mirror, i);
  }
  template <class V>
  HD void exchange_split(std::uint64_t i) const {
    std::byte* const high = streams.data[kParam] + 2 * i;
    std::byte* const low = streams.data[kRemainder] + 2 * i;
    std::byte* const ema = streams.data[kEma] + 4 * i;
    const auto now = Items<float, V::lanes>::load(ema);
    const V p = V::join(high, low);
    V e;
    for (std::size_t k = 0; k < V::lanes; ++k) e.value[k] = now.item[k];
    e.split(high, low);
    Items<float, V::lanes> before;
    for (std::size_t k = 0; k < V::lanes; ++k) before.item[k] = p.value[k];
    before.store(ema);
  }
};

// The end of a step with limited units: parameters are scaled back, and passed on to average and mirror.
template <class D>
struct Finish : AllEntries<D> {
  using Base = AllEntries<D>;
  using typename Base::Scalar;
  static constexpr unsigned lanes = 1;
  static constexpr bool has_random = true;
  Streams streams;
  Surroundings<Scalar> around;
  DType mirror;
  RandomKey key;
  bool rounds, needed;
  static constexpr bool noisy = false;
  UnitParams units;
  std::uint64_t first;

  HD Finish(const typename Base::TableType& table, const typename Base::EntryType& entry)
      : streams(streams_of(entry)),
        around(setting_of(table, entry).around),
        mirror(entry.mirror),
        key(key_of(table, entry, setting_of(table, entry).t)),
        rounds(entry.rounds),
        needed(!is_skipped(table) && !setting_of(table, entry).left_out),
        units(units_of(table)),
        first(table.first) {}
  template <class V, class Random>
  HD void run(std::uint64_t i, const Random& random) const {
    const std::uint64_t element = first + i;
    const std::uint64_t unit = element / units.run % units.units;
    const std::uint64_t outer = element / (units.run * units.units * units.depth);
    const double norm = root(units.sums[outer * units.units + unit]);
    const auto factor = norm > units.limit ? static_cast<Scalar>(units.limit / norm) : Scalar(1);
    V p = V(factor) * load_param<D, V>(streams, i, AllLanes{});
    p = store_param<D>(p, streams, random, i, kScaledRole, AllLanes{});
    pass_on<D>(p, streams, random, mirror, i, around, AllLanes{});
  }
};

// The sum of what each of 16 threads has, as a tree. Every thread of a block has to call it.
__device__ double add_tree(double* lanes, unsigned lane, double own) {
  __syncthreads();
  lanes[lane] = own;
  for (unsigned half = kGroupLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane] = sum(lanes[lane], lanes[lane + half]);
  }
  __syncthreads();
  return lanes[0];
}

// The sums of the squares of units, in the CPU's order: rows one after the other; a row's run in blocks of 16 lanes.
// 16 threads for each unit where a run is longer than 1, else one.
template <class D>
__global__ void __launch_bounds__(kUnitThreads)
    unit_squares_kernel(const __grid_constant__ Entry<kStreams> entry, const __grid_constant__ UnitParams units,
                        const Verdict* verdict) {
  constexpr unsigned kLanes = kGroupLanes;
  __shared__ double shared[kUnitThreads];
  if (verdict != nullptr && verdict->skip != 0) return;
  const Streams streams = streams_of(entry);
  using V = Pack<typename ComputeType<D>::Storage, 1>;
  const auto square = [&](std::uint64_t i) {
    const auto x = as_read(static_cast<double>(load_param<D, V>(streams, i, AllLanes{}).value[0]));
    return product(x, x);
  };
  const std::uint64_t in_all = units.outer * units.units;
  const auto row_begin = [&](std::uint64_t unit, std::uint64_t row) {
    return ((unit / units.units * units.depth + row) * units.units + unit % units.units) * units.run;
  };
  if (units.run == 1) {
    const std::uint64_t unit = std::uint64_t{blockIdx.x} * kUnitThreads + threadIdx.x;
    if (unit >= in_all) return;
    double total = 0.0;
    for (std::uint64_t row = 0; row < units.depth; ++row) total = sum(total, square(row_begin(unit, row)));
    units.sums[unit] = total;
    return;
  }
  const unsigned lane = threadIdx.x % kLanes;
  const std::uint64_t unit = std::uint64_t{blockIdx.x} * (kUnitThreads / kLanes) + threadIdx.x / kLanes;
  double* const lanes = shared + threadIdx.x / kLanes * kLanes;
  const std::uint64_t blocks = (units.run + kSquaresBlock - 1) / kSquaresBlock;
  // Lanes l and l + 16 of a run's blocks (core/sums.h) are thread l's.
  static_assert(kSumLanes == 2 * kLanes);
  double total = 0.0;
  for (std::uint64_t row = 0; row < units.depth; ++row) {
    double lower = 0.0;
    double upper = 0.0;
    for (std::uint64_t block = 0; block < blocks; ++block) {
      double own = 0.0;
      const std::uint64_t begin = block * kSquaresBlock;
      const std::uint64_t end = std::min(begin + kSquaresBlock, units.run);
      if (unit < in_all) {
        for (std::uint64_t i = begin + lane; i < end; i += kLanes) own = sum(own, square(row_begin(unit, row) + i));
      }
      const double of_block = add_tree(lanes, lane, own);
      if (block % kLanes == lane) (block / kLanes % 2 == 0 ? lower : upper) += of_block;
    }
    total = sum(total, add_tree(lanes, lane, sum(lower, upper)));
  }
  if (lane == 0 && unit < in_all) units.sums[unit] = total;
}

// Between an array in any order, or at any address, and one in order.
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyParams params) {
  const std::uint64_t step = std::uint64_t{gridDim.x} * kThreads;
  for (std::uint64_t i = std::uint64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.count; i += step) {
    std::byte* const strided = params.strided + offset_of(params.strides, params.first + i);
    std::byte* const contiguous = params.contiguous + i * params.itemsize;
    const std::byte* const from = params.gathers ? strided : contiguous;
    std::byte* const to = params.gathers ? contiguous : strided;
    if (params.aligned && params.itemsize == 2) {
      *reinterpret_cast<std::uint16_t*>(to) = *reinterpret_cast<const std::uint16_t*>(from);
    } else if (params.aligned && params.itemsize == 4) {
      *reinterpret_cast<std::uint32_t*>(to) = *reinterpret_cast<const std::uint32_t*>(from);
    } else if (params.aligned && params.itemsize == 8) {
      *reinterpret_cast<std::uint64_t*>(to) = *reinterpret_cast<const std::uint64_t*>(from);
    } else {
      for (std::uint32_t byte = 0; byte < params.itemsize; ++byte) to[byte] = from[byte];
    }
  }
}

template <template <class> class Body, class D>
TableKernels of_tables() {
  using S = typename ComputeType<D>::Storage;
  TableKernels kernels{nullptr, nullptr, Body<D>::lanes};
  if constexpr (std::is_same_v<S, float>) {
    kernels.as_float = for_elements<Body<D>, WholeTable<float>>;
  } else {
    kernels.as_double = for_elements<Body<D>, WholeTable<double>>;
  }
  return kernels;
}

template <class D>
const SupportKernels& kernels_of() {
  static const SupportKernels kernels = {of_tables<Accumulate, D>(), of_tables<Zero, D>(),   of_tables<Exchange, D>(),
                                         of_tables<Show, D>(),       of_tables<Finish, D>(), unit_squares_kernel<D>};
  return kernels;
}

}  // namespace

const SupportKernels& support_for(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return kernels_of<Float64>();
    case DType::bfloat16:
      return kernels_of<BFloat16>();
    case DType::float16:
      return kernels_of<Float16>();
    default:
      return kernels_of<Float32>();
  }
}

void (*const copy_strided)(CopyParams) = copy_kernel;

}  // namespace onepass::cuda
