// The sums of batch normalization on a device: of a thread's elements, of a warp's tile, of all tiles of a channel.
//
// A thread sums deviations from a center of its own, near the mean of its elements, in the compute type. What it misses
// of the channel's *pivot*, one of the channel's values, is made up for in float64: from there on sums are plain ones,
// of x - pivot and of its square, and are added as they come. The pivot lies within sqrt(n) deviations of the mean, and
// so at most n * 2**-53 of the variance is lost to it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "batchnorm/formulas.h"
#include "batchnorm/statistics.h"
#include "cuda/batchnorm_plan.h"
#include "cuda/launch.h"
#include "cuda/pack.h"

namespace onepass::cuda {
namespace {

// --- Elements --------------------------------------------------------------------------------------------------------

// N elements of dtype D at a time. Not aligned to all of them: one after the other, with the same bits.
template <class D_, unsigned kLanes, bool kAligned>
struct Vectors {
  using D = D_;
  using S = typename D::Compute;
  using T = typename D::Storage;
  using V = Pack<S, kLanes>;
  using Raw = Items<T, kLanes>;
  static constexpr unsigned lanes = kLanes;
  // Vectors that a thread loads before it uses the first, of one array and of two or three: what registers hold, with
  // the sums of 8 lanes beside them. And those that give the center of its sums.
  static constexpr unsigned sample = sample_of(kLanes);
  static constexpr unsigned batch = kAligned ? sample : 2;
  static constexpr unsigned half_batch = kAligned && kLanes < 8 ? 4 : 2;

  HD static Raw read(const void* base, std::size_t element) {
    const auto* const from = static_cast<const std::byte*>(base) + element * sizeof(T);
    if constexpr (kAligned) {
      return Raw::load(from);
    } else {
      Raw raw;
      ONEPASS_UNROLL
      for (unsigned k = 0; k < kLanes; ++k) raw.item[k] = Items<T, 1>::load(from + k * sizeof(T)).item[0];
      return raw;
    }
  }
  HD static void write(const Raw& raw, void* base, std::size_t element) {
    auto* const to = static_cast<std::byte*>(base) + element * sizeof(T);
    if constexpr (kAligned) {
      raw.store(to);
    } else {
      ONEPASS_UNROLL
      for (unsigned k = 0; k < kLanes; ++k) Items<T, 1>{{raw.item[k]}}.store(to + k * sizeof(T));
    }
  }
  HD static V widen(const Raw& raw) {
    V v;
    ONEPASS_UNROLL
    for (unsigned k = 0; k < kLanes; ++k) v.value[k] = as_read(widen(raw.item[k]));
    return v;
  }
  HD static S widen(T item) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<D, Float16>) {  // one instruction, which makes every NaN the same one
      float value;
      asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(item));
      const std::uint32_t nan = (item & 0x8000U) << 16U | 0x7FC00000U | (item & 0x7FFFU) << 13U;
      return value == value ? value : float_of(nan);
    }
#endif
    return static_cast<S>(D::widen(item));
  }
  HD static Raw narrow(const V& v) {
    Raw raw;
    onepass::cuda::narrow<D>(v.value, raw.item);
    return raw;
  }
};

template <class S, std::size_t N>
HD S sum_of_lanes(const Pack<S, N>& v) {
  S lane[N];
  ONEPASS_UNROLL
  for (std::size_t k = 0; k < N; ++k) lane[k] = v.value[k];
  ONEPASS_UNROLL
  for (std::size_t half = N / 2; half > 0; half /= 2) {
    ONEPASS_UNROLL
    for (std::size_t k = 0; k < half; ++k) lane[k] = sum(lane[k], lane[k + half]);
  }
  return lane[0];
}

template <class S>
HD S value_of_channel(const void* values, std::size_t channel) {  // in the compute type
  return flush(Pack<S, 1>(static_cast<const S*>(values)[channel])).value[0];
}

// What the host's processor flushes by itself, where a result is kept.
HD float kept(double value, float /*as*/) { return flush(Pack<float, 1>(static_cast<float>(value))).value[0]; }
HD double kept(double value, double /*as*/) { return without_subnormals(value); }

template <class S>
HD void store_of_channel(void* values, std::size_t channel, double value) {
  static_cast<S*>(values)[channel] = kept(value, S(0));
}

// --- Sums ------------------------------------------------------------------------------------------------------------

struct alignas(16) Sums {
  double first, second;
  HD friend Sums operator+(Sums a, Sums b) { return {a.first + b.first, a.second + b.second}; }
};

__device__ __forceinline__ Sums from_lane(Sums sums, unsigned distance) {
  return {__shfl_xor_sync(0xFFFFFFFFU, sums.first, static_cast<int>(distance)),
          __shfl_xor_sync(0xFFFFFFFFU, sums.second, static_cast<int>(distance))};
}

