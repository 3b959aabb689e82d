#include "cpu/update.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/partition.h"
#include "core/philox.h"
#include "core/sums.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/float_mode.h"
#include "cpu/parallel.h"

namespace onepass {
namespace {

// Elements for which noise is made, and strided streams are gathered, at a time: they stay in the first-level cache.
constexpr std::size_t kBlock = 512;
static_assert(kBlock % kRandomGroup == 0);

// Parts per thread: claimed one by one, so that a core that is busy elsewhere does not hold up the others.
constexpr std::size_t kPartsPerThread = 4;

constexpr std::size_t kLineOfItems = kCacheLine;  // an Extent's itemsize, where its items are larger than a cache line

const DTypeKernels& kernels_for(DType dtype) { return active_kernels().step->dtypes[static_cast<std::size_t>(dtype)]; }

Part part_of(const Tensor& tensor, const Streams& streams, std::size_t first, std::size_t count,
             const Randomness& random) {
  return {from_element(tensor, streams, first),
          count,
          tensor.coefficients,
          tensor.around,
          tensor.clip,
          tensor.dtypes[kMirror],
          random};
}

// Calls run(part) for elements [first, first + count) of the tensor, of which `streams` are used. Where streams have to
// be gathered or noise made, that is done in blocks, which lie in the first-level cache.
template <class Run>
void for_each_block(const Tensor& tensor, const Streams& streams, std::size_t first, std::size_t count, Run run) {
  RandomKey rounding = tensor.key;
  rounding.purpose = Purpose::rounding;
  const Randomness random{nullptr, has_rounding(tensor) ? &rounding : nullptr, first};
  const bool noise = has_noise(tensor) && (streams.data[kGrad] != nullptr || streams.data[kAccumulator] != nullptr);
  if (tensor.walk == nullptr && !noise) {
    run(part_of(tensor, streams, first, count, random));
    return;
  }
  alignas(kCacheLine) std::byte gathered[kStreams][kBlock * sizeof(double)];
  alignas(kCacheLine) float normals[kBlock];
  const StepKernels& kernels = *active_kernels().step;
  const auto is_gathered = [&](std::size_t stream) {
    return tensor.walk != nullptr && tensor.walk->gather[stream] && streams.data[stream] != nullptr;
  };
  for (std::size_t begin = first; begin < first + count;) {
    const std::size_t n = std::min(kBlock - begin % kBlock, first + count - begin);
    Part part = part_of(tensor, streams, begin, n, random);
    part.random.first = begin;
    for (std::size_t stream = kGrad; stream < kStreams; ++stream) {
      if (!is_gathered(stream)) continue;
      if (reads(tensor, stream)) {
        gather(tensor.walk->axes[stream], streams.data[stream], itemsize(tensor, stream), begin, n, gathered[stream]);
      }
      part.streams.data[stream] = gathered[stream];
    }
    if (noise) {
      const std::size_t group = begin / kRandomGroup * kRandomGroup;
      const std::size_t numbers = (begin + n - group + kRandomGroup - 1) / kRandomGroup * kRandomGroup;
      RandomKey key = tensor.key;
      key.purpose = Purpose::noise;
      kernels.normals(key, group, numbers, normals);
      part.random.noise = normals + (begin - group);
    }
    run(part);
    for (std::size_t stream = kGrad; stream < kStreams; ++stream) {
      if (!is_gathered(stream) || !writes(tensor, stream)) continue;
      scatter(tensor.walk->axes[stream], streams.data[stream], itemsize(tensor, stream), begin, n, gathered[stream]);
    }
    begin += n;
  }
}

Isa update_range(const Tensor& tensor, const Streams& streams, std::size_t first, std::size_t count) {
  const UpdateFn run = (is_plain(tensor) ? tensor.kernel->plain : tensor.kernel->whole)[tensor.storage];
  Isa isa = Isa::scalar;
  for_each_block(tensor, streams, first, count, [&](const Part& part) { isa = run(part); });
  return isa;
}

// --- Units whose weights are held below a norm -----------------------------------------------------------------------

// Units that are updated, measured and scaled together, so that their weights are still in the cache.
struct Panels {
  std::size_t width;      // units
  std::size_t count = 1;  // of each outer part

