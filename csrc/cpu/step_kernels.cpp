// What surrounds the update without knowing a rule: norms, sums of gradients, the end of a step that had to wait for a
// norm, noise. Compiled once per instruction set like kernels.cpp; the one symbol that leaves this unit is its
// table.
#include ONEPASS_SIMD_HEADER

#include "core/kernel.h"
#include "core/normal.h"
#include "core/philox.h"
#include "cpu/elements.h"
#include "cpu/random.h"

namespace onepass {
namespace {

// --- Norms -----------------------------------------------------------------------------------------------------------

using Double = Wide<double>;

constexpr std::size_t kLanes = 16;  // of a sum, on every instruction set
constexpr std::size_t kVectors = kLanes / Double::lanes;

template <class D>
Squares squares(const std::byte* values, std::size_t count) {
  Double sums[kVectors];
  Double differences[kVectors];  // x - x: 0, or NaN where x is not finite
  for (std::size_t k = 0; k < kVectors; ++k) sums[k] = differences[k] = Double(0);
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t k = 0; k < kVectors; ++k) {
      const Double x = Double::template load<D>(values + (i + k * Double::lanes) * kItem<D>);
      sums[k] = sums[k] + x * x;
      differences[k] = differences[k] + (x - x);
    }
  }
  for (std::size_t k = 0; k < kVectors && i < count; ++k) {
    const std::size_t left = count - i < Double::lanes ? count - i : Double::lanes;
    const std::byte* const from = values + i * kItem<D>;
    const Double x = left < Double::lanes ? Double::template load_part<D>(from, left) : Double::template load<D>(from);
    sums[k] = sums[k] + x * x;
    differences[k] = differences[k] + (x - x);
    i += left;
  }
  double lanes[2][kLanes];
  for (std::size_t k = 0; k < kVectors; ++k) {
    sums[k].template store<Float64>(reinterpret_cast<std::byte*>(lanes[0] + k * Double::lanes));
    differences[k].template store<Float64>(reinterpret_cast<std::byte*>(lanes[1] + k * Double::lanes));
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t l = 0; l < half; ++l) {
      lanes[0][l] = lanes[0][l] + lanes[0][l + half];
      lanes[1][l] = lanes[1][l] + lanes[1][l + half];
    }
  }
  return {lanes[0][0], lanes[1][0] == 0.0};
}

template <class D>
void add_squares(const std::byte* values, std::size_t count, double* sums) {
  for_each_vector<Double>(sums, sizeof(double), count, [=](std::size_t i, auto lanes) __attribute__((always_inline)) {
    auto* const to = reinterpret_cast<std::byte*>(sums + i);
    const Double x = lanes.template load<D, Double>(values + i * kItem<D>);
    lanes.template store<Float64>(lanes.template load<Float64, Double>(to) + x * x, to);
  });
}

// --- Sums of gradients, and split numbers ----------------------------------------------------------------------------

template <class D>
void accumulate(const std::byte* values, std::size_t count, double scale, const std::byte* from, std::byte* to) {
  using C = ComputeType<D>;
  using V = Wide<typename C::Storage>;
  const auto factor = static_cast<typename C::Storage>(scale);
  // The first gradient of a sum is multiplied by 1 too: a copy would keep its subnormals.
  const bool has_scale = !(factor == 1) || from == nullptr;
  for_each_vector<V>(to, kItem<C>, count, [=](std::size_t i, auto lanes) __attribute__((always_inline)) {
    V g = lanes.template load<D, V>(values + i * kItem<D>);
    if (has_scale) g = V(factor) * g;
    if (from != nullptr) g = lanes.template load<C, V>(from + i * kItem<C>) + g;
    lanes.template store<C>(g, to + i * kItem<C>);
  });
}

