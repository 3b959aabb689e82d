#include "cpu/batchnorm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "batchnorm/plan.h"
#include "batchnorm/statistics.h"
#include "core/batchnorm_kernel.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/float_mode.h"
#include "cpu/parallel.h"
#include "cpu/update.h"
#include "simd/one_lane.h"

namespace onepass::batchnorm {
namespace {

// An output of this many bytes is written past the caches: it would not be found there, and a plain store reads what it
// overwrites first. 14 to 28 % less for the forward pass over 26 MB and more, 11 to 30 % for the backward pass.
constexpr std::size_t kBypassBytes = std::size_t{4} << 20;

// The shortest pieces of rows, in bytes, that are worth their beginning.
constexpr std::size_t kShortestPiece = 512;

constexpr std::size_t kPartsPerThread = 4;

// --- The way through a batch -----------------------------------------------------------------------------------------

// In which order each thread takes its share of the work.
enum class Order : std::uint8_t { forwards, backwards };

// Calls body(k) for each k below `count`, divided among threads, in the kernels' floating-point mode.
template <class Body>
void for_each(std::size_t threads, std::size_t count, Order order, const Body& body) {
  struct Context {
    const Body& body;
    std::size_t count, threads, parts;
    Order order;

    void run(std::size_t part) const {
      const FloatMode mode;
      const std::size_t each = parts / threads;  // parts of a thread
      const std::size_t first = part / each * each;
      const std::size_t begin = part_of(count, first, parts).begin;
      const std::size_t end = part_of(count, first + each - 1, parts).end;
      const Range own = part_of(count, part, parts);
      for (std::size_t k = own.begin; k < own.end; ++k) body(order == Order::forwards ? k : begin + end - 1 - k);
    }
  };
  threads = std::min(threads, count);
  if (threads == 0) return;
  Context context{body, count, threads, threads * std::min(kPartsPerThread, count / threads), order};
  if (threads == 1) {
    for (std::size_t part = 0; part < context.parts; ++part) context.run(part);
    return;
  }
  parallel_for(
      threads, context.parts, [](void* pointer, std::size_t part) { static_cast<const Context*>(pointer)->run(part); },
      &context);
}

// A unit is a group of channels within one tile. Channelwise, one thread sums it and then maps it, so that the second
// read finds it in the cache. Otherwise all chunks of all units are summed before the first is mapped.
struct Route {
  std::size_t threads;
  std::size_t unit = 0;  // channels
  std::size_t units_per_tile = 0;
  std::size_t units = 0;
  bool channelwise = false;

  // `streams`: arrays that are read twice.
  Route(const Plan& plan, std::size_t streams, std::size_t itemsize, std::size_t given_threads)
      : threads((1 + streams) * plan.outer * plan.channels * plan.inner * itemsize < serial_bytes() ? 1
                                                                                                    : given_threads) {
    const CacheSizes cache = cache_sizes();
    const std::size_t channel_bytes = streams * plan.outer * plan.inner * itemsize;
    // As many channels as half of a core's cache holds, but in rows that are long enough; or a whole tile, from the
    // cache that cores share.
    const std::size_t fitting = cache.level2 / 2 / channel_bytes;
    const std::size_t shortest = plan.fold > 1 ? plan.tile : divide_up(kShortestPiece / itemsize, plan.inner);
    divide(plan, std::min(plan.tile, std::max(fitting, shortest)));
    if (unit * channel_bytes > cache.level2 / 2) divide(plan, plan.tile);
    const std::size_t share = std::max(cache.level2 / 2, cache.level3 / 2 / threads);
    const bool balanced = 5 * units >= 4 * threads * divide_up(units, threads);
    channelwise = unit * channel_bytes <= share && balanced;
    if (!channelwise) divide(plan, plan.tile);
  }

  Range channels_of(const Plan& plan, std::size_t k) const {
    const std::size_t tile = k / units_per_tile * plan.tile;
    const std::size_t end_of_tile = std::min(tile + plan.tile, plan.channels);
    const std::size_t begin = std::min(tile + k % units_per_tile * unit, end_of_tile);
    return {begin, std::min(begin + unit, end_of_tile)};
  }