  explicit Panels(const Tensor& tensor) : width(tensor.units->units) {
    const Units& units = *tensor.units;
    if (tensor.count == 0) return;
    const std::size_t unit = units.depth * units.run;
    const std::size_t room = cache_sizes().level2 / 2 / (traffic(tensor) / tensor.count * unit);
    // A whole cache line of each row at the least; no less than is worth a call where rows are long.
    const std::size_t line = (kCacheLine / itemsize(tensor, kParam) + units.run - 1) / units.run;
    const std::size_t wanted = std::max<std::size_t>(room / line, 1) * line;
    width = std::clamp<std::size_t>(wanted, 1, units.units);
    count = (units.units + width - 1) / width;
  }
};

// Elements of a parameter, at most kSquaresBlock, as numbers that can be squared: where they lie, or put together.
class Values {
 public:
  explicit Values(const Tensor& tensor) : tensor_(tensor), low_(tensor.streams.data[kRemainder]) {}
  DType dtype() const { return low_ == nullptr ? tensor_.dtypes[kParam] : DType::float32; }
  const std::byte* read(std::size_t first, std::size_t count) {
    const std::byte* const high = tensor_.streams.data[kParam] + first * itemsize(tensor_, kParam);
    if (low_ == nullptr) return high;
    const std::byte* low = low_ + first * sizeof(std::uint16_t);
    if (tensor_.walk != nullptr && tensor_.walk->gather[kRemainder]) {
      gather(tensor_.walk->axes[kRemainder], low_, sizeof(std::uint16_t), first, count, gathered_);
      low = reinterpret_cast<const std::byte*>(gathered_);
    }
    active_kernels().step->join(high, low, count, joined_);
    return reinterpret_cast<const std::byte*>(joined_);
  }

