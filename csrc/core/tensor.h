// A parameter of a step with all that belongs to it, as every device's driver takes it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "core/dtype.h"
#include "core/kernel.h"
#include "core/layout.h"

namespace onepass {

// How streams that lie in another order than the parameter are walked.
struct Walk {
  std::vector<Axis> axes[kStreams];
  bool gather[kStreams] = {};
};

// A parameter as the weights of units, in the order of its memory: `outer` times `depth` rows of `units` runs of `run`
// elements. A unit's weights are `depth` runs; their norm is held below `limit`.
struct Units {
  std::size_t outer = 1;
  std::size_t depth = 1;
  std::size_t units = 1;
  std::size_t run = 1;
  double limit = 0.0;
};

struct Tensor {
  const Kernel* kernel = nullptr;
  std::size_t storage = 0;  // in Storages
  std::size_t count = 0;    // elements
  Streams streams{};
  DType dtypes[kStreams] = {};
  const double* coefficients = nullptr;
  const Around* around = nullptr;
  double clip = 1.0;             // a factor of the gradient
  const Walk* walk = nullptr;    // null: all streams in the parameter's order
  const Units* units = nullptr;  // null: no limit
  RandomKey key{};
  bool stochastic = false;  // rounding of what is stored in fewer bits than it is computed in
  bool sum_starts = false;  // nothing is in the accumulator yet

  void set(std::size_t stream, const void* data, DType dtype) {
    streams.data[stream] = static_cast<std::byte*>(const_cast<void*>(data));
    dtypes[stream] = dtype;
  }
};

inline std::size_t itemsize(const Tensor& tensor, std::size_t stream) { return info(tensor.dtypes[stream]).itemsize; }
inline DType compute_type(const Tensor& tensor) { return info(tensor.dtypes[kParam]).compute; }

inline bool reads(const Tensor& tensor, std::size_t stream) {
  return stream != kMirror && (stream != kEma || !tensor.around->ema_starts);
}
inline bool writes(const Tensor& tensor, std::size_t stream) {
  return stream != kAccumulator && (stream != kGrad || tensor.around->zero_grads);
}

inline bool has_noise(const Tensor& tensor) { return tensor.around->noise != 0.0; }
// Whether something is stored in fewer bits than it is computed in, and rounded by chance.
inline bool has_rounding(const Tensor& tensor) {
  if (!tensor.stochastic) return false;
  const auto is_narrow = [&](std::size_t stream) {
    return tensor.streams.data[stream] != nullptr && itemsize(tensor, stream) < info(compute_type(tensor)).itemsize;
  };
  if (tensor.streams.data[kRemainder] == nullptr && is_narrow(kParam)) return true;
  for (std::size_t k = 0; k < kMaxSlots; ++k) {
    if (is_narrow(kFirstSlot + k)) return true;
  }
  return false;
}
inline bool is_random(const Tensor& tensor) { return has_noise(tensor) || has_rounding(tensor); }

// Whether nothing is asked for beyond the update itself.
inline bool is_plain(const Tensor& tensor) {
  const Around& around = *tensor.around;
  for (const std::size_t stream : kBesidesUpdate) {
    if (tensor.streams.data[stream] != nullptr) return false;
  }
  return std::isinf(around.clip_value) && !around.zero_grads && !is_random(tensor);
}

inline Streams from_element(const Tensor& tensor, const Streams& streams, std::size_t element) {
  Streams moved = streams;
  for (std::size_t stream = 0; stream < kStreams; ++stream) {
    if (moved.data[stream] != nullptr) moved.data[stream] += element * itemsize(tensor, stream);
  }
  return moved;
}

// Bytes that a step over this tensor reads and writes.
inline std::size_t traffic(const Tensor& tensor) {
  std::size_t bytes = 0;
  for (std::size_t stream = 0; stream < kStreams; ++stream) {
    if (tensor.streams.data[stream] == nullptr) continue;
    bytes += (reads(tensor, stream) ? itemsize(tensor, stream) : 0) +
             (writes(tensor, stream) ? itemsize(tensor, stream) : 0);
  }
  return bytes * tensor.count;
}

}  // namespace onepass