// A thread's sums of one tile, for each of its lanes in the compute type: of deviations from `center` and of their
// squares, or of gradients.
template <class V>
struct TileSums {
  V first = V(typename V::Scalar(0)), second = V(typename V::Scalar(0));
  HD void add(const batchnorm::Pair<V>& terms) {
    first = first + terms.first;
    second = second + terms.second;
  }
};

// From deviations from `center` to those from `pivot`.
HD Sums about_pivot(double sum, double squares, double count, double center, double pivot) {
  const double miss = center - pivot;
  return {sum + count * miss, squares + miss * (2.0 * sum + count * miss)};
}

// Adds the sums of a warp's threads as a tree, and calls put(channel of the slab, sums) where they belong. `of_lane`:
// from (lane of a vector, or 0 for all of them; first, second) to the sums in float64.
template <bool kColumns, class V, class OfLane, class Put>
__device__ __forceinline__ void add_threads(const BatchnormTiling& t, const TileSums<V>& tile, OfLane of_lane,
                                            Put put) {
  const unsigned thread = threadIdx.x % kWarp;
  if constexpr (!kColumns) {
    Sums sums =
        of_lane(0U, static_cast<double>(sum_of_lanes(tile.first)), static_cast<double>(sum_of_lanes(tile.second)));
    ONEPASS_UNROLL
    for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) sums = sums + from_lane(sums, distance);
    if (thread == 0) put(0U, sums);
  } else {
    ONEPASS_UNROLL
    for (unsigned k = 0; k < V::lanes; ++k) {
      Sums sums = of_lane(k, static_cast<double>(tile.first.value[k]), static_cast<double>(tile.second.value[k]));
      for (unsigned distance = kWarp / 2; distance >= t.width; distance /= 2) sums = sums + from_lane(sums, distance);
      if (thread < t.width) put(thread * static_cast<unsigned>(V::lanes) + k, sums);
    }
  }
}

// The sum over all tiles of a channel, by one warp: tile i goes to virtual lane i % 256, and these are added as a tree.
// sums_of(i): the sums of tile i.
template <class SumsOf>
__device__ __forceinline__ Sums add_tiles(std::size_t tiles, SumsOf sums_of) {
  constexpr unsigned kOwn = 8;
  const unsigned thread = threadIdx.x % kWarp;
  Sums own[kOwn];
  ONEPASS_UNROLL
  for (unsigned k = 0; k < kOwn; ++k) own[k] = {0.0, 0.0};
  for (std::size_t tile = thread; tile < tiles; tile += kOwn * kWarp) {
    Sums next[kOwn];
    ONEPASS_UNROLL
    for (unsigned k = 0; k < kOwn; ++k) {
      next[k] = {0.0, 0.0};
      if (tile + k * kWarp < tiles) next[k] = sums_of(tile + k * kWarp);
    }
    ONEPASS_UNROLL
    for (unsigned k = 0; k < kOwn; ++k) own[k] = own[k] + next[k];
  }
  ONEPASS_UNROLL
  for (unsigned half = kOwn / 2; half > 0; half /= 2) {
    ONEPASS_UNROLL
    for (unsigned k = 0; k < half; ++k) own[k] = own[k] + own[k + half];
  }
  Sums sums = own[0];
  ONEPASS_UNROLL
  for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) sums = sums + from_lane(sums, distance);
  return sums;
}

// --- What is known of each channel -----------------------------------------------------------------------------------

template <class V>
struct ChannelValues {
  V high, scale, offset, level, slope;
};

template <class S>
HD void set_forward(ChannelValues<S>& values, const BatchnormCall& call, std::size_t channel, double mean,
                    double invstd) {
  const batchnorm::ForwardConstants<S> constants(
      mean, invstd, call.weight == nullptr ? 1.0 : static_cast<double>(value_of_channel<S>(call.weight, channel)),
      call.bias == nullptr ? 0.0 : static_cast<double>(value_of_channel<S>(call.bias, channel)));
  values.high = kept(constants.high, S(0));
  values.scale = kept(constants.scale, S(0));
  values.offset = kept(constants.offset, S(0));
}

template <class S>
HD void set_backward(ChannelValues<S>& values, const batchnorm::BackwardConstants<S>& constants) {
  values.level = kept(constants.level, S(0));
  values.slope = kept(constants.slope, S(0));
}

// For each lane of a thread's vectors, where values(channel of the slab) is what is known of it.
template <class V, bool kColumns, class Values>
__device__ __forceinline__ V for_lanes(const BatchnormTiling& t, Values values) {
  if constexpr (!kColumns) {
    return V(values(0U));
  } else {
    V v;
    const unsigned column = threadIdx.x % kWarp % t.width;
    ONEPASS_UNROLL
    for (unsigned k = 0; k < V::lanes; ++k) v.value[k] = values(column * static_cast<unsigned>(V::lanes) + k);
    return v;
  }
}