void join(const std::byte* high, const std::byte* low, std::size_t count, float* values) {
  using V = Wide<float>;
  for_each_vector<V>(values, sizeof(float), count, [=](std::size_t i, auto lanes) __attribute__((always_inline)) {
    const V value = lanes.template join<V>(high + 2 * i, low + 2 * i);
    lanes.template store<Float32>(value, reinterpret_cast<std::byte*>(values + i));
  });
}

// --- The end of a step -----------------------------------------------------------------------------------------------

template <class D>
Isa finish(const Part& part, const std::byte* factors) {
  using C = ComputeType<D>;
  using V = Wide<typename C::Storage>;
  const Streams streams = part.streams;
  const bool rounds = kItem<D> < kItem<C> && part.streams.data[kRemainder] == nullptr;
  RoundingNumbers numbers(part, rounds);
  const Made random = numbers.made();
  const DType mirror = part.mirror;
  const auto around = surroundings_of<typename C::Storage>(part);
  for_each_vector<V>(streams.data[kParam], kItem<D>, part.count, numbers,
                     [=](std::size_t i, auto lanes) __attribute__((always_inline)) {
                       V p = lanes.template load<C, V>(factors + i * kItem<C>) * load_param<D, V>(streams, i, lanes);
                       p = store_param<D>(p, streams, random, i, kScaledRole, lanes);
                       pass_on<D>(p, streams, random, mirror, i, around, lanes);
                     });
  return kIsa;
}

template <class D>
void show(const Part& part) {
  using V = Wide<typename ComputeType<D>::Storage>;
  const Streams streams = part.streams;
  const DType mirror = part.mirror;
  // Arithmetic makes every NaN quiet and subnormals zero, if the compiler does not know that it is a 1.
  const volatile typename ComputeType<D>::Storage unknown = 1;
  const typename ComputeType<D>::Storage one = unknown;
  for_each_vector<V>(streams.data[kParam], kItem<D>, part.count,
                     [=](std::size_t i, auto lanes) __attribute__((always_inline)) {
                       const V p = V(one) * load_param<D, V>(streams, i, lanes);
                       store_mirror(p, streams.data[kMirror], mirror, i, lanes);
                     });
}

// --- Noise -----------------------------------------------------------------------------------------------------------

void normals(const RandomKey& key, std::size_t begin, std::size_t count, float* values) {
  const PhiloxKeys keys(key.seed);
  constexpr std::size_t of_group = 4 * kCounters;
  constexpr std::size_t groups = kRandomGroup / of_group;
  for (std::size_t i = 0; i < count; i += kRandomGroup) {
    for_each_counter<groups>(key, keys, (begin + i) / of_group,
                             [=](std::size_t group, std::size_t lane, Integers a, Integers b, Integers c,
                                 Integers d) __attribute__((always_inline)) {
                               float* const to = values + i + group * of_group + lane;
                               const auto put = [&](Floats value, std::size_t which) __attribute__((always_inline)) {
                                 value.template store<Float32>(reinterpret_cast<std::byte*>(to + which * kCounters));
                               };
                               const auto one = normal_pair<Floats>(a, b);
                               const auto two = normal_pair<Floats>(c, d);
                               put(one.first, 0);
                               put(one.second, 1);
                               put(two.first, 2);
                               put(two.second, 3);
                             });
  }
}

// --- The table -------------------------------------------------------------------------------------------------------

template <class... Ds>
constexpr StepKernels table_of(TypeList<Ds...> /*dtypes*/) noexcept {
  return {{{squares<Ds>, add_squares<Ds>, accumulate<Ds>, finish<Ds>, show<Ds>}...}, join, normals};
}

}  // namespace

#define ONEPASS_JOIN_(a, b) a##b
#define ONEPASS_JOIN(a, b) ONEPASS_JOIN_(a, b)

extern const StepKernels ONEPASS_JOIN(step_kernels_, ONEPASS_ISA);
const StepKernels ONEPASS_JOIN(step_kernels_, ONEPASS_ISA) = table_of(DTypes{});

}  // namespace onepass
