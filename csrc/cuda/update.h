// The update kernels of the registry, by rule and storage. Plain C++.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include "core/dtype.h"
#include "cuda/tables.h"

namespace onepass::cuda {

using PlainFloat = void (*)(PlainTable<float>);
using PlainDouble = void (*)(PlainTable<double>);
using WholeFloat = void (*)(WholeTable<float>);
using WholeDouble = void (*)(WholeTable<double>);

// The kernels of one storage: those of its compute type are there, the others are null.
struct UpdateKernels {
  PlainFloat plain_float;
  PlainDouble plain_double;
  WholeFloat whole_float;
  WholeDouble whole_double;
  unsigned lanes;  // of a vector
};

struct RuleKernels {
  const char* rule;
  UpdateKernels storages[Storages::size];
};

// Rules are compiled in parts, rule k in part k % kUpdateParts, so that a build has something to do in parallel.
inline constexpr std::size_t kUpdateParts = 4;
extern const std::span<const RuleKernels> update_part_0, update_part_1, update_part_2, update_part_3;

}  // namespace onepass::cuda
