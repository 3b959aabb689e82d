// What is done to the elements of a tensor on every device: how values are read and rounded, what surrounds a rule, and
// what follows the update. `V`: a value type (simd/, cuda/pack.h). `Lanes`: which lanes of it belong to the array.
// `Random`: where random numbers come from; rounds() and has_noise() say whether there are any, bits<V>(i) and
// noise<V>(i, lanes) give those of the elements from i on.
#pragma once

#include <limits>
#include <type_traits>

#include "core/dtype.h"
#include "core/kernel.h"
#include "core/philox.h"
#include "core/target.h"

namespace onepass {

// What surrounds the rule, in the compute type.
template <class S>
struct Surroundings {
  S scale, total, clip_value, l1, l2, decay, noise, ema_decay, one_minus_ema_decay;
  bool has_scale, has_total, has_clip_value, has_l1, has_l2, has_decay, has_noise, ema_starts, zero_grads;

  Surroundings() = default;
  // Judged after rounding: a term that is neutral in the compute type is left out, never multiplied (0 * inf is NaN).
  HD explicit Surroundings(const Around& around) {
    scale = total = S(1);
    has_scale = has_total = false;
    clip_value = static_cast<S>(around.clip_value);
    l1 = static_cast<S>(around.l1);
    l2 = static_cast<S>(around.l2);
    decay = static_cast<S>(around.decay);
    noise = static_cast<S>(around.noise);
    ema_decay = static_cast<S>(around.ema_decay);
    one_minus_ema_decay = static_cast<S>(1.0 - around.ema_decay);
    has_clip_value = clip_value < std::numeric_limits<S>::infinity();
    has_l1 = l1 != S(0);
    has_l2 = l2 != S(0);
    has_decay = decay != S(1);
    has_noise = noise != S(0);
    ema_starts = around.ema_starts || ema_decay == S(0);
    zero_grads = around.zero_grads;
  }
  // Of an update with nothing around it: what has_... guards is known to the compiler not to be there. has_none() asks
  // for all that a step that is not `whole` looks at (step.h).
  HD static Surroundings none() { return Surroundings(Around{}); }
  HD bool has_none() const { return !(has_scale || has_l1 || has_l2 || has_decay); }
  // `clip`: a further factor of the gradient. `summed`: an accumulator is part of the gradient.
  HD void set_scale(const Scaling& scaling, double clip, bool summed) {
    scale = static_cast<S>(summed ? scaling.scale : scaling.sign * scaling.scale * clip);
    total = static_cast<S>(summed ? scaling.sign * clip / scaling.accumulate : 1.0);
    has_scale = !(scale == S(1));  // NaN, from a norm, is a scale too
    has_total = !(total == S(1));
  }
};

namespace {

// Which lanes of a vector belong to the array: all of them.
struct AllLanes {
  template <class D, class V>
  HD V load(const std::byte* from) const {
    return V::template load<D>(from);
  }
  template <class D, class V>
  HD void store(V value, std::byte* to) const {
    value.template store<D>(to);
  }
  template <class D, class V>
  HD void store_nearest(V value, std::byte* to) const {
    value.template store_nearest<D>(to);
  }
  template <class V>
  HD V join(const std::byte* high, const std::byte* low) const {
    return V::join(high, low);
  }
  template <class V>
  HD void split(V value, std::byte* high, std::byte* low) const {
    value.split(high, low);
  }
};

template <class D>
constexpr std::size_t kItem = sizeof(typename D::Storage);

template <class D>
using ComputeType = std::conditional_t<sizeof(typename D::Compute) == sizeof(float), Float32, Float64>;

// A value as it will be read back from a stream of dtype D.
template <class D, class V, class Random>
HD V rounded(V value, const Random& random, std::size_t i, std::size_t role) {
  if constexpr (kItem<D> < sizeof(typename V::Scalar)) {
    if (random.rounds()) {
      return value.template round<D>(product16(random.template bits<V>(i), rounding_factor(role)));
    }
    return value.template round<D>();
  } else {
    return value;
  }
}

// The parameter as a number of the compute type, from one stream or from the two of a split number.
template <class P, class V, class Lanes>
HD V load_param(const Streams& streams, std::size_t i, Lanes lanes) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (streams.data[kRemainder] != nullptr) {
      return lanes.template join<V>(streams.data[kParam] + 2 * i, streams.data[kRemainder] + 2 * i);
    }
  }
  return lanes.template load<P, V>(streams.data[kParam] + i * kItem<P>);
}

// Stores it and returns it as it was stored.
template <class P, class V, class Random, class Lanes>
HD V store_param(V p, const Streams& streams, const Random& random, std::size_t i, std::size_t role, Lanes lanes) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (streams.data[kRemainder] != nullptr) {
      lanes.split(p, streams.data[kParam] + 2 * i, streams.data[kRemainder] + 2 * i);
      return p;
    }
  }
  p = rounded<P>(p, random, i, role);
  lanes.template store<P>(p, streams.data[kParam] + i * kItem<P>);
  return p;
}

// What follows the update: the moving average, the copy in fewer bits, the gradient that is zero.
template <class E, class V, class Random, class Lanes, class S>
HD void update_average(V p, std::byte* ema, const Random& random, std::size_t i, const Surroundings<S>& around,
                       Lanes lanes) {
  V e = p;
  if (!around.ema_starts) {
    e = V(around.ema_decay) * lanes.template load<E, V>(ema + i * kItem<E>) + V(around.one_minus_ema_decay) * p;
    e = rounded<E>(e, random, i, kEmaRole);
  }
  lanes.template store<E>(e, ema + i * kItem<E>);
}

template <class V, class Lanes>
HD void store_mirror(V p, std::byte* mirror, DType dtype, std::size_t i, Lanes lanes) {
  if (dtype == DType::bfloat16) {
    lanes.template store_nearest<BFloat16>(p, mirror + 2 * i);
  } else {
    lanes.template store_nearest<Float16>(p, mirror + 2 * i);
  }
}

template <class P, class V, class Random, class Lanes, class S>
HD void pass_on(V p, const Streams& streams, const Random& random, DType mirror, std::size_t i,
                const Surroundings<S>& around, Lanes lanes) {
  if (std::byte* const ema = streams.data[kEma]; ema != nullptr) {
    if (std::is_same_v<P, BFloat16> && streams.data[kRemainder] != nullptr) {
      update_average<ComputeType<P>>(p, ema, random, i, around, lanes);
    } else {
      update_average<P>(p, ema, random, i, around, lanes);
    }
  }
  if (std::byte* const to = streams.data[kMirror]; to != nullptr) store_mirror(p, to, mirror, i, lanes);
}

}  // namespace
}  // namespace onepass
