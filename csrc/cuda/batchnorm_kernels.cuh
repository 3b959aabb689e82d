// The kernels of batch normalization for one dtype, and the way of a call through them.
//
// Training has two ways, with the same bits:
//
//   Resident, one launch: a block, or a cluster of blocks, sums a slab and keeps its elements in shared memory; all of
//   its blocks add the sums of all tiles, each for itself, and map what they have kept. x is read once.
//   Streaming, three launches: one sums, a small one adds the tiles' sums and writes what belongs to channels, one
//   maps, in the opposite order, so that it begins with what is left in the second-level cache. The small one is for
//   itself because in the map's prologue each block would add the same tiles again, up to some thousand for a channel.
//
// Inference, and a backward pass through it, need no sum before the map: one launch, and one that reduces the gradients
// of the parameters.
#pragma once

#include <algorithm>

#include "cuda/batchnorm_cluster.h"
#include "cuda/batchnorm_sums.cuh"
#include "cuda/batchnorm_units.h"

namespace onepass::cuda {
namespace {

constexpr unsigned kStreamThreads = 256;
constexpr unsigned kMostResidentThreads = 512;

// A warp's number among all of its kind, and their count.
__device__ __forceinline__ std::size_t warp_of_grid() {
  return std::size_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}
__device__ __forceinline__ std::size_t warps_of_grid() { return std::size_t{gridDim.x} * (blockDim.x / kWarp); }

// --- Maps ------------------------------------------------------------------------------------------------------------

// y of a tile. read_x(k, element): the thread's k-th vector.
template <class Vs, class ReadX>
__device__ __forceinline__ void normalize_tile(const BatchnormTiling& t, const BatchnormForward& call, const Walk& walk,
                                               const ChannelValues<typename Vs::V>& values, ReadX read_x) {
  using V = typename Vs::V;
  typename Vs::Raw x[Vs::half_batch];
  typename Vs::Raw residual[Vs::half_batch];
  const bool adds = call.residual != nullptr;
  for_batches<Vs::half_batch>(
      t, walk,
      [&](unsigned u, unsigned k, std::size_t element) {
        x[u] = read_x(k, element);
        if (adds) residual[u] = Vs::read(call.residual, element);
      },
      [&](unsigned u, unsigned /*k*/, std::size_t element) {
        V y = batchnorm::normalize(Vs::widen(x[u]), values.high, values.scale, values.offset);
        if (adds) y = batchnorm::add_residual(y, Vs::widen(residual[u]));
        if (call.relu) y = batchnorm::rectify(y);
        Vs::write(Vs::narrow(y), call.y, element);
      });
}

template <class Vs>
__device__ __forceinline__ typename Vs::V gradient_of(const typename Vs::V& x, const typename Vs::V& g,
                                                      const ChannelValues<typename Vs::V>& values) {
  return batchnorm::input_gradient(g, x, values.high, values.scale, values.level, values.slope);
}

// --- Values of a slab's channels -------------------------------------------------------------------------------------

// The channel of a slab that this thread looks after, and whether there is one. Runs: all threads, the one channel.
template <bool kColumns>
struct OwnChannel {
  std::size_t channel;
  bool exists;
  __device__ OwnChannel(const BatchnormTiling& t, std::size_t slab)
      : channel(slab * t.group + (kColumns ? threadIdx.x % kWarp : 0)),
        exists(!kColumns || (threadIdx.x % kWarp < t.group && channel < t.channels)) {}
};

template <class V, bool kColumns>
__device__ __forceinline__ ChannelValues<V> spread_forward(const BatchnormTiling& t,
                                                           const ChannelValues<typename V::Scalar>& own) {
  ChannelValues<V> values;
  values.high = from_threads<V, kColumns>(t, own.high);
  values.scale = from_threads<V, kColumns>(t, own.scale);
  values.offset = from_threads<V, kColumns>(t, own.offset);
  return values;
}

// --- Streaming -------------------------------------------------------------------------------------------------------

// Where the sums of a tile wait: those of a channel side by side.
HD Sums* sums_in(const BatchnormTiling& t, std::byte* scratch, std::size_t channel) {
  return reinterpret_cast<Sums*>(scratch) + channel * t.tiles;
}
// Behind them, the totals of each channel.
HD Sums* totals_in(const BatchnormTiling& t, std::byte* scratch) {
  return reinterpret_cast<Sums*>(scratch) + t.channels * t.tiles;
}

template <class Vs, bool kColumns>
__global__ void __launch_bounds__(kStreamThreads, 1)
    moments_of_tiles(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormForward call) {
  for (std::size_t k = warp_of_grid(); k < t.total(); k += warps_of_grid()) {
    const TileIndex at(t, k);
    sum_moments<kColumns, Vs>(
        t, call.x, at.slab, at.tile, [](unsigned /*k*/, const typename Vs::Raw& /*raw*/) {},
        [&](unsigned own, const Sums& sums) {
          const std::size_t channel = at.slab * t.group + own;
          if (channel < t.channels) sums_in(t, call.scratch, channel)[at.tile] = sums;
        });
  }
}

template <class D>
__global__ void __launch_bounds__(kStreamThreads, 1)
    finish_moments(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormForward call) {
  for (std::size_t channel = warp_of_grid(); channel < t.channels; channel += warps_of_grid()) {
    const Sums* const own = sums_in(t, call.scratch, channel);
    const Sums sums = add_tiles(t.tiles, [&](std::size_t tile) { return own[tile]; });
    if (threadIdx.x % kWarp == 0) statistics_of<D>(t, call, channel, sums, true);
  }
}

template <class Vs, bool kColumns>
__global__ void __launch_bounds__(kStreamThreads, 1)
    normalize_tiles(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormForward call) {
  using S = typename Vs::S;
  for (std::size_t k = warp_of_grid(); k < t.total(); k += warps_of_grid()) {
    const TileIndex at(t, t.total() - 1 - k);
    ChannelValues<S> own{};
    const OwnChannel<kColumns> mine(t, at.slab);
    if (mine.exists) {
      Statistics used;
      if (call.training) {
        used = {call.mean[mine.channel], call.invstd[mine.channel]};
      } else {
        used.mean = static_cast<double>(value_of_channel<S>(call.running_mean, mine.channel));
        const auto var = static_cast<double>(value_of_channel<S>(call.running_var, mine.channel));
        used.invstd = batchnorm::inverse_deviation(var, call.eps);
        if (at.tile == 0) write_used<S>(call, mine.channel, used);
      }
      set_forward(own, call, mine.channel, used.mean, used.invstd);
    }
    const auto values = spread_forward<typename Vs::V, kColumns>(t, own);
    normalize_tile<Vs>(t, call, Walk(t, at.slab, at.tile, threadIdx.x % kWarp), values,
                       [&](unsigned /*k*/, std::size_t element) { return Vs::read(call.x, element); });
  }
}

// The sums of gradients; and, where the statistics did not depend on x, dx as well.
template <class Vs, bool kColumns>
__global__ void __launch_bounds__(kStreamThreads, 1)
    gradients_of_tiles(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormBackward call) {
  using V = typename Vs::V;
  for (std::size_t k = warp_of_grid(); k < t.total(); k += warps_of_grid()) {
    const TileIndex at(t, k);
    ChannelValues<typename Vs::S> own{};
    const OwnChannel<kColumns> mine(t, at.slab);
    if (mine.exists) set_forward(own, call, mine.channel, call.mean[mine.channel], call.invstd[mine.channel]);
    const auto values = spread_forward<V, kColumns>(t, own);
    sum_gradients<kColumns, Vs>(
        t, call, at.slab, at.tile, values,
        [&](unsigned /*k*/, std::size_t element, const typename Vs::Raw& /*x*/, const V& g) {
          if (!call.frozen) return;
          Vs::write(Vs::narrow(batchnorm::frozen_gradient(g, values.scale)), call.dx, element);
          if (call.dresidual != nullptr) Vs::write(Vs::narrow(g), call.dresidual, element);
        },
        [&](unsigned channel_of_slab, const Sums& sums) {
          const std::size_t channel = at.slab * t.group + channel_of_slab;
          if (channel < t.channels) sums_in(t, call.scratch, channel)[at.tile] = sums;
        });
  }
}

template <class S>
HD batchnorm::BackwardConstants<S> constants_of(const BatchnormTiling& t, const BatchnormBackward& call,
                                                std::size_t channel, Sums sums) {
  return {sums.first, sums.second, call.mean[channel], call.invstd[channel], static_cast<double>(t.outer * t.inner)};
}

template <class S>
HD void write_gradients(const BatchnormBackward& call, std::size_t channel, Sums sums,
                        const batchnorm::BackwardConstants<S>& constants) {
  if (call.dbias != nullptr) store_of_channel<S>(call.dbias, channel, sums.first);
  if (call.dweight != nullptr) store_of_channel<S>(call.dweight, channel, constants.dweight);
}

template <class D>
__global__ void __launch_bounds__(kStreamThreads, 1)
    finish_gradients(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormBackward call) {
  for (std::size_t channel = warp_of_grid(); channel < t.channels; channel += warps_of_grid()) {
    const Sums* const own = sums_in(t, call.scratch, channel);
    const Sums sums = add_tiles(t.tiles, [&](std::size_t tile) { return own[tile]; });
    if (threadIdx.x % kWarp != 0) continue;
    totals_in(t, call.scratch)[channel] = sums;
    write_gradients(call, channel, sums, constants_of<typename D::Compute>(t, call, channel, sums));
  }
}

template <class Vs, bool kColumns>
__global__ void __launch_bounds__(kStreamThreads, 1)
    input_gradients(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormBackward call) {
  using V = typename Vs::V;
  using S = typename Vs::S;
  for (std::size_t k = warp_of_grid(); k < t.total(); k += warps_of_grid()) {
    const TileIndex at(t, t.total() - 1 - k);
    ChannelValues<S> own{};
    const OwnChannel<kColumns> mine(t, at.slab);
    if (mine.exists) {
      set_forward(own, call, mine.channel, call.mean[mine.channel], call.invstd[mine.channel]);
      set_backward(own, constants_of<S>(t, call, mine.channel, totals_in(t, call.scratch)[mine.channel]));
    }
    auto values = spread_forward<V, kColumns>(t, own);
    values.level = from_threads<V, kColumns>(t, own.level);
    values.slope = from_threads<V, kColumns>(t, own.slope);
    for_gradients<Vs>(
        t, Walk(t, at.slab, at.tile, threadIdx.x % kWarp), call, values,
        [&](unsigned /*k*/, std::size_t element, const typename Vs::Raw& /*raw*/, const V& x, const V& g) {
          Vs::write(Vs::narrow(gradient_of<Vs>(x, g, values)), call.dx, element);
          if (call.dresidual != nullptr) Vs::write(Vs::narrow(g), call.dresidual, element);
        });
  }
}

// --- Resident --------------------------------------------------------------------------------------------------------

// What a block keeps in shared memory: vectors of its tiles, in the order in which its threads come to them, for one or
// two arrays; the sums of its tiles; values of its channels.
template <class Vs, unsigned kStreams>
struct Kept {
  using Raw = typename Vs::Raw;
  using S = typename Vs::S;
  Raw* vectors;
  Sums* sums;
  ChannelValues<S>* values;
  std::size_t begin, end;  // tiles

