// The update loop, for every rule and dtype, compiled once per instruction set: CMake names the instruction set
// (ONEPASS_ISA) and its header (ONEPASS_SIMD_HEADER). The one symbol that leaves this unit is its kernel table.
#include ONEPASS_SIMD_HEADER

#include <cfloat>

#include "core/kernel.h"
#include "cpu/elements.h"
#include "rules/rules.h"

#if defined(__FAST_MATH__)
#error "fast-math computes other bits"
#endif
static_assert(FLT_EVAL_METHOD == 0, "intermediate results must be of their operands' type (i686: -msse2 -mfpmath=sse)");

namespace onepass {
namespace {

// Coefficients in the compute type: one rounding, here and nowhere else.
template <class Rule, class S>
typename Rule::template Coefs<S> round_coefficients(const double* given) {
  using Coefs = typename Rule::template Coefs<S>;
  static_assert(sizeof(Coefs) == Rule::coefficients.count * sizeof(S),
                "a coefficient without a name, or a name too many");
  constexpr std::size_t count = Rule::coefficients.count;
  S rounded[count] = {};
  for (std::size_t k = 0; k < count; ++k) {
    rounded[k] = static_cast<S>(given[k]);
  }
  Coefs coefs{};
  __builtin_memcpy(&coefs, rounded, sizeof coefs);
  return coefs;
}

template <class D, bool whole, class V, class Lanes>
HD V load_gradient(const Streams& streams, const Randomness& random, std::size_t i,
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
    if (around.has_noise) {
      g = g + V(around.noise) * lanes.template load<Float32, V>(reinterpret_cast<const std::byte*>(random.noise + i));
    }
  }
  return g;
}

// One vector of elements: `whole` if more is asked for than the update itself.
template <class Rule, class St, bool whole, class V, class Lanes>
HD void step(std::size_t i, const Streams& streams, const typename Rule::template Coefs<typename V::Scalar>& coefs,
             const Surroundings<typename V::Scalar>& around, const Randomness& random, DType mirror, Lanes lanes) {
  using P = typename St::Param;
  using S = typename St::State;
  V p = whole ? load_param<P, V>(streams, i, lanes) : lanes.template load<P, V>(streams.data[kParam] + i * kItem<P>);
  V g = load_gradient<typename St::Grad, whole, V>(streams, random, i, around, lanes);
  V s[Rule::slots.count + 1] = {};  // one more than needed: no array is empty
  for (std::size_t k = 0; k < Rule::slots.count; ++k) {
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
  for (std::size_t k = 0; k < Rule::slots.count; ++k) {
    std::byte* const to = streams.data[kFirstSlot + k] + i * kItem<S>;
    if (whole && random.rounding != nullptr) {
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

template <class Rule, class St, bool whole>
Isa update(const Part& part) {
  using S = typename St::Compute;
  const Streams streams = part.streams;
  const Randomness random = part.random;
  const DType mirror = part.mirror;
  const auto coefs = round_coefficients<Rule, S>(part.coefficients);
  const Surroundings<S> around(part);
  for_each_vector<Wide<S>>(streams.data[kParam], kItem<typename St::Param>, part.count,
                           [=](std::size_t i, auto lanes) __attribute__((always_inline)) {
                             step<Rule, St, whole, Wide<S>>(i, streams, coefs, around, random, mirror, lanes);
                           });
  return kIsa;
}

template <class Rule, class... Sts>
constexpr Kernel row(bool yardstick, TypeList<Sts...> /*storages*/) {
  return {Rule::name,
          Rule::slots,
          Rule::coefficients,
          yardstick,
          {update<Rule, Sts, false>...},
          {update<Rule, Sts, true>...}};
}

template <class Rules, class Yardsticks>
struct Table;

#if defined(__clang_analyzer__)
using CompiledStorages = TypeList<Storage<BFloat16, BFloat16, BFloat16>, Storage<Float64, Float64, Float64>>;
#else
using CompiledStorages = Storages;
#endif

template <class... Rules, class... Yardsticks>
struct Table<TypeList<Rules...>, TypeList<Yardsticks...>> {
  static constexpr Kernel rows[] = {row<Rules>(false, CompiledStorages{})...,
                                    row<Yardsticks>(true, CompiledStorages{})...};
};

#if defined(__clang_analyzer__)
// Every rule and dtype is the same code. Static analysis of a few says what there is to say, in seconds for minutes.
using AllRows = Table<TypeList<AmsGrad>, TypeList<>>;
#else
using AllRows = Table<Rules, Yardsticks>;
#endif

}  // namespace

#define ONEPASS_JOIN_(a, b) a##b
#define ONEPASS_JOIN(a, b) ONEPASS_JOIN_(a, b)

namespace batchnorm {
extern const Table ONEPASS_JOIN(kernels_, ONEPASS_ISA);  // batchnorm_kernels.cpp
}

extern const StepKernels ONEPASS_JOIN(step_kernels_, ONEPASS_ISA);  // step_kernels.cpp

extern const KernelTable ONEPASS_JOIN(kernels_, ONEPASS_ISA);
const KernelTable ONEPASS_JOIN(kernels_, ONEPASS_ISA) = {
    kIsa, AllRows::rows, sizeof AllRows::rows / sizeof AllRows::rows[0], &ONEPASS_JOIN(step_kernels_, ONEPASS_ISA),
    &batchnorm::ONEPASS_JOIN(kernels_, ONEPASS_ISA)};

}  // namespace onepass