 private:
  const Tensor& tensor_;
  const std::byte* low_;
  alignas(kCacheLine) float joined_[kSquaresBlock];
  alignas(kCacheLine) std::uint16_t gathered_[kSquaresBlock];
};

// Adds the squares of `units` runs that begin at element `first` to their sums.
void add_row(const Tensor& tensor, std::size_t first, std::size_t units, double* sums) {
  Values values(tensor);
  const DTypeKernels& kernels = kernels_for(values.dtype());
  const std::size_t run = tensor.units->run;
  if (run == 1) {
    for (std::size_t u = 0; u < units; u += kSquaresBlock) {
      const std::size_t n = std::min(kSquaresBlock, units - u);
      kernels.add_squares(values.read(first + u, n), n, sums + u);
    }
    return;
  }
  for (std::size_t u = 0; u < units; ++u) {
    const double total = ordered_sum((run + kSquaresBlock - 1) / kSquaresBlock, [&](std::size_t block) {
      const std::size_t begin = block * kSquaresBlock;
      const std::size_t n = std::min(kSquaresBlock, run - begin);
      return kernels.squares(values.read(first + u * run + begin, n), n).sum;
    });
    sums[u] = sums[u] + total;
  }
}

template <class S>
void fill_factors(const Units& units, const double* sums, std::size_t first, std::size_t count, std::byte* factors) {
  S* const to = reinterpret_cast<S*>(factors);
  for (std::size_t k = 0; k < count; ++k) {
    const double norm = std::sqrt(sums[(first + k) / units.run]);
    to[k] = norm > units.limit ? static_cast<S>(units.limit / norm) : S(1);
  }
}

// `sums`: one for each unit of the panel.
Isa update_panel(const Tensor& tensor, std::size_t outer, std::size_t first_unit, std::size_t width, double* sums) {
  const Units& units = *tensor.units;
  const auto row_begin = [&](std::size_t row) {
    return ((outer * units.depth + row) * units.units + first_unit) * units.run;
  };
  const std::size_t row_count = width * units.run;
  Streams now = tensor.streams;  // what shows the new parameter waits until that is final
  now.data[kEma] = nullptr;
  now.data[kMirror] = nullptr;
  std::fill_n(sums, width, 0.0);
  Isa isa = Isa::scalar;
  for (std::size_t row = 0; row < units.depth; ++row) {
    isa = update_range(tensor, now, row_begin(row), row_count);
    add_row(tensor, row_begin(row), width, sums);
  }
  const bool scaled = std::any_of(sums, sums + width, [&](double sum) { return std::sqrt(sum) > units.limit; });
  if (!scaled && tensor.streams.data[kEma] == nullptr && tensor.streams.data[kMirror] == nullptr) return isa;

  Streams later{};
  for (const std::size_t stream : {kParam, kRemainder, kEma, kMirror}) later.data[stream] = tensor.streams.data[stream];
  const DType compute = compute_type(tensor);
  const auto finish = kernels_for(tensor.dtypes[kParam]).finish;
  alignas(kCacheLine) std::byte factors[kBlock * sizeof(double)];
  for (std::size_t row = 0; row < units.depth; ++row) {
    for (std::size_t begin = 0; begin < row_count; begin += kBlock) {
      const std::size_t n = std::min(kBlock, row_count - begin);
      if (compute == DType::float32) {
        fill_factors<float>(units, sums, begin, n, factors);
      } else {
        fill_factors<double>(units, sums, begin, n, factors);
      }
      const std::byte* from = factors;
      for_each_block(tensor, later, row_begin(row) + begin, n, [&](const Part& part) {
        finish(part, from);
        from += part.count * info(compute).itemsize;
      });
    }
  }
  return isa;
}

// `sums`: one for each unit of the tensor.
Isa update_panels(const Tensor& tensor, std::size_t first, std::size_t count, double* sums) {
  const Panels panels(tensor);
  const std::size_t units = tensor.units->units;
  Isa isa = Isa::scalar;
  for (std::size_t item = first; item < first + count; ++item) {
    const std::size_t outer = item / panels.count;
    const std::size_t unit = item % panels.count * panels.width;
    isa = update_panel(tensor, outer, unit, std::min(panels.width, units - unit), sums + outer * units + unit);
  }
  return isa;
}

// --- Dividing the work -----------------------------------------------------------------------------------------------

std::atomic<std::size_t> least_parallel_bytes{std::size_t{4} << 20};

// Calls work(tensor, first item, items) until all tensors are done, on up to `threads` threads. `extent_of` says what
// the items of a tensor are, with its own bytes in the place of `end`.
template <class ExtentOf, class Work>
void divide(std::span<const Tensor> tensors, std::size_t threads, ExtentOf extent_of, Work work) {
  thread_local std::vector<Extent> extents;  // keeps its memory from step to step
  extents.clear();
  std::size_t total = 0;
  for (const Tensor& tensor : tensors) {
    Extent extent = extent_of(tensor);
    if (tensor.count == 0) extent.count = extent.end = 0;
    total += extent.end;
    extent.end = total;
    extents.push_back(extent);
  }
  if (threads <= 1 || total == 0 || total < serial_bytes()) {
    const FloatMode mode;
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      if (extents[t].count > 0) work(t, std::size_t{0}, extents[t].count);
    }
    return;
  }
  struct Job {
    std::span<const Extent> extents;
    std::size_t parts;
    Work* work;
  };
  Job job{extents, threads * kPartsPerThread, &work};
  parallel_for(
      threads, job.parts,
      [](void* context, std::size_t part) {
        const Job& j = *static_cast<Job*>(context);
        const FloatMode mode;
        for_each_in_part(j.extents, part, j.parts, *j.work);
      },
      &job);
}

Extent extent(const Tensor& tensor, std::size_t bytes_per_element) {
  return {reinterpret_cast<std::uintptr_t>(tensor.streams.data[kParam]), itemsize(tensor, kParam), tensor.count,
          bytes_per_element * tensor.count};
}

// Calls run(values, elements) for pieces of at most kBlock consecutive elements of a stream, in the parameter's order.
template <class Run>
void for_each_piece(const Tensor& tensor, std::size_t stream, std::size_t first, std::size_t count, Run run) {
  const std::byte* const data = tensor.streams.data[stream];
  if (tensor.walk == nullptr || !tensor.walk->gather[stream]) {
    run(data + first * itemsize(tensor, stream), count, first);
    return;
  }
  alignas(kCacheLine) std::byte gathered[kBlock * sizeof(double)];
  for (std::size_t begin = first; begin < first + count; begin += kBlock) {
    const std::size_t n = std::min(kBlock, first + count - begin);
    gather(tensor.walk->axes[stream], data, itemsize(tensor, stream), begin, n, gathered);
    run(gathered, n, begin);
  }
}

// Adds elements of the gradient to those of the accumulator. `to` is contiguous and holds the sums that are there, or
// will be read over.
void add_gradient(const Tensor& tensor, std::size_t first, std::size_t count, bool starts, std::byte* to) {
  const std::size_t size = info(compute_type(tensor)).itemsize;
  for_each_piece(tensor, kGrad, first, count, [&](const std::byte* values, std::size_t n, std::size_t begin) {
    std::byte* const sums = to + (begin - first) * size;
    kernels_for(tensor.dtypes[kGrad])
        .accumulate(values, n, tensor.around->scaling.scale, starts ? nullptr : sums, sums);
  });
}

void zero_range(const Tensor& tensor, std::size_t first, std::size_t count) {
  std::byte* const grad = tensor.streams.data[kGrad];
  const std::size_t size = itemsize(tensor, kGrad);
  if (tensor.walk == nullptr || !tensor.walk->gather[kGrad]) {
    std::memset(grad + first * size, 0, count * size);
    return;
  }
  const std::byte zeros[kBlock * sizeof(double)] = {};
  for (std::size_t begin = first; begin < first + count; begin += kBlock) {
    scatter(tensor.walk->axes[kGrad], grad, size, begin, std::min(kBlock, first + count - begin), zeros);
  }
}

void accumulate_range(const Tensor& tensor, std::size_t first, std::size_t count) {
  const std::size_t size = itemsize(tensor, kAccumulator);
  std::byte* const sums = tensor.streams.data[kAccumulator];
  if (tensor.walk == nullptr || !tensor.walk->gather[kAccumulator]) {
    add_gradient(tensor, first, count, tensor.sum_starts, sums + first * size);
  } else {
    alignas(kCacheLine) std::byte gathered[kBlock * sizeof(double)];
    const std::span<const Axis> axes = tensor.walk->axes[kAccumulator];
    for (std::size_t begin = first; begin < first + count; begin += kBlock) {
      const std::size_t n = std::min(kBlock, first + count - begin);
      if (!tensor.sum_starts) gather(axes, sums, size, begin, n, gathered);
      add_gradient(tensor, begin, n, tensor.sum_starts, gathered);
      scatter(axes, sums, size, begin, n, gathered);
    }
  }
  if (tensor.around->zero_grads) zero_range(tensor, first, count);
}

// The squares of block `block` of what a norm is taken of.
Squares measure_block(const Tensor& tensor, std::size_t block) {
  const std::size_t first = block * kSquaresBlock;
  const std::size_t count = std::min(kSquaresBlock, tensor.count - first);
  alignas(kCacheLine) std::byte buffer[kSquaresBlock * sizeof(double)];
  const auto contiguous = [&](std::size_t stream) -> const std::byte* {
    const std::size_t size = itemsize(tensor, stream);
    if (tensor.walk == nullptr || !tensor.walk->gather[stream]) return tensor.streams.data[stream] + first * size;
    gather(tensor.walk->axes[stream], tensor.streams.data[stream], size, first, count, buffer);
    return buffer;
  };
  if (tensor.streams.data[kAccumulator] == nullptr)
    return kernels_for(tensor.dtypes[kGrad]).squares(contiguous(kGrad), count);
  const DTypeKernels& kernels = kernels_for(compute_type(tensor));
  if (!tensor.sum_starts) {
    const std::byte* const sums = contiguous(kAccumulator);
    if (tensor.streams.data[kGrad] == nullptr) return kernels.squares(sums, count);
    if (sums != buffer) std::memcpy(buffer, sums, count * itemsize(tensor, kAccumulator));
  }
  add_gradient(tensor, first, count, tensor.sum_starts, buffer);
  return kernels.squares(buffer, count);
}

// Of contiguous memory.
void exchange_items(const Tensor& tensor, const Streams& streams, std::size_t count) {
  std::byte* const param = streams.data[kParam];
  std::byte* const ema = streams.data[kEma];
  std::byte* const remainder = streams.data[kRemainder];
  if (remainder == nullptr) {
    std::swap_ranges(param, param + count * itemsize(tensor, kParam), ema);
    return;
  }
  for (std::size_t i = 0; i < count; ++i) {
    Split split{};
    float average = 0.0F;
    std::memcpy(&split.high, param + 2 * i, 2);
    std::memcpy(&split.low, remainder + 2 * i, 2);
    std::memcpy(&average, ema + 4 * i, 4);
    const float value = split.value();
    split = Split::of(average);
    std::memcpy(param + 2 * i, &split.high, 2);
    std::memcpy(remainder + 2 * i, &split.low, 2);
    std::memcpy(ema + 4 * i, &value, 4);
  }
}

void exchange_range(const Tensor& tensor, std::size_t first, std::size_t count) {
  const auto show = kernels_for(tensor.dtypes[kParam]).show;
  for_each_block(tensor, tensor.streams, first, count, [&](const Part& part) {
    exchange_items(tensor, part.streams, part.count);
    if (part.streams.data[kMirror] != nullptr) show(part);
  });
}

void show_range(const Tensor& tensor, std::size_t first, std::size_t count) {
  if (tensor.streams.data[kMirror] == nullptr) return;
  for_each_block(tensor, tensor.streams, first, count, kernels_for(tensor.dtypes[kParam]).show);
}

std::size_t blocks_of(const Tensor& tensor) { return (tensor.count + kSquaresBlock - 1) / kSquaresBlock; }

}  // namespace