  __device__ Kept(const BatchnormTiling& t, const BatchnormPlan& plan, unsigned rank)
      : vectors(dynamic_shared<Raw>()),
        sums(reinterpret_cast<Sums*>(vectors + kStreams * plan.tiles * t.depth * kWarp)),
        values(reinterpret_cast<ChannelValues<S>*>(sums + plan.tiles * t.group)),
        begin(batchnorm::at_most(rank * plan.tiles, t.tiles)),
        end(batchnorm::at_most(begin + plan.tiles, t.tiles)) {}

  __device__ Raw& vector(const BatchnormTiling& t, std::size_t tile, unsigned k, unsigned stream) const {
    const unsigned slot = (static_cast<unsigned>(tile - begin) * t.depth + k) * kStreams + stream;
    return vectors[slot * kWarp + threadIdx.x % kWarp];
  }
  __device__ Sums& sums_of(const BatchnormTiling& t, std::size_t tile, unsigned channel) const {
    return sums[(tile - begin) * t.group + channel];
  }
  // Of all tiles of a channel, wherever in the cluster they are.
  __device__ Sums total(const BatchnormTiling& t, const BatchnormPlan& plan, unsigned channel) const {
    return add_tiles(t.tiles, [&](std::size_t tile) {
      const unsigned rank = static_cast<unsigned>(tile) / static_cast<unsigned>(plan.tiles);
      return of_rank(sums, rank)[(tile - rank * plan.tiles) * t.group + channel];
    });
  }
};

template <class Vs, bool kColumns>
__global__ void __launch_bounds__(kMostResidentThreads, 1)
    forward_resident(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormPlan plan,
                     const __grid_constant__ BatchnormForward call) {
  using V = typename Vs::V;
  const unsigned rank = cluster_rank();
  const std::size_t slab = blockIdx.x / cluster_size();
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned warps = blockDim.x / kWarp;
  const Kept<Vs, 1> kept(t, plan, rank);
  for (std::size_t tile = kept.begin + warp; tile < kept.end; tile += warps) {
    sum_moments<kColumns, Vs>(
        t, call.x, slab, tile, [&](unsigned k, const typename Vs::Raw& raw) { kept.vector(t, tile, k, 0) = raw; },
        [&](unsigned channel, const Sums& sums) { kept.sums_of(t, tile, channel) = sums; });
  }
  cluster_sync();
  for (unsigned own = warp; own < t.group && slab * t.group + own < t.channels; own += warps) {
    const Sums sums = kept.total(t, plan, own);
    if (threadIdx.x % kWarp != 0) continue;
    const std::size_t channel = slab * t.group + own;
    const Statistics statistics = statistics_of<typename Vs::D>(t, call, channel, sums, rank == 0);
    set_forward(kept.values[own], call, channel, statistics.mean, statistics.invstd);
  }
  cluster_arrive();  // nobody else's sums are needed any more
  __syncthreads();
  const auto of_channels = [&](auto member) {
    return for_lanes<V, kColumns>(t, [&](unsigned channel) { return kept.values[channel].*member; });
  };
  using Own = ChannelValues<typename Vs::S>;
  ChannelValues<V> values;
  values.high = of_channels(&Own::high);
  values.scale = of_channels(&Own::scale);
  values.offset = of_channels(&Own::offset);
  for (std::size_t tile = kept.begin + warp; tile < kept.end; tile += warps) {
    normalize_tile<Vs>(t, call, Walk(t, slab, tile, threadIdx.x % kWarp), values,
                       [&](unsigned k, std::size_t /*element*/) { return kept.vector(t, tile, k, 0); });
  }
  cluster_wait();  // while they are in this block
}

template <class Vs, bool kColumns>
__global__ void __launch_bounds__(kMostResidentThreads, 1)
    backward_resident(const __grid_constant__ BatchnormTiling t, const __grid_constant__ BatchnormPlan plan,
                      const __grid_constant__ BatchnormBackward call) {
  using V = typename Vs::V;
  using S = typename Vs::S;
  const unsigned rank = cluster_rank();
  const std::size_t slab = blockIdx.x / cluster_size();
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned warps = blockDim.x / kWarp;
  const Kept<Vs, 2> kept(t, plan, rank);
  ChannelValues<S> own{};
  const OwnChannel<kColumns> mine(t, slab);
  if (mine.exists) set_forward(own, call, mine.channel, call.mean[mine.channel], call.invstd[mine.channel]);
  auto values = spread_forward<V, kColumns>(t, own);
  for (std::size_t tile = kept.begin + warp; tile < kept.end; tile += warps) {
    sum_gradients<kColumns, Vs>(
        t, call, slab, tile, values,
        [&](unsigned k, std::size_t /*element*/, const typename Vs::Raw& x, const V& g) {
          kept.vector(t, tile, k, 0) = x;
          kept.vector(t, tile, k, 1) = Vs::narrow(g);
        },
        [&](unsigned channel, const Sums& sums) { kept.sums_of(t, tile, channel) = sums; });
  }
  cluster_sync();
  for (unsigned k = warp; k < t.group && slab * t.group + k < t.channels; k += warps) {
    const Sums sums = kept.total(t, plan, k);
    if (threadIdx.x % kWarp != 0) continue;
    const std::size_t channel = slab * t.group + k;
    const auto constants = constants_of<S>(t, call, channel, sums);
    if (rank == 0) write_gradients(call, channel, sums, constants);
    set_backward(kept.values[k], constants);
  }
  cluster_arrive();
  __syncthreads();
  using Own = ChannelValues<S>;
  const auto of_channels = [&](auto member) {
    return for_lanes<V, kColumns>(t, [&](unsigned channel) { return kept.values[channel].*member; });
  };
  values.level = of_channels(&Own::level);
  values.slope = of_channels(&Own::slope);
  for (std::size_t tile = kept.begin + warp; tile < kept.end; tile += warps) {
    Walk walk(t, slab, tile, threadIdx.x % kWarp);
    for (unsigned k = 0; k < walk.count; ++k, walk.next(t)) {
      const typename Vs::Raw g = kept.vector(t, tile, k, 1);
      const V dx = gradient_of<Vs>(Vs::widen(kept.vector(t, tile, k, 0)), Vs::widen(g), values);
      Vs::write(Vs::narrow(dx), call.dx, walk.element);
      if (call.dresidual != nullptr) Vs::write(g, call.dresidual, walk.element);
    }
  }
  cluster_wait();
}

// --- Launches --------------------------------------------------------------------------------------------------------

template <unsigned kLanes, bool kColumns, bool kAligned>
struct Way {
  static constexpr unsigned lanes = kLanes;
  static constexpr bool columns = kColumns;
  static constexpr bool aligned = kAligned;
};

// Calls body(Way) with the vectors of a tiling. Only those that tiling_of() makes are compiled.
template <class D, class Body>
void with_way(const BatchnormTiling& t, bool aligned, Body body) {
  constexpr std::size_t size = sizeof(typename D::Storage);
  const auto with_lanes = [&]<bool kColumns>() {
    const auto with = [&]<unsigned kLanes>() {
      if (aligned) return body(Way<kLanes, kColumns, true>());
      body(Way<kLanes, kColumns, false>());
    };
    if (t.lanes == 1) return body(Way<1, kColumns, true>());
    if constexpr (size == 2) {
      if (t.lanes == 4) return with.template operator()<4>();
    }
    with.template operator()<16 / size>();
  };
  if (t.columns) return with_lanes.template operator()<true>();
  with_lanes.template operator()<false>();
}

inline bool is_aligned(const BatchnormTiling& t, std::size_t itemsize, std::initializer_list<const void*> arrays) {
  return std::ranges::all_of(
      arrays, [&](const void* array) { return reinterpret_cast<std::uintptr_t>(array) % (t.lanes * itemsize) == 0; });
}

inline dim3 stream_grid(std::size_t warps) {
  const std::size_t blocks = batchnorm::divide_up(warps, kStreamThreads / kWarp);
  return {static_cast<unsigned>(std::min(blocks, kMostBlocks))};
}

template <class Kernel, class Call>
void launch_resident(const char* name, Kernel kernel, const BatchnormTiling& t, const BatchnormPlan& plan,
                     cudaStream_t stream, const Call& call) {
  constexpr std::size_t kUnasked = 48 << 10;  // bytes that every block may use
  if (plan.shared > kUnasked) {
    // All that there is: another thread may ask for another shape at this moment.
    int device = 0;
    int most = 0;
    check(cudaGetDevice(&device), name);
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), name);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes)),
          name);
  }
  const dim3 grid(static_cast<unsigned>(t.slabs * plan.cluster));
  const dim3 block(plan.warps * kWarp);
  if (plan.cluster == 1) return launch(name, kernel, grid, block, plan.shared, stream, t, plan, call);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = plan.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, t, plan, call), std::string("launching ") + name);
}

