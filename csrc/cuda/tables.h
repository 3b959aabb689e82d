// What a launch is given: a table of tensors, by value, in the kernel's parameters.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/elements.h"
#include "core/kernel.h"
#include "core/sums.h"
#include "cuda/backend.h"
#include "cuda/partition.h"

namespace onepass::cuda {

inline constexpr std::size_t kParameterBytes = 32764;  // that a launch may pass

// What surrounds the elements of some tensors: coefficients and the rest in the compute type.
template <class S>
struct Setting {
  S coefficients[kMaxCoefficients];
  Surroundings<S> around;
  Scaling scaling;
  std::uint64_t t;
  bool left_out;  // more steps than were prepared for: nothing is updated
};

// What a judgement leaves on the device.
struct Verdict {
  double norm;
  std::uint32_t skip;
};

// A tensor of a launch. `Streams` is as many pointers as it needs.
template <std::size_t streams>
struct Entry {
  std::byte* data[streams];
  std::uint64_t count;
  std::uint32_t first_block;
  std::uint32_t position;  // in the step: of the clip factor
  std::uint32_t index;     // of the parameter: of its random numbers
  std::uint8_t setting;
  std::uint8_t head;  // partition.h
  DType mirror;
  bool rounds;  // by chance
};

inline constexpr std::size_t kPlainStreams = kFirstSlot + kMaxSlots;
inline constexpr std::size_t kSettings = 6;

template <class S, std::size_t streams>
struct Table {
  std::uint32_t tensors;
  std::uint32_t blocks;
  std::uint64_t seed;
  std::uint64_t first;          // the element of its tensor at which the only entry begins; a multiple of a group
  const Verdict* verdict;       // null: nothing was judged
  const double* clips;          // of each position; null: 1
  const Setting<S>* on_device;  // null: `settings`
  Setting<S> settings[kSettings];
  static constexpr std::size_t capacity =
      (kParameterBytes - 48 - kSettings * sizeof(Setting<S>)) / sizeof(Entry<streams>);
  Entry<streams> entries[capacity];
};

// Where a table of one tensor has the units of its parameter.
struct UnitParams {
  std::uint64_t outer, depth, units, run;
  double limit;
  double* sums;  // of each outer part's units
};
template <class TableType>
HD const UnitParams& units_of(const TableType& table) {
  static_assert(sizeof(UnitParams) <= sizeof(table.entries[1]));
  return *reinterpret_cast<const UnitParams*>(&table.entries[1]);
}

template <class S>
using PlainTable = Table<S, kPlainStreams>;
template <class S>
using WholeTable = Table<S, kStreams>;
static_assert(sizeof(PlainTable<float>) <= kParameterBytes && sizeof(PlainTable<double>) <= kParameterBytes);
static_assert(sizeof(WholeTable<float>) <= kParameterBytes && sizeof(WholeTable<double>) <= kParameterBytes);

// --- Norms -----------------------------------------------------------------------------------------------------------

// Of a block of kSquaresBlock elements, or of a tensor.
struct DeviceSquares {
  double sum;
  std::uint64_t bad;  // not zero: something is not finite
};

struct MeasuredEntry {
  const std::byte* grad;         // null: the accumulator alone
  const std::byte* accumulator;  // null: the gradient alone
  std::uint64_t count;
  std::uint32_t first_block;
  bool sum_starts;           // the accumulator has yet to be written
  std::uint64_t first_part;  // in `parts`
};

inline constexpr unsigned kPartsOfBlock = kThreads / kGroupLanes;

struct MeasureTable {
  std::uint32_t tensors;
  std::uint32_t blocks;
  double scale;  // of gradients that are added to a sum
  DeviceSquares* parts;
  static constexpr std::size_t capacity = (kParameterBytes - 24) / sizeof(MeasuredEntry);
  MeasuredEntry entries[capacity];
};
static_assert(sizeof(MeasureTable) <= kParameterBytes);

struct SummedEntry {
  std::uint64_t first_part;
  std::uint64_t parts;
  std::uint64_t position;
};

struct SumTable {
  std::uint32_t tensors;
  const DeviceSquares* parts;
  DeviceSquares* sums;
  static constexpr std::size_t capacity = (kParameterBytes - 24) / sizeof(SummedEntry);
  SummedEntry entries[capacity];
};
static_assert(sizeof(SumTable) <= kParameterBytes);

struct JudgeParams {
  const DeviceSquares* sums;
  std::uint32_t tensors;
  double max_grad_norm;  // negative: none
  double clip_norm;      // negative: none
  Scaling scaling;
  bool summed;
  bool skips;
  Verdict* verdict;
  double* clips;
  double* grad_norm;        // null: not wanted
  std::int64_t* skipped;    // a count; null: not wanted
  bool* skipped_now;        // null: not wanted
  std::uint64_t* feedback;  // on the host: the number of this call, and 32 bits of the count; null: not wanted
  std::uint64_t call;
};

struct SettleParams {
  const Verdict* verdict;  // null: nothing was judged
  std::int64_t* clock;     // the count, and how many steps were left out
  const Row* rows;         // null: those below
  std::int64_t first, count;
  Around around;  // of all rows
  Setting<float>* as_float;
  Setting<double>* as_double;
  Row given[kMostRows];
};
static_assert(sizeof(SettleParams) <= kParameterBytes);

// --- Other kernels ---------------------------------------------------------------------------------------------------

struct CopyParams {
  std::byte* strided;
  std::byte* contiguous;
  std::uint64_t first;  // of the walk
  std::uint64_t count;
  std::uint32_t itemsize;
  bool gathers;  // else scatters
  bool aligned;  // to items
  Strides strides;
};

}  // namespace onepass::cuda