std::size_t serial_bytes() { return least_parallel_bytes.load(std::memory_order_relaxed); }
void set_serial_bytes(std::size_t bytes) { least_parallel_bytes.store(bytes, std::memory_order_relaxed); }

Isa update(std::span<const Tensor> tensors, std::size_t threads) {
  // The sums of all units, of memory that is there before anything is written.
  thread_local std::vector<double> unit_sums;
  thread_local std::vector<std::size_t> first_sums;
  first_sums.clear();
  std::size_t count = 0;
  for (const Tensor& tensor : tensors) {
    first_sums.push_back(count);
    if (tensor.units != nullptr) count += tensor.units->outer * tensor.units->units;
  }
  unit_sums.resize(count);
  double* const sums = unit_sums.data();
  const std::size_t* const first_sum = first_sums.data();

  std::atomic<Isa> isa{active_kernels().isa};
  divide(
      tensors, threads,
      [](const Tensor& tensor) -> Extent {
        if (tensor.units == nullptr) return extent(tensor, traffic(tensor) / std::max(tensor.count, std::size_t{1}));
        const std::size_t items = tensor.units->outer * Panels(tensor).count;
        return {0, kLineOfItems, items, std::max(traffic(tensor) / items, std::size_t{1}) * items};
      },
      [&](std::size_t t, std::size_t first, std::size_t items) {
        const Tensor& tensor = tensors[t];
        isa.store(tensor.units == nullptr ? update_range(tensor, tensor.streams, first, items)
                                          : update_panels(tensor, first, items, sums + first_sum[t]),
                  std::memory_order_relaxed);
      });
  return isa.load(std::memory_order_relaxed);
}