 private:
  void divide(const Plan& plan, std::size_t channels) {
    unit = channels;
    units_per_tile = divide_up(plan.tile, unit);
    units = divide_up(plan.channels, plan.tile) * units_per_tile;
  }
};

// --- Values of channels ----------------------------------------------------------------------------------------------

template <class D>
double load(const void* values, std::size_t channel) {
  const std::byte* const from = static_cast<const std::byte*>(values) + channel * sizeof(typename D::Storage);
  return static_cast<double>(flush(OneLane<typename D::Compute>::template load<D>(from)).value);
}

template <class D>
void store(void* values, std::size_t channel, double value) {
  std::byte* const to = static_cast<std::byte*>(values) + channel * sizeof(typename D::Storage);
  OneLane<typename D::Compute>(static_cast<typename D::Compute>(value)).template store<D>(to);
}

// What the maps know of each channel (formulas.h).
template <class D>
class Coefficients {
 public:
  using S = typename D::Compute;
  enum Kind : std::size_t { high, scale, offset, level, slope, kinds };

  explicit Coefficients(const Batch& batch) : batch_(batch), values_(new S[kinds * batch.channels]()) {}

  const S* of(Kind kind) const { return values_.get() + kind * batch_.channels; }

  void set_forward(std::size_t c, double mean, double invstd) const {
    const ForwardConstants<S> constants(mean, invstd, batch_.weight == nullptr ? 1.0 : load<D>(batch_.weight, c),
                                        batch_.bias == nullptr ? 0.0 : load<D>(batch_.bias, c));
    at(high, c) = constants.high;
    at(scale, c) = constants.scale;
    at(offset, c) = constants.offset;
  }
  void set_backward(std::size_t c, const BackwardConstants<S>& constants) const {
    at(level, c) = constants.level;
    at(slope, c) = constants.slope;
  }

 private:
  S& at(Kind kind, std::size_t c) const { return values_[kind * batch_.channels + c]; }

  const Batch& batch_;
  std::unique_ptr<S[]> values_;
};

// --- A pass ----------------------------------------------------------------------------------------------------------

// What both passes have: two sums for each channel and chunk, then a map.
template <class D>
class Pass {
 protected:
  using S = typename D::Compute;
  static constexpr std::size_t itemsize = sizeof(typename D::Storage);

  Pass(const Batch& batch, std::size_t streams, std::size_t threads)
      : plan_(make_plan(batch.outer, batch.channels, batch.inner, sizeof(S))),
        route_(plan_, streams, itemsize, threads),
        coefficients_(batch),
        sums_(new double[2 * plan_.chunks * plan_.channels]),
        kernels_(active_kernels().batchnorm->kernels[static_cast<std::size_t>(D::id)]) {}

  // sum(region, chunk); finish(channels), when all chunks of these are summed; map(region).
  template <class Sum, class Finish, class Map>
  void sum_then_map(const Sum& sum, const Finish& finish, const Map& map) const {
    if (route_.channelwise) {
      for_each(route_.threads, route_.units, Order::forwards, [&](std::size_t unit) {
        const Range channels = route_.channels_of(plan_, unit);
        if (channels.size() == 0) return;
        for (std::size_t k = 0; k < plan_.chunks; ++k) sum(Region{channels, blocks_of_chunk(plan_, k)}, k);
        finish(channels);
        map(Region{channels, {0, plan_.blocks}});
      });
      return;
    }
    for_each_chunk(Order::forwards, sum);
    finish_all(finish);
    // Backwards, so that it begins with what the first pass has left in the caches: 7 to 11 % less at (6272, 2048), and
    // nothing at other shapes that were tried.
    for_each_chunk(Order::backwards, [&](const Region& region, std::size_t /*chunk*/) { map(region); });
  }

  template <class Finish>
  void finish_all(const Finish& finish) const {
    constexpr std::size_t together = 256;  // fewer are done sooner than threads are called
    for_each(route_.threads, divide_up(plan_.channels, together), Order::forwards,
             [&](std::size_t k) { finish(Range{k * together, std::min((k + 1) * together, plan_.channels)}); });
  }

  template <class Body>
  void for_each_chunk(Order order, const Body& body) const {
    const std::size_t count = route_.units * plan_.chunks;
    for_each(route_.threads, count, order, [&](std::size_t k) {
      const Range channels = route_.channels_of(plan_, k % route_.units);
      const std::size_t chunk = k / route_.units;
      if (channels.size() > 0) body(Region{channels, blocks_of_chunk(plan_, chunk)}, chunk);
    });
  }

