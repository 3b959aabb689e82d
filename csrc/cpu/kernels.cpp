// The update loop, for every rule and dtype, compiled once per instruction set: CMake names the instruction set
// (ONEPASS_ISA) and its header (ONEPASS_SIMD_HEADER). The one symbol that leaves this unit is its kernel table.
#include ONEPASS_SIMD_HEADER

#include <cfloat>

#include "core/kernel.h"
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

template <class S>
struct Surroundings {
  S scale, l1, l2, decay;
  bool has_scale, has_l1, has_l2, has_decay;

  // Judged after rounding: a term that is neutral in the compute type is left out, never multiplied (0 * inf is NaN).
  HD explicit Surroundings(const Around& around)
      : scale(static_cast<S>(around.scale)),
        l1(static_cast<S>(around.l1)),
        l2(static_cast<S>(around.l2)),
        decay(static_cast<S>(around.decay)),
        has_scale(scale != S(1)),
        has_l1(l1 != S(0)),
        has_l2(l2 != S(0)),
        has_decay(decay != S(1)) {}
};

// How many elements to take one by one so that wide stores do not straddle cache lines. Large NumPy arrays start 16
// bytes behind a line; aligned, AVX-512 takes 12 % less for Adam over 4000 floats, 30 % less for SGD.
HD std::size_t head_of(const void* param, std::size_t count, std::size_t itemsize, std::size_t alignment) {
  constexpr std::size_t worth_it = 1024;
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(param) % alignment;
  if (count < worth_it || misaligned % itemsize != 0) return 0;
  return (alignment - misaligned) % alignment / itemsize;
}

template <class Rule, class D, class V>
HD std::size_t sweep(std::size_t begin, std::size_t count, std::byte* param, const std::byte* grad,
                     std::byte* const* slots, const typename Rule::template Coefs<typename V::Scalar> coefs,
                     const Surroundings<typename V::Scalar> around) {
  constexpr std::size_t size = sizeof(typename D::Storage);
  std::size_t i = begin;
  for (; i + V::lanes <= count; i += V::lanes) {
    V p = V::template load<D>(param + i * size);
    V g = V::template load<D>(grad + i * size);
    V s[Rule::slots.count + 1] = {};  // one more than needed: no array is empty
    for (std::size_t k = 0; k < Rule::slots.count; ++k) s[k] = V::template load<D>(slots[k] + i * size);

    if (around.has_scale) g = V(around.scale) * g;
    if (around.has_l1) g = g + V(around.l1) * sign(p);
    if (around.has_l2) g = g + V(around.l2) * p;

    const V u = Rule::step(g, s, coefs);

    if (around.has_decay) p = V(around.decay) * p;
    p = p - u;

    p.template store<D>(param + i * size);
    for (std::size_t k = 0; k < Rule::slots.count; ++k) s[k].template store<D>(slots[k] + i * size);
  }
  return i;
}

template <class Rule, class D>
Isa update(const Streams& streams, std::size_t count, const double* coefficients, const Around& around) {
  using S = typename D::Compute;
  auto* const param = static_cast<std::byte*>(streams.param);
  const auto* const grad = static_cast<const std::byte*>(streams.grad);
  std::byte* slots[kMaxSlots] = {};  // NOLINT(misc-const-correctness): what they point to is written
  for (std::size_t k = 0; k < Rule::slots.count; ++k) slots[k] = static_cast<std::byte*>(streams.slots[k]);
  const auto coefs = round_coefficients<Rule, S>(coefficients);
  const Surroundings<S> surroundings(around);

  // One lane up to where the parameter is aligned, wide from there on, one lane for the rest.
  const std::size_t head = head_of(streams.param, count, sizeof(typename D::Storage), sizeof(Wide<S>));
  std::size_t done = sweep<Rule, D, OneLane<S>>(0, head, param, grad, slots, coefs, surroundings);
  done = sweep<Rule, D, Wide<S>>(done, count, param, grad, slots, coefs, surroundings);
  sweep<Rule, D, OneLane<S>>(done, count, param, grad, slots, coefs, surroundings);
  return kIsa;
}

template <class Rule, class... Ds>
constexpr Kernel row(bool yardstick, TypeList<Ds...> /*dtypes*/) {
  return {Rule::name, Rule::slots, Rule::coefficients, yardstick, {update<Rule, Ds>...}};
}

template <class Rules, class Yardsticks>
struct Table;

template <class... Rules, class... Yardsticks>
struct Table<TypeList<Rules...>, TypeList<Yardsticks...>> {
  static constexpr Kernel rows[] = {row<Rules>(false, DTypes{})..., row<Yardsticks>(true, DTypes{})...};
};

using AllRows = Table<Rules, Yardsticks>;

}  // namespace

#define ONEPASS_JOIN_(a, b) a##b
#define ONEPASS_JOIN(a, b) ONEPASS_JOIN_(a, b)

namespace batchnorm {
extern const Table ONEPASS_JOIN(kernels_, ONEPASS_ISA);  // batchnorm_kernels.cpp
}

extern const KernelTable ONEPASS_JOIN(kernels_, ONEPASS_ISA);
const KernelTable ONEPASS_JOIN(kernels_, ONEPASS_ISA) = {kIsa, AllRows::rows,
                                                         sizeof AllRows::rows / sizeof AllRows::rows[0],
                                                         &batchnorm::ONEPASS_JOIN(kernels_, ONEPASS_ISA)};

}  // namespace onepass