void measure(std::span<const Tensor> tensors, std::size_t threads, std::span<Squares> sums) {
  thread_local std::vector<Squares> blocks;
  thread_local std::vector<std::size_t> first_block;
  first_block.clear();
  std::size_t total = 0;
  for (const Tensor& tensor : tensors) {
    first_block.push_back(total);
    total += blocks_of(tensor);
  }
  blocks.resize(total);
  Squares* const results = blocks.data();
  const std::size_t* const offsets = first_block.data();
  divide(
      tensors, threads,
      [](const Tensor& tensor) -> Extent {
        const std::size_t stream = tensor.streams.data[kGrad] != nullptr ? kGrad : kAccumulator;
        const std::size_t items = std::max(blocks_of(tensor), std::size_t{1});
        return {0, kLineOfItems, items,
                std::max(tensor.count * itemsize(tensor, stream) / items, std::size_t{1}) * items};
      },
      [&](std::size_t t, std::size_t first, std::size_t count) {
        for (std::size_t b = first; b < first + count; ++b) results[offsets[t] + b] = measure_block(tensors[t], b);
      });
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const Squares* const of_blocks = results + offsets[t];
    const std::size_t count = blocks_of(tensors[t]);
    sums[t] = {ordered_sum(count, [=](std::size_t b) { return of_blocks[b].sum; }),
               std::all_of(of_blocks, of_blocks + count, [](const Squares& block) { return block.finite; })};
  }
}

void accumulate(std::span<const Tensor> tensors, std::size_t threads) {
  divide(
      tensors, threads,
      [](const Tensor& tensor) { return extent(tensor, itemsize(tensor, kGrad) + 2 * itemsize(tensor, kAccumulator)); },
      [&](std::size_t t, std::size_t first, std::size_t count) { accumulate_range(tensors[t], first, count); });
}

void zero_gradients(std::span<const Tensor> tensors, std::size_t threads) {
  divide(
      tensors, threads,
      [](const Tensor& tensor) {  // a sum may end without a gradient
        Extent gradient = extent(tensor, itemsize(tensor, kGrad));
        if (tensor.streams.data[kGrad] == nullptr) gradient.count = gradient.end = 0;
        return gradient;
      },
      [&](std::size_t t, std::size_t first, std::size_t count) { zero_range(tensors[t], first, count); });
}

void exchange(std::span<const Tensor> tensors, std::size_t threads) {
  divide(
      tensors, threads,
      [](const Tensor& tensor) { return extent(tensor, 2 * (itemsize(tensor, kParam) + itemsize(tensor, kEma))); },
      [&](std::size_t t, std::size_t first, std::size_t count) { exchange_range(tensors[t], first, count); });
}

void show(std::span<const Tensor> tensors, std::size_t threads) {
  divide(
      tensors, threads,
      [](const Tensor& tensor) { return extent(tensor, itemsize(tensor, kParam) + itemsize(tensor, kMirror)); },
      [&](std::size_t t, std::size_t first, std::size_t count) { show_range(tensors[t], first, count); });
}

}  // namespace onepass