// Where thread i knows the values of channel i of a slab. (Runs: each thread those of the one channel.)
template <class V, bool kColumns>
__device__ __forceinline__ V from_threads(const BatchnormTiling& t, typename V::Scalar value) {
  return for_lanes<V, kColumns>(t, [&](unsigned channel) {
    return kColumns ? __shfl_sync(0xFFFFFFFFU, value, static_cast<int>(channel)) : value;
  });
}

// --- Moments ---------------------------------------------------------------------------------------------------------

// Calls body(u, k, element) for a thread's k-th vectors, after load(u, k, element) for all of a batch.
template <unsigned kVectors, class Load, class Body>
__device__ __forceinline__ void for_batches(const BatchnormTiling& t, Walk walk, Load load, Body body) {
  for (unsigned k = 0; k < walk.count; k += kVectors) {
    std::size_t element[kVectors];
    ONEPASS_UNROLL
    for (unsigned u = 0; u < kVectors; ++u) {
      element[u] = walk.element;
      if (k + u < walk.count) load(u, k + u, walk.element);
      walk.next(t);
    }
    ONEPASS_UNROLL
    for (unsigned u = 0; u < kVectors; ++u) {
      if (k + u < walk.count) body(u, k + u, element[u]);
    }
  }
}

// A center for a thread's sums: the mean of its first vectors. It lies within sqrt(n / m) deviations of the mean of the
// thread's n values if it is that of m of them: 2 in runs of whole vectors, 6 at most. Of all lanes, or of each for
// itself. vector(u): the u-th of `count`, which is not 0.
template <bool kColumns, class Vs, class Vector>
__device__ __forceinline__ typename Vs::V center_of(unsigned count, Vector vector) {
  using V = typename Vs::V;
  using S = typename Vs::S;
  V first = vector(0U);
  if constexpr (!kColumns) first = V(first.value[0]);
  V rest(S(0));
  ONEPASS_UNROLL
  for (unsigned u = 0; u < Vs::sample; ++u) {
    if (u < count) rest = rest + (vector(u) - first);
  }
  count = count < Vs::sample ? count : Vs::sample;
  if constexpr (!kColumns) {
    return V(sum(first.value[0], product(sum_of_lanes(rest), quotient(S(1), static_cast<S>(count * Vs::lanes)))));
  } else {
    return first + rest * V(quotient(S(1), static_cast<S>(count)));
  }
}

// Sums x - pivot and its square over a tile. keep(k, raw): the thread's k-th vector, for later.
template <bool kColumns, class Vs, class Keep, class Put>
__device__ __forceinline__ void sum_moments(const BatchnormTiling& t, const void* x, std::size_t slab, std::size_t tile,
                                            Keep keep, Put put) {
  using V = typename Vs::V;
  using D = typename Vs::D;
  const Walk walk(t, slab, tile, threadIdx.x % kWarp);
  typename Vs::Raw raw[Vs::batch];
  V center(typename Vs::S(0));
  if (Vs::batch < Vs::sample && walk.count > 0) {  // these are read twice
    Walk sample = walk;
    center = center_of<kColumns, Vs>(walk.count, [&](unsigned u) {
      if (u > 0) sample.next(t);
      return Vs::widen(Vs::read(x, u == 0 ? walk.element : sample.element));
    });
  }
  TileSums<V> sums;
  for_batches<Vs::batch>(
      t, walk, [&](unsigned u, unsigned /*k*/, std::size_t element) { raw[u] = Vs::read(x, element); },
      [&](unsigned u, unsigned k, std::size_t /*element*/) {
        if constexpr (Vs::batch >= Vs::sample) {
          if (k == 0) center = center_of<kColumns, Vs>(walk.count, [&](unsigned v) { return Vs::widen(raw[v]); });
        }
        keep(k, raw[u]);
        sums.add(batchnorm::deviation_terms(Vs::widen(raw[u]), center));
      });
  const double count = walk.count * (kColumns ? 1.0 : static_cast<double>(Vs::lanes));
  const unsigned column = threadIdx.x % kWarp % t.width * Vs::lanes;
  add_threads<kColumns>(
      t, sums,
      [&](unsigned lane, double first, double second) {
        if (walk.count == 0) return Sums{0.0, 0.0};
        const std::size_t channel = slab * t.group + (kColumns ? column + lane : 0);
        const auto pivot = Vectors<D, 1, true>::widen(Vectors<D, 1, true>::read(x, channel * t.inner)).value[0];
        return about_pivot(first, second, count, static_cast<double>(center.value[lane]), static_cast<double>(pivot));
      },
      put);
}

