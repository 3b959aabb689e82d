// The update loop, for every rule and dtype, compiled once per instruction set: CMake names the instruction set
// (ONEPASS_ISA) and its header (ONEPASS_SIMD_HEADER). The one symbol that leaves this unit is its kernel table.
#include ONEPASS_SIMD_HEADER

#include <cfloat>

#include "core/kernel.h"
#include "core/step.h"
#include "cpu/elements.h"
#include "cpu/random.h"
#include "rules/rules.h"

#if defined(__FAST_MATH__)
#error "fast-math computes other bits"
#endif
static_assert(FLT_EVAL_METHOD == 0, "intermediate results must be of their operands' type (i686: -msse2 -mfpmath=sse)");

namespace onepass {
namespace {

// How far ahead arrays are fetched, in bytes. Processors do that themselves, but not for all loops alike: where they
// see as many streams, it depends on the addresses of the loads. (Adam with decay, 64 MB arrays: 10.6 ms and not 14.5,
// one thread; 64M elements on two: 35 ms and not 38. In a cache it costs 2 to 5 %.) What lies behind an array's end is
// not read, only looked for. With one lane it would keep the compiler from taking several.
constexpr std::size_t kAhead = 1024;

template <class D>
HD void fetch(const std::byte* array, std::size_t i) {  // as a number: there may be no array, and it ends somewhere
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(array) + i * kItem<D> + kAhead));
}

template <class Rule, class St>
HD void fetch(const Streams& streams, std::size_t i) {
  fetch<typename St::Param>(streams.data[kParam], i);
  fetch<typename St::Grad>(streams.data[kGrad], i);
  for (std::size_t k = 0; k != Rule::slots.count; ++k) fetch<typename St::State>(streams.data[kFirstSlot + k], i);
}

// What is done to a vector of elements, as for_each_vector() calls it. It holds values, so that they can be in
// registers: a reference might lead to what is stored.
template <class Rule, class St, bool whole, class S, class Random>
HD auto step_of(const Streams& streams, const typename Rule::template Coefs<S>& coefs, const Surroundings<S>& around,
                const Random& random, DType mirror) {
  return [=](std::size_t i, auto lanes) __attribute__((always_inline)) {
    if constexpr (Wide<S>::lanes > 1) fetch<Rule, St>(streams, i);
    step<Rule, St, whole, Wide<S>>(i, streams, coefs, around, random, mirror, lanes);
  };
}

template <class St>
constexpr bool kIsNarrow = kItem<typename St::Param> < sizeof(typename St::Compute) ||
                           kItem<typename St::State> < sizeof(typename St::Compute);

// Whether nothing is asked for but the update itself, rounded by chance.
template <class S>
HD bool rounds_alone(const Part& part, const Surroundings<S>& around) {
  for (const std::size_t stream : kBesidesUpdate) {
    if (part.streams.data[stream] != nullptr) return false;
  }
  return part.random.rounding != nullptr && part.random.noise == nullptr && around.has_none() &&
         !around.has_clip_value && !around.zero_grads;
}

// Where nothing is around the update, it is a loop of its own, without the branches: compilers take them out of small
// loops only. (Adam, AVX2, before arrays were fetched: 3.6 instructions for a parameter and not 6.0; 13 to 20 % less
// time in a cache. 7.5 and not 42 in scalar code, which is vectorized then. Twelve percent more code.)
template <class Rule, class St, bool whole>
Isa update(const Part& part) {
  using S = typename St::Compute;
  S rounded[kMaxCoefficients] = {};
  round_coefficients(part.coefficients, Rule::coefficients.count, rounded);
  const auto coefs = as_coefficients<Rule>(rounded);
  const auto around = surroundings_of<S>(part);
  const auto none = Surroundings<S>::none();
  const Streams& streams = part.streams;
  constexpr std::size_t item = kItem<typename St::Param>;
  if constexpr (!whole) {
    const auto run = [&](const Surroundings<S>& known) __attribute__((always_inline)) {
      for_each_vector<Wide<S>>(streams.data[kParam], item, part.count,
                               step_of<Rule, St, whole, S>(streams, coefs, known, Made{}, part.mirror));
    };
    if (around.has_none()) {
      run(none);
    } else {
      run(around);
    }
  } else {
    RoundingNumbers numbers(part, kIsNarrow<St>);
    const auto run = [&](const Streams& used, const Surroundings<S>& known,
                         const auto& random) __attribute__((always_inline)) {
      for_each_vector<Wide<S>>(streams.data[kParam], item, part.count, numbers,
                               step_of<Rule, St, whole, S>(used, coefs, known, random, part.mirror));
    };
    if constexpr (kIsNarrow<St>) {
      if (rounds_alone(part, around)) {
        Streams own = streams;  // one by one: what a loop leaves behind is not known to the compiler
        own.data[kEma] = own.data[kMirror] = own.data[kRemainder] = own.data[kAccumulator] = nullptr;
        run(own, none, MadeForRounding{numbers.made()});
        return kIsa;
      }
    }
    run(streams, around, numbers.made());
  }
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