  double* first_sum(std::size_t chunk, std::size_t channel) const {
    return sums_.get() + 2 * chunk * plan_.channels + channel;
  }
  double* second_sum(std::size_t chunk, std::size_t channel) const {
    return first_sum(chunk, channel) + plan_.channels;
  }
  void note(Isa isa) const { isa_.store(isa, std::memory_order_relaxed); }

  Plan plan_;
  Route route_;
  Coefficients<D> coefficients_;
  std::unique_ptr<double[]> sums_;
  const Kernels& kernels_;
  mutable std::atomic<Isa> isa_{Isa::scalar};
};

bool may_bypass(const void* to, std::size_t bytes, std::size_t itemsize) {
  return bytes >= kBypassBytes && reinterpret_cast<std::uintptr_t>(to) % itemsize == 0;
}

template <class D>
class ForwardPass : Pass<D> {
 public:
  ForwardPass(const ForwardCall& call, std::size_t threads) : Pass<D>(call, 1, threads), call_(call) {
    using C = Coefficients<D>;
    pass_ = {.x = call.x,
             .residual = call.residual,
             .y = call.y,
             .relu = call.relu,
             .bypass_cache = may_bypass(call.y, call.count() * this->itemsize, this->itemsize),
             .high = this->coefficients_.of(C::high),
             .scale = this->coefficients_.of(C::scale),
             .offset = this->coefficients_.of(C::offset)};
  }

  Isa run() const {
    const auto map = [&](const Region& region) { this->note(this->kernels_.normalize(this->plan_, region, pass_)); };
    if (!call_.training) {
      for_each(1, this->plan_.channels, Order::forwards,
               [&](std::size_t c) { use(c, load<D>(call_.running_mean, c), load<D>(call_.running_var, c)); });
      this->for_each_chunk(Order::forwards, [&](const Region& region, std::size_t /*chunk*/) { map(region); });
    } else {
      this->sum_then_map(
          [&](const Region& region, std::size_t chunk) {
            const std::size_t c = region.channels.begin;
            this->kernels_.moments(this->plan_, region, call_.x, this->first_sum(chunk, c), this->second_sum(chunk, c));
          },
          [&](Range channels) { finish(channels); }, map);
    }
    return this->isa_.load(std::memory_order_relaxed);
  }

 private:
  void use(std::size_t c, double mean, double var) const {
    call_.mean[c] = mean;
    call_.invstd[c] = inverse_deviation(var, call_.eps);
    this->coefficients_.set_forward(c, mean, call_.invstd[c]);
  }

  void finish(Range channels) const {
    const Plan& plan = this->plan_;
    double* const mean = this->first_sum(0, channels.begin);
    double* const m2 = this->second_sum(0, channels.begin);
    for (std::size_t chunk = 1; chunk < plan.chunks; ++chunk) {
      const Range blocks = blocks_of_chunk(plan, chunk);
      merge(channels.size(), static_cast<double>(count_in(plan, {0, blocks.begin})),
            static_cast<double>(count_in(plan, blocks)), this->first_sum(chunk, channels.begin),
            this->second_sum(chunk, channels.begin), mean, m2);
    }
    const auto n = static_cast<double>(call_.per_channel());
    for (std::size_t k = 0; k < channels.size(); ++k) {
      const std::size_t c = channels.begin + k;
      const double sum = known_squares(m2[k]);
      use(c, mean[k], sum / n);
      if (call_.running_mean == nullptr) continue;
      const auto mix = [&](void* running, double now) {
        store<D>(running, c, mixed(load<D>(running, c), now, call_.momentum));
      };
      mix(call_.running_mean, mean[k]);
      mix(call_.running_var, sum / (call_.unbiased ? n - 1.0 : n));
    }
  }