struct Statistics {
  double mean, invstd;
};

template <class S>
__device__ __forceinline__ void write_used(const BatchnormForward& call, std::size_t channel, Statistics used) {
  call.mean[channel] = used.mean;
  call.invstd[channel] = used.invstd;
  const auto copy = [&](const void* from, void* to) {
    if (to != nullptr) static_cast<S*>(to)[channel] = static_cast<const S*>(from)[channel];
  };
  copy(call.weight, call.weight_used);
  copy(call.bias, call.bias_used);
}

// Mean, 1 / deviation and running statistics of a channel from its sums.
template <class D>
__device__ __forceinline__ Statistics statistics_of(const BatchnormTiling& t, const BatchnormForward& call,
                                                    std::size_t channel, Sums sums, bool writes) {
  using S = typename D::Compute;
  const auto pivot = Vectors<D, 1, true>::widen(Vectors<D, 1, true>::read(call.x, channel * t.inner)).value[0];
  const auto n = static_cast<double>(t.outer * t.inner);
  const batchnorm::Moments moments(static_cast<double>(pivot), sums.first, sums.second, n);
  const double squares = batchnorm::known_squares(moments.m2);
  const Statistics result{moments.mean, batchnorm::inverse_deviation(squares / n, call.eps)};
  if (!writes) return result;
  write_used<S>(call, channel, result);
  if (call.running_mean == nullptr) return result;
  const auto mix = [&](void* running, double now) {
    const auto before = static_cast<double>(value_of_channel<S>(running, channel));
    store_of_channel<S>(running, channel, batchnorm::mixed(before, now, call.momentum));
  };
  mix(call.running_mean, result.mean);
  mix(call.running_var, squares / (call.unbiased ? n - 1.0 : n));
  return result;
}

// --- Gradients -------------------------------------------------------------------------------------------------------

// Where dy counts: everywhere, where the y that was given is positive, or where the y that follows from x is.
enum class Mask : std::uint8_t { none, given, recomputed };

HD Mask mask_of(const BatchnormBackward& call) {
  if (!call.relu) return Mask::none;
  return call.y != nullptr ? Mask::given : Mask::recomputed;
}

// The gradient that reaches the normalization. `y` is read where it was given.
template <class V>
HD V arriving(Mask mask, V dy, V x, V y, const ChannelValues<V>& values) {
  if (mask == Mask::none) return dy;
  if (mask == Mask::recomputed) y = batchnorm::normalize(x, values.high, values.scale, values.offset);
  return batchnorm::rectified_gradient(dy, y);
}

// Reads a thread's vectors of x, dy and y in batches. body(k, element, x, dy).
template <class Vs, class Body>
__device__ __forceinline__ void for_gradients(const BatchnormTiling& t, const Walk& walk, const BatchnormBackward& call,
                                              const ChannelValues<typename Vs::V>& values, Body body) {
  using V = typename Vs::V;
  const Mask mask = mask_of(call);
  typename Vs::Raw x[Vs::half_batch];
  typename Vs::Raw dy[Vs::half_batch];
  typename Vs::Raw y[Vs::half_batch];
  for_batches<Vs::half_batch>(
      t, walk,
      [&](unsigned u, unsigned /*k*/, std::size_t element) {
        x[u] = Vs::read(call.x, element);
        dy[u] = Vs::read(call.dy, element);
        if (mask == Mask::given) y[u] = Vs::read(call.y, element);
      },
      [&](unsigned u, unsigned k, std::size_t element) {
        const V value = Vs::widen(x[u]);
        V given(typename Vs::S(0));
        if (mask == Mask::given) given = Vs::widen(y[u]);
        body(k, element, x[u], value, arriving(mask, Vs::widen(dy[u]), value, given, values));
      });
}

// The sums of g and of g * (x - high) over a tile. keep(k, element, x, g): the thread's k-th vectors.
template <bool kColumns, class Vs, class Keep, class Put>
__device__ __forceinline__ void sum_gradients(const BatchnormTiling& t, const BatchnormBackward& call, std::size_t slab,
                                              std::size_t tile, const ChannelValues<typename Vs::V>& values, Keep keep,
                                              Put put) {
  using V = typename Vs::V;
  const Walk walk(t, slab, tile, threadIdx.x % kWarp);
  TileSums<V> sums;
  for_gradients<Vs>(t, walk, call, values,
                    [&](unsigned k, std::size_t element, const typename Vs::Raw& raw, const V& x, const V& g) {
                      keep(k, element, raw, g);
                      sums.add(batchnorm::gradient_terms(g, x, values.high));
                    });
  add_threads<kColumns>(
      t, sums, [](unsigned /*lane*/, double first, double second) { return Sums{first, second}; }, put);
}

}  // namespace
}  // namespace onepass::cuda
