// One step of some elements, for every rule, in every storage and on every device: load, prologue, rule, epilogue,
// store.
#pragma once

#include "core/elements.h"

namespace onepass {
namespace {

// A rule's coefficients in the compute type, from as many numbers or more.
template <class Rule, class S>
HD typename Rule::template Coefs<S> as_coefficients(const S* rounded) {
  using Coefs = typename Rule::template Coefs<S>;
  static_assert(sizeof(Coefs) == Rule::coefficients.count * sizeof(S),
                "a coefficient without a name, or a name too many");
  Coefs coefs{};
  __builtin_memcpy(&coefs, rounded, sizeof coefs);
  return coefs;
}

// One rounding, here and nowhere else.
template <class S>
HD void round_coefficients(const double* given, std::size_t count, S* rounded) {
  for (std::size_t k = 0; k < count; ++k) rounded[k] = static_cast<S>(given[k]);
}

template <class D, bool whole, class V, class Random, class Lanes>
HD V load_gradient(const Streams& streams, const Random& random, std::size_t i,
                   const Surroundings<typename V::Scalar>& around, Lanes lanes) {
  const std::byte* const grad = streams.data[kGrad];
  V g = V(0);
  if (!whole || grad != nullptr) {
    g = lanes.template load<D, V>(grad + i * kItem<D>);
    if (around.has_scale) g = V(around.scale) * g;
  }
  if constexpr (whole) {
    if (const std::byte* const sum = streams.data[kAccumulator]; sum != nullptr) {
      using C = std::conditional_t<std::is_same_v<typename V::Scalar, float>, Float32, Float64>;
      const V a = lanes.template load<C, V>(sum + i * kItem<C>);
      g = grad != nullptr ? a + g : a;
      if (around.has_total) g = V(around.total) * g;
    }
    if (around.has_clip_value) g = min(V(around.clip_value), max(V(-around.clip_value), g));  // NaN survives
    if (around.has_noise && random.has_noise()) g = g + V(around.noise) * random.template noise<V>(i, lanes);
  }
  return g;
}

// One vector of elements, from i on: `whole` if more is asked for than the update itself.
template <class Rule, class St, bool whole, class V, class Random, class Lanes>
HD void step(std::size_t i, const Streams& streams, const typename Rule::template Coefs<typename V::Scalar>& coefs,
             const Surroundings<typename V::Scalar>& around, const Random& random, DType mirror, Lanes lanes) {
  using P = typename St::Param;
  using S = typename St::State;
  V p = whole ? load_param<P, V>(streams, i, lanes) : lanes.template load<P, V>(streams.data[kParam] + i * kItem<P>);
  V g = load_gradient<typename St::Grad, whole, V>(streams, random, i, around, lanes);
  V s[Rule::slots.count + 1] = {};  // one more than needed: no array is empty
  for (std::size_t k = 0; k != Rule::slots.count; ++k) {
    s[k] = lanes.template load<S, V>(streams.data[kFirstSlot + k] + i * kItem<S>);
  }

  if (around.has_l1) g = g + V(around.l1) * sign(p);
  if (around.has_l2) g = g + V(around.l2) * p;

  const V u = Rule::step(g, s, coefs);

  if (around.has_decay) p = V(around.decay) * p;
  p = p - u;

  if constexpr (whole) {
    p = store_param<P>(p, streams, random, i, kParamRole, lanes);
  } else {
    lanes.template store_nearest<P>(p, streams.data[kParam] + i * kItem<P>);
  }
  for (std::size_t k = 0; k != Rule::slots.count; ++k) {
    std::byte* const to = streams.data[kFirstSlot + k] + i * kItem<S>;
    if (whole && random.rounds()) {
      lanes.template store<S>(rounded<S>(s[k], random, i, kFirstSlotRole + k), to);
    } else {
      lanes.template store_nearest<S>(s[k], to);
    }
  }
  if constexpr (whole) {
    pass_on<P>(p, streams, random, mirror, i, around, lanes);
    if (around.zero_grads) {
      using G = typename St::Grad;
      if (std::byte* const grad = streams.data[kGrad]; grad != nullptr) {
        lanes.template store<G>(V(0), grad + i * kItem<G>);
      }
    }
  }
}

}  // namespace
}  // namespace onepass