  const ForwardCall& call_;
  Forward pass_{};
};

template <class D>
class BackwardPass : Pass<D> {
 public:
  BackwardPass(const BackwardCall& call, std::size_t threads)
      : Pass<D>(call, call.relu && call.y != nullptr ? 3 : 2, threads), call_(call) {
    using C = Coefficients<D>;
    const std::size_t bytes = call.count() * this->itemsize;
    constexpr std::size_t line = 64;
    const auto place = [](const void* array) { return reinterpret_cast<std::uintptr_t>(array) % line; };
    pass_ = {.x = call.x,
             .dy = call.dy,
             .y = call.y,
             .relu = call.relu,
             .frozen = call.frozen,
             .dx = call.dx,
             .dresidual = call.dresidual,
             .bypass_cache = may_bypass(call.dx, bytes, this->itemsize) &&
                             (call.dresidual == nullptr || place(call.dx) == place(call.dresidual)),
             .high = this->coefficients_.of(C::high),
             .scale = this->coefficients_.of(C::scale),
             .offset = this->coefficients_.of(C::offset),
             .level = this->coefficients_.of(C::level),
             .slope = this->coefficients_.of(C::slope)};
  }

  Isa run() const {
    for_each(1, this->plan_.channels, Order::forwards,
             [&](std::size_t c) { this->coefficients_.set_forward(c, call_.mean[c], call_.invstd[c]); });
    const auto sum = [&](const Region& region, std::size_t chunk) {
      const std::size_t c = region.channels.begin;
      this->kernels_.sums(this->plan_, region, pass_, this->first_sum(chunk, c), this->second_sum(chunk, c));
    };
    const auto finish = [&](Range channels) { this->finish(channels); };
    const auto map = [&](const Region& region) {
      this->note(this->kernels_.input_gradients(this->plan_, region, pass_));
    };
    if (call_.frozen) {  // the map needs no sum
      this->for_each_chunk(Order::forwards, [&](const Region& region, std::size_t chunk) {
        sum(region, chunk);
        map(region);
      });
      this->finish_all(finish);
    } else {
      this->sum_then_map(sum, finish, map);
    }
    return this->isa_.load(std::memory_order_relaxed);
  }

 private:
  void finish(Range channels) const {
    double* const dy = this->first_sum(0, channels.begin);
    double* const dy_x = this->second_sum(0, channels.begin);
    for (std::size_t chunk = 1; chunk < this->plan_.chunks; ++chunk) {
      const double* const more_dy = this->first_sum(chunk, channels.begin);
      const double* const more_dy_x = this->second_sum(chunk, channels.begin);
      for (std::size_t k = 0; k < channels.size(); ++k) {
        dy[k] = dy[k] + more_dy[k];
        dy_x[k] = dy_x[k] + more_dy_x[k];
      }
    }
    const auto n = static_cast<double>(call_.per_channel());
    for (std::size_t k = 0; k < channels.size(); ++k) {
      const std::size_t c = channels.begin + k;
      const BackwardConstants<typename D::Compute> constants(dy[k], dy_x[k], call_.mean[c], call_.invstd[c], n);
      if (call_.dbias != nullptr) store<D>(call_.dbias, c, dy[k]);
      if (call_.dweight != nullptr) store<D>(call_.dweight, c, constants.dweight);
      this->coefficients_.set_backward(c, constants);
    }
  }

  const BackwardCall& call_;
  Backward pass_{};
};

template <template <class> class PassOf, class Call, class... Ds>
Isa run_as(TypeList<Ds...> /*dtypes*/, const Call& call, std::size_t threads) {
  Isa isa = Isa::scalar;
  ((call.dtype == Ds::id && (isa = PassOf<Ds>(call, threads).run(), true)) || ...);
  return isa;
}

}  // namespace

Isa forward(const ForwardCall& call, std::size_t threads) {
  if (call.count() == 0) {
    std::fill_n(call.mean, call.channels, std::numeric_limits<double>::quiet_NaN());
    std::fill_n(call.invstd, call.channels, std::numeric_limits<double>::quiet_NaN());
    return active_kernels().isa;
  }
  return run_as<ForwardPass>(ComputeTypes{}, call, threads);
}

Isa backward(const BackwardCall& call, std::size_t threads) {
  if (call.count() == 0) {
    for (void* const gradient : {call.dweight, call.dbias}) {
      if (gradient == nullptr) continue;
      std::fill_n(static_cast<std::byte*>(gradient), call.channels * info(call.dtype).itemsize, std::byte{0});
    }
    return active_kernels().isa;
  }
  return run_as<BackwardPass>(ComputeTypes{}, call, threads);
}

}  // namespace onepass::batchnorm
