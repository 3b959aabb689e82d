// The triad, and arithmetic without memory, over the value types in which the rules are written. Compiled once per
// instruction set, like kernels.cpp and with its flags; the one symbol that leaves this unit is its table.
#include "roofline_kernels.h"

#include ONEPASS_SIMD_HEADER

#include <utility>

#include "core/dtype.h"
#include "core/target.h"

namespace onepass::roofline {
namespace {

using V = Wide<float>;

// A multiplication and an addition take 8 cycles one after the other, and two can begin in each cycle: 8 chains that do
// not depend on each other would do. AVX2 has registers for 12 of them and two constants.
constexpr std::size_t kChains = 12;

void triad(float* to, const float* times, float scale, std::size_t count) {
  const auto bytes = [](const float* values, std::size_t i) { return reinterpret_cast<const std::byte*>(values + i); };
  std::size_t i = 0;
#pragma GCC unroll 4
  for (; i + V::lanes <= count; i += V::lanes) {
    const V sum = V::load<Float32>(bytes(to, i)) + V(scale) * V::load<Float32>(bytes(times, i));
    sum.store<Float32>(reinterpret_cast<std::byte*>(to + i));
  }
  for (; i < count; ++i) to[i] += scale * times[i];
}

template <class Step, std::size_t... k>
HD float run_chains(std::size_t rounds, Step step, std::index_sequence<k...> /*chains*/) {
  V x[] = {V(1.0F + static_cast<float>(k) * 0.125F)...};
  for (std::size_t round = 0; round < rounds; ++round) ((x[k] = step(x[k])), ...);
  V sum = V(0.0F);
  ((sum = sum + x[k]), ...);
  float lanes[V::lanes];
  sum.template store<Float32>(reinterpret_cast<std::byte*>(lanes));
  return lanes[0];
}

float multiply_add(std::size_t rounds) {
  return run_chains(
      rounds, [](V x) __attribute__((always_inline)) { return V(0.5F) * x + V(0.7F); },
      std::make_index_sequence<kChains>());
}

float divide_root(std::size_t rounds) {
  return run_chains(
      rounds, [](V x) __attribute__((always_inline)) { return V(1.7F) / (sqrt(x) + V(0.8F)); },
      std::make_index_sequence<kChains>());
}

}  // namespace

#define ONEPASS_JOIN_(a, b) a##b
#define ONEPASS_JOIN(a, b) ONEPASS_JOIN_(a, b)

extern const Kernels ONEPASS_JOIN(kernels_, ONEPASS_ISA);
const Kernels ONEPASS_JOIN(kernels_, ONEPASS_ISA) = {kIsa, kChains * V::lanes, triad, multiply_add, divide_root};

}  // namespace onepass::roofline