template <class D>
void forward_as(const BatchnormForward& call, const BatchnormTiling& t, const BatchnormPlan& plan,
                cudaStream_t stream) {
  constexpr std::size_t size = sizeof(typename D::Storage);
  const bool aligned = is_aligned(t, size, {call.x, call.y, call.residual});
  with_way<D>(t, aligned, [&](auto way) {
    constexpr bool kColumns = way.columns;
    using Vs = Vectors<D, way.lanes, way.aligned>;
    if constexpr (way.aligned) {  // what is not takes the other way, to the same bits
      if (call.training && plan.cluster > 0) {
        return launch_resident("batch norm", forward_resident<Vs, kColumns>, t, plan, stream, call);
      }
    }
    const dim3 grid = stream_grid(t.total());
    if (call.training) {
      launch("batch norm's sums", moments_of_tiles<Vs, kColumns>, grid, kStreamThreads, 0, stream, t, call);
      launch("batch norm's statistics", finish_moments<D>, stream_grid(t.channels), kStreamThreads, 0, stream, t, call);
    }
    launch("batch norm's map", normalize_tiles<Vs, kColumns>, grid, kStreamThreads, 0, stream, t, call);
  });
}

template <class D>
void backward_as(const BatchnormBackward& call, const BatchnormTiling& t, const BatchnormPlan& plan,
                 cudaStream_t stream) {
  constexpr std::size_t size = sizeof(typename D::Storage);
  const bool aligned = is_aligned(t, size, {call.x, call.dy, call.y, call.dx, call.dresidual});
  with_way<D>(t, aligned, [&](auto way) {
    constexpr bool kColumns = way.columns;
    using Vs = Vectors<D, way.lanes, way.aligned>;
    if constexpr (way.aligned) {
      if (!call.frozen && plan.cluster > 0) {
        return launch_resident("batch norm's backward pass", backward_resident<Vs, kColumns>, t, plan, stream, call);
      }
    }
    const dim3 grid = stream_grid(t.total());
    launch("batch norm's sums of gradients", gradients_of_tiles<Vs, kColumns>, grid, kStreamThreads, 0, stream, t,
           call);
    launch("batch norm's gradients of parameters", finish_gradients<D>, stream_grid(t.channels), kStreamThreads, 0,
           stream, t, call);
    if (call.frozen) return;
    launch("batch norm's input gradients", input_gradients<Vs, kColumns>, grid, kStreamThreads, 0, stream, t, call);
  });
}

}  // namespace

// Instantiated in one unit for each dtype.
template <class D>
void batchnorm_forward_of(const BatchnormForward& call, const BatchnormTiling& t, const BatchnormPlan& plan,
                          void* stream) {
  forward_as<D>(call, t, plan, static_cast<cudaStream_t>(stream));
}
template <class D>
void batchnorm_backward_of(const BatchnormBackward& call, const BatchnormTiling& t, const BatchnormPlan& plan,
                           void* stream) {
  backward_as<D>(call, t, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace onepass::cuda
