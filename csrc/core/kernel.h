// What a kernel unit exports and what a driver calls: plain data and plain pointers, so that no SIMD type and no
// template crosses the border between units that were compiled for different instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "core/philox.h"

namespace onepass {

inline constexpr std::size_t kMaxSlots = 3;
inline constexpr std::size_t kMaxCoefficients = 12;

enum class Isa : std::uint8_t { scalar, avx2, avx512 };

// The names of a rule's slots or coefficients, in the order in which the rule takes them.
struct Names {
  const char* data[kMaxCoefficients];
  std::size_t count;
};

// The arrays of a tensor, as numbers. Slot k is kFirstSlot + k.
enum Stream : std::size_t {
  kParam = 0,
  kGrad = 1,
  kFirstSlot = 2,
  kEma = kFirstSlot + kMaxSlots,
  kMirror,
  kRemainder,
  kAccumulator,
  kStreams
};

// Those that a plain update knows nothing of.
inline constexpr Stream kBesidesUpdate[] = {kEma, kMirror, kRemainder, kAccumulator};

// Their memory, from the first element of the tensor or of a part of it; null for those that it does not have.
struct Streams {
  std::byte* data[kStreams];
};

// What a gradient is multiplied with.
struct Scaling {
  double scale = 1.0;
  double sign = 1.0;        // -1: maximize
  double accumulate = 1.0;  // gradients in the mean, where the stream of their sum is
};

// What surrounds every rule. A neutral value (scale 1, l1 0, l2 0, decay 1, noise 0) means that the term is left out.
struct Around {
  Scaling scaling;
  double l1 = 0.0;
  double l2 = 0.0;
  double decay = 1.0;
  double clip_value = std::numeric_limits<double>::infinity();
  double noise = 0.0;      // standard deviation
  double ema_decay = 0.0;  // the average is wanted where its stream is
  bool ema_starts = false;
  bool zero_grads = false;
};

// Random numbers for the elements of a part.
struct Randomness {
  const float* noise;         // of a normal distribution; null: none
  const RandomKey* rounding;  // of 16 bits for each element; null: to nearest
  std::uint64_t first;        // the place of the part's first element among those of the key
};

// Consecutive elements of a tensor, and what is done to them. `coefficients` are the rule's, in float64, rounded once
// to the compute type.
struct Part {
  Streams streams;
  std::size_t count;
  const double* coefficients;
  const Around* around;
  double clip;   // a further factor of the gradient
  DType mirror;  // of the mirror's stream
  Randomness random;
};

// Returns the instruction set of the code that ran.
using UpdateFn = Isa (*)(const Part& part);

struct Kernel {
  const char* rule;
  Names slots;
  Names coefficients;
  bool yardstick;  // trivial arithmetic over the same streams: what the memory alone would take
  // Parameter, gradient and slots alone, with the terms that have a coefficient; or whatever a Part can ask for.
  UpdateFn plain[Storages::size];
  UpdateFn whole[Storages::size];
};

// What surrounds the update without knowing a rule. Arrays named by a dtype are those of its row.
inline constexpr std::size_t kSquaresBlock = 4096;  // elements; the order of a sum depends on it

struct Squares {
  double sum;
  bool finite;  // all elements
};

struct DTypeKernels {
  // The sum of the squares of at most kSquaresBlock elements: 16 lanes, then a tree.
  Squares (*squares)(const std::byte* values, std::size_t count);
  // sums[k] += the square of element k.
  void (*add_squares)(const std::byte* values, std::size_t count, double* sums);
  // to = from + scale * value, in the compute type; `from` may be `to`, or null for 0.
  void (*accumulate)(const std::byte* values, std::size_t count, double scale, const std::byte* from, std::byte* to);
  // Multiplies parameters by `factors`, in the compute type, and passes them on to average and mirror.
  Isa (*finish)(const Part& part, const std::byte* factors);
  // Stores parameters in their mirror.
  void (*show)(const Part& part);
};

struct StepKernels {
  DTypeKernels dtypes[DTypes::size];
  // The float32 numbers of split ones.
  void (*join)(const std::byte* high, const std::byte* low, std::size_t count, float* values);
  // Noise for the elements from `begin` on; begin and count are multiples of kRandomGroup.
  void (*normals)(const RandomKey& key, std::size_t begin, std::size_t count, float* values);
};

namespace batchnorm {
struct Table;
}

struct KernelTable {
  Isa isa;
  const Kernel* kernels;
  std::size_t count;
  const StepKernels* step;
  const batchnorm::Table* batchnorm;
};

}  // namespace onepass
