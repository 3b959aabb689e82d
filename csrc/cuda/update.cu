// The update kernel, for every rule and storage. Compiled in parts: CMake names the part (ONEPASS_PART).
#include "cuda/update.h"

#include <tuple>
#include <utility>

#include "core/step.h"
#include "cuda/elementwise.h"
#include "rules/rules.h"

namespace onepass::cuda {
namespace {

// Elements of a vector: 16 bytes of the narrowest array.
template <class St>
constexpr unsigned kVectorLanes =
    16 / std::min({kItem<typename St::Param>, kItem<typename St::Grad>, kItem<typename St::State>});

template <class Rule, class St, bool whole>
struct Update {
  using Scalar = typename St::Compute;
  using TableType = std::conditional_t<whole, WholeTable<Scalar>, PlainTable<Scalar>>;
  using EntryType = std::remove_reference_t<decltype(TableType::entries[0])>;
  static constexpr unsigned lanes = kVectorLanes<St>;
  static constexpr bool has_random = whole;
  static constexpr unsigned blocks = whole ? 1 : sizeof(Scalar) == sizeof(double) ? 2 : 3;

  Streams streams;
  typename Rule::template Coefs<Scalar> coefs;
  Surroundings<Scalar> around;
  DType mirror;
  RandomKey key;
  bool rounds, noisy, needed, skipped;

  HD Update(const TableType& table, const EntryType& entry) {
    const Setting<Scalar>& setting = setting_of(table, entry);
    streams = streams_of(entry);
    coefs = as_coefficients<Rule>(setting.coefficients);
    around = setting.around;
    const double clip = table.clips != nullptr ? table.clips[entry.position] : 1.0;
    around.set_scale(setting.scaling, clip, whole && streams.data[kAccumulator] != nullptr);
    mirror = entry.mirror;
    key = key_of(table, entry, setting.t);
    rounds = entry.rounds;
    noisy = around.has_noise && (streams.data[kGrad] != nullptr || streams.data[kAccumulator] != nullptr);
    skipped = is_skipped(table);
    needed = !setting.left_out && (!skipped || (whole && around.zero_grads && streams.data[kGrad] != nullptr));
  }

  template <class V, class Random>
  HD void run(std::uint64_t i, const Random& random) const {
    if constexpr (whole) {
      if (skipped) {  // gradients are zeroed all the same
        using G = typename St::Grad;
        V(0).template store<G>(streams.data[kGrad] + i * kItem<G>);
        return;
      }
    }
    step<Rule, St, whole, V>(i, streams, coefs, around, random, mirror, AllLanes{});
  }
};

template <class Rule, class St>
constexpr UpdateKernels kernels_of() {
  UpdateKernels kernels{};
  kernels.lanes = kVectorLanes<St>;
  if constexpr (std::is_same_v<typename St::Compute, float>) {
    kernels.plain_float = for_elements<Update<Rule, St, false>, PlainTable<float>>;
    kernels.whole_float = for_elements<Update<Rule, St, true>, WholeTable<float>>;
  } else {
    kernels.plain_double = for_elements<Update<Rule, St, false>, PlainTable<double>>;
    kernels.whole_double = for_elements<Update<Rule, St, true>, WholeTable<double>>;
  }
  return kernels;
}

template <class... Sts, class Rule>
constexpr RuleKernels row(TypeList<Sts...> /*storages*/, const Rule* /*rule*/) {
  return {Rule::name, {kernels_of<Rule, Sts>()...}};
}

// Yardsticks are the CPU's alone: what a device can do is shown by a copy.
template <class... Rs>
std::tuple<Rs*...> all_rules(TypeList<Rs...>);
using AllRules = decltype(all_rules(Rules{}));

constexpr std::size_t kRows = (std::tuple_size_v<AllRules> + kUpdateParts - 1 - ONEPASS_PART) / kUpdateParts;

template <std::size_t... k>
std::span<const RuleKernels> rows_of(std::index_sequence<k...> /*rows*/) {
  static const RuleKernels rows[] = {
      row(Storages{}, std::tuple_element_t<k * kUpdateParts + ONEPASS_PART, AllRules>{})...};
  return rows;
}

}  // namespace

#define ONEPASS_JOIN_(a, b) a##b
#define ONEPASS_JOIN(a, b) ONEPASS_JOIN_(a, b)
extern const std::span<const RuleKernels> ONEPASS_JOIN(update_part_,
                                                       ONEPASS_PART) = rows_of(std::make_index_sequence<kRows>{});

}  // namespace onepass::cuda
