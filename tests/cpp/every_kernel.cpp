// Every kernel of an instruction set's table, over buffers that end with their last element and begin with their first:
// a read or a write one byte outside of them, and a result that depends on memory that nobody wrote, are errors of
// Valgrind's memcheck. `make valgrind` builds it and runs it.
//
//   every_kernel <instruction set to run> <those that must be available here, slowest first>...
//
// What there is to run is read from the tables: a new rule, dtype or row of storage is run with the others.
#include <valgrind/memcheck.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "batchnorm/plan.h"
#include "core/batchnorm_kernel.h"
#include "core/dtype.h"
#include "core/kernel.h"
#include "core/philox.h"
#include "core/type_list.h"
#include "cpu/dispatch.h"
#include "cpu/float_mode.h"

namespace {

using namespace onepass;

std::size_t calls = 0;
std::size_t failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  ++failures;
}

void check_isa(Isa ran) { check(ran == active_kernels().isa, "the kernel is of another instruction set"); }

// --- Memory ----------------------------------------------------------------------------------------------------------

constexpr std::size_t kLine = 64;

// Bytes that begin `offset` bytes behind a cache line. All that is around them may not be touched; they themselves are
// undefined until somebody writes them.
class Memory {
 public:
  Memory(std::size_t bytes, std::size_t offset) : size_(bytes), block_(new std::byte[bytes + offset + 4 * kLine]) {
    const auto address = reinterpret_cast<std::uintptr_t>(block_.get());
    data_ = block_.get() + (2 * kLine - address % kLine) + offset;
    VALGRIND_MAKE_MEM_NOACCESS(block_.get(), bytes + offset + 4 * kLine);
    VALGRIND_MAKE_MEM_UNDEFINED(data_, size_);
  }
  std::byte* data() const { return data_; }
  void check_defined() const { VALGRIND_CHECK_MEM_IS_DEFINED(data_, size_); }

 private:
  std::size_t size_;
  std::unique_ptr<std::byte[]> block_;
  std::byte* data_;
};

template <class D>
void fill_as(std::byte* to, std::size_t count, std::uint32_t seed) {
  for (std::size_t k = 0; k < count; ++k) {
    seed = seed * 1664525U + 1013904223U;
    const auto value = static_cast<typename D::Compute>(static_cast<double>(1U + (seed >> 8U)) * 0x1p-24);
    const typename D::Storage stored = D::narrow(value);
    __builtin_memcpy(to + k * sizeof stored, &stored, sizeof stored);
  }
}

// Numbers between 0 and 1, as they lie in memory.
template <class... Ds>
void fill(TypeList<Ds...> /*dtypes*/, DType dtype, std::byte* to, std::size_t count, std::uint32_t seed) {
  if (dtype == DType::uint16) {
    for (std::size_t k = 0; k < 2 * count; ++k) to[k] = static_cast<std::byte>(seed + 37 * k);
  }
  ((dtype == Ds::id ? fill_as<Ds>(to, count, seed) : void()), ...);
}

class Array : public Memory {
 public:
  Array(DType dtype, std::size_t count, std::size_t offset) : Memory(count * info(dtype).itemsize, offset) {}
  static Array filled(DType dtype, std::size_t count, std::size_t offset) {
    Array array(dtype, count, offset);
    static std::uint32_t seed = 0;
    fill(DTypes{}, dtype, array.data(), count, ++seed);
    return array;
  }
};

// Nothing, one, around the lanes of every instruction set; and so many that the elements before the first aligned one
// are taken apart. Where arrays begin: on a line, within one, and between two items.
constexpr std::size_t kCounts[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 1063};
constexpr std::size_t kOffsets[] = {0, 8, 1, 16, 6, 63, 32, 20};

// Each call takes the next ones, so that every kernel meets all of them in some order.
class Cycle {
 public:
  std::size_t count() { return kCounts[k_++ % std::size(kCounts)]; }
  std::size_t offset() { return kOffsets[k_++ % std::size(kOffsets)]; }

 private:
  std::size_t k_ = 0;
};

// --- Updates ---------------------------------------------------------------------------------------------------------

enum class Sum : std::uint8_t { none, with_gradient, alone };

// What a whole step can be asked for.
struct Wishes {
  bool terms = false;  // scale, clip_value, l1, l2, decay
  bool zero_grads = false;
  bool ema = false;
  bool ema_starts = false;
  bool remainder = false;
  bool noise = false;
  bool rounding = false;
  DType mirror = DType::uint16;  // none
  Sum sum = Sum::none;
};

std::vector<Wishes> all_wishes(const StorageInfo& row) {
  const DType compute = info(row.param).compute;
  const auto narrow = [&](DType dtype) { return info(dtype).itemsize < info(compute).itemsize; };
  std::vector<Wishes> wishes;
  for (unsigned bits = 0; bits < 128; ++bits) {
    const auto has = [bits](unsigned bit) { return (bits >> bit & 1U) != 0; };
    const Wishes flags{has(0), has(1), has(2), has(3), has(4), has(5), has(6)};
    if (flags.ema_starts && !flags.ema) continue;
    if (flags.remainder && row.param != DType::bfloat16) continue;
    if (flags.rounding && !narrow(row.param) && !narrow(row.state)) continue;
    for (const DType mirror : {DType::uint16, DType::bfloat16, DType::float16}) {
      for (const Sum sum : {Sum::none, Sum::with_gradient, Sum::alone}) {
        wishes.push_back(flags);
        wishes.back().mirror = mirror;
        wishes.back().sum = sum;
      }
    }
  }
  return wishes;
}

Around around_of(const Wishes& wishes) {
  Around around;
  if (wishes.terms) {
    around.scaling.scale = 0.5;
    around.scaling.sign = -1.0;
    around.l1 = 0.125;
    around.l2 = 0.25;
    around.decay = 0.75;
    around.clip_value = 0.5;
    around.scaling.accumulate = 3.0;
  }
  around.noise = wishes.noise ? 0.5 : 0.0;
  around.ema_decay = 0.75;
  around.ema_starts = wishes.ema_starts;
  around.zero_grads = wishes.zero_grads;
  return around;
}

// What a call reads and writes. Arrays that it is to fill are undefined before, and everything must be defined behind.
class Step {
 public:
  Step(std::size_t count, const Wishes& wishes, const Around& around)
      : part_{{}, count, nullptr, &around, 1.0, wishes.mirror, {}} {}

  std::byte* read(std::size_t stream, DType dtype, std::size_t offset) {
    return keep(stream, Array::filled(dtype, part_.count, offset));
  }
  void written(std::size_t stream, DType dtype, std::size_t offset) { keep(stream, Array(dtype, part_.count, offset)); }
  // Numbers begin within a group, at the end of one or of half a circle, or so far that places have more than 32 bits:
  // five before the end of a circle.
  void random(bool noise, bool rounding, std::size_t offset) {
    static constexpr RandomKey key{12345, 6, 7, Purpose::rounding};
    const std::size_t item = offset / 4 * 4;
    if (noise) part_.random.noise = as<float>(Array::filled(DType::float32, part_.count, item));
    if (!rounding) return;
    part_.random.rounding = &key;
    static constexpr std::uint64_t places[] = {0, 127, 255, 1, 511, 384, (std::uint64_t{1} << 40U) - 5};
    part_.random.first = places[offset % std::size(places)];
  }
  Part& part() { return part_; }

  template <class Kernel>
  void run(Kernel kernel) {
    const FloatMode mode;
    kernel(part_);
    ++calls;
    for (const auto& array : streams_) array.check_defined();
  }

 private:
  std::byte* keep(std::size_t stream, Array array) {
    part_.streams.data[stream] = array.data();
    streams_.push_back(std::move(array));
    return part_.streams.data[stream];
  }
  template <class T>
  const T* as(Array array) {
    arrays_.push_back(std::move(array));
    return reinterpret_cast<const T*>(arrays_.back().data());
  }

  Part part_;
  std::vector<Array> streams_;
  std::vector<Array> arrays_;
};

void run_update(const Kernel& kernel, UpdateFn update, std::size_t storage, const Wishes& wishes, std::size_t count,
                Cycle& cycle) {
  const StorageInfo row = kStorages[storage];
  const DType compute = info(row.param).compute;
  const Around around = around_of(wishes);
  Step step(count, wishes, around);
  step.read(kParam, row.param, cycle.offset());
  if (wishes.sum != Sum::alone) step.read(kGrad, row.grad, cycle.offset());
  for (std::size_t k = 0; k < kernel.slots.count; ++k) step.read(kFirstSlot + k, row.state, cycle.offset());
  if (wishes.remainder) step.read(kRemainder, DType::uint16, cycle.offset());
  if (wishes.sum != Sum::none) step.read(kAccumulator, compute, cycle.offset());
  const DType ema = wishes.remainder ? compute : row.param;
  if (wishes.ema && wishes.ema_starts) step.written(kEma, ema, cycle.offset());
  if (wishes.ema && !wishes.ema_starts) step.read(kEma, ema, cycle.offset());
  if (wishes.mirror != DType::uint16) step.written(kMirror, wishes.mirror, cycle.offset());
  step.random(wishes.noise, wishes.rounding, cycle.offset());
  const Array coefficients = Array::filled(DType::float64, kernel.coefficients.count, 0);
  step.part().coefficients = reinterpret_cast<const double*>(coefficients.data());
  step.run([&](const Part& part) { check_isa(update(part)); });
}

void run_updates(const KernelTable& table) {
  for (std::size_t k = 0; k < table.count; ++k) {
    const Kernel& kernel = table.kernels[k];
    for (std::size_t storage = 0; storage < Storages::size; ++storage) {
      Cycle cycle;
      for (const std::size_t count : kCounts) {
        for (const bool terms : {false, true}) {
          Wishes wishes;
          wishes.terms = terms;
          run_update(kernel, kernel.plain[storage], storage, wishes, count, cycle);
        }
      }
      for (const Wishes& wishes : all_wishes(kStorages[storage])) {
        run_update(kernel, kernel.whole[storage], storage, wishes, cycle.count(), cycle);
      }
    }
  }
}

// --- The rest of a step ----------------------------------------------------------------------------------------------

void run_sums(const DTypeKernels& kernels, DType dtype) {
  const DType compute = info(dtype).compute;
  Cycle cycle;
  for (const std::size_t given : kCounts) {
    for (std::size_t turn = 0; turn < std::size(kOffsets); ++turn) {
      const std::size_t count = given > 1000 && turn == 0 ? kSquaresBlock : given;
      const Array values = Array::filled(dtype, count, cycle.offset());
      const FloatMode mode;

      const Squares squares = kernels.squares(values.data(), count);
      VALGRIND_CHECK_VALUE_IS_DEFINED(squares.sum);
      VALGRIND_CHECK_VALUE_IS_DEFINED(squares.finite);
      check(squares.finite && (squares.sum > 0.0) == (count > 0), "squares: a wrong sum");

      const Array sums = Array::filled(DType::float64, count, cycle.offset() / 8 * 8);
      kernels.add_squares(values.data(), count, reinterpret_cast<double*>(sums.data()));
      sums.check_defined();

      for (const double scale : {1.0, 0.5}) {
        const Array from = Array::filled(compute, count, cycle.offset());
        const Array to(compute, count, cycle.offset());
        kernels.accumulate(values.data(), count, scale, nullptr, to.data());
        to.check_defined();
        kernels.accumulate(values.data(), count, scale, from.data(), to.data());
        to.check_defined();
        kernels.accumulate(values.data(), count, scale, to.data(), to.data());
        to.check_defined();
        calls += 3;
      }
      calls += 2;
    }
  }
}

void run_finishes(const DTypeKernels& kernels, DType dtype) {
  const DType compute = info(dtype).compute;
  Cycle cycle;
  for (const Wishes& wishes : all_wishes({dtype, dtype, dtype})) {
    if (wishes.sum != Sum::none || wishes.noise || wishes.zero_grads) continue;
    const Around around = around_of(wishes);
    for (const std::size_t count : kCounts) {
      Step step(count, wishes, around);
      step.read(kParam, dtype, cycle.offset());
      if (wishes.remainder) step.read(kRemainder, DType::uint16, cycle.offset());
      const DType ema = wishes.remainder ? compute : dtype;
      if (wishes.ema && wishes.ema_starts) step.written(kEma, ema, cycle.offset());
      if (wishes.ema && !wishes.ema_starts) step.read(kEma, ema, cycle.offset());
      if (wishes.mirror != DType::uint16) step.written(kMirror, wishes.mirror, cycle.offset());
      step.random(false, wishes.rounding, cycle.offset());
      const Array factors = Array::filled(compute, count, cycle.offset());
      step.run([&](const Part& part) { check_isa(kernels.finish(part, factors.data())); });
      if (wishes.mirror != DType::uint16) step.run([&](const Part& part) { kernels.show(part); });
    }
  }
}

void run_joins(const StepKernels& kernels) {
  Cycle cycle;
  for (const std::size_t count : kCounts) {
    for (std::size_t turn = 0; turn < std::size(kOffsets); ++turn) {
      const Array high = Array::filled(DType::bfloat16, count, cycle.offset());
      const Array low = Array::filled(DType::uint16, count, cycle.offset());
      const Array values(DType::float32, count, cycle.offset() / 4 * 4);
      const FloatMode mode;
      kernels.join(high.data(), low.data(), count, reinterpret_cast<float*>(values.data()));
      values.check_defined();
      ++calls;
    }
  }
}

void run_random_numbers(const StepKernels& kernels) {
  for (const std::size_t groups : {std::size_t{0}, std::size_t{1}, std::size_t{3}}) {
    for (const std::size_t begin : {std::size_t{0}, kRandomGroup, std::size_t{1} << 40U}) {
      for (const std::size_t offset : {std::size_t{0}, std::size_t{4}, std::size_t{60}}) {
        const std::size_t count = groups * kRandomGroup;
        const Array normals(DType::float32, count, offset);
        const FloatMode mode;
        const RandomKey key{12345, 6, 7, Purpose::noise};
        kernels.normals(key, begin, count, reinterpret_cast<float*>(normals.data()));
        normals.check_defined();
        ++calls;
      }
    }
  }
}

template <class... Ds>
void run_step_kernels(TypeList<Ds...> /*dtypes*/, const StepKernels& kernels) {
  (run_sums(kernels.dtypes[static_cast<std::size_t>(Ds::id)], Ds::id), ...);
  (run_finishes(kernels.dtypes[static_cast<std::size_t>(Ds::id)], Ds::id), ...);
  run_joins(kernels);
  run_random_numbers(kernels);
}

// --- Batch normalization ---------------------------------------------------------------------------------------------

struct Shape {
  std::size_t outer, channels, inner;
};

// One value; short rows, folded and not, in whole lines and not, more than a block of them; rows wider than a tile;
// long runs, several to a block, one, and cut into pieces; one channel.
constexpr Shape kShapes[] = {{1, 1, 1},    {3, 5, 1},   {67, 8, 1},   {150, 7, 3},  {200, 16, 1}, {70, 100, 11},
                             {2, 2305, 1}, {3, 90, 33}, {2, 3, 256},  {17, 2, 300}, {1, 2, 4097}, {2, 1, 5003},
                             {5, 3, 257},  {1, 9, 255}, {33, 300, 7}, {4, 4, 49}};

class BatchNorm {
 public:
  BatchNorm(const batchnorm::Kernels& kernels, DType dtype, const Shape& shape, Cycle& cycle)
      : kernels_(kernels),
        dtype_(dtype),
        plan_(batchnorm::make_plan(shape.outer, shape.channels, shape.inner, info(dtype).itemsize)),
        count_(shape.outer * shape.channels * shape.inner),
        cycle_(cycle) {}

  void run() {
    moments();
    for (unsigned bits = 0; bits < 8; ++bits) normalize((bits & 1U) != 0, (bits & 2U) != 0, (bits & 4U) != 0);
    for (const Mask mask : {Mask::none, Mask::given, Mask::recomputed}) {
      sums(mask);
      for (unsigned bits = 0; bits < 8; ++bits) {
        const bool residual = (bits & 1U) != 0;
        if (mask != Mask::none || !residual) gradients(mask, residual, (bits & 2U) != 0, (bits & 4U) != 0);
      }
    }
  }

 private:
  enum class Mask : std::uint8_t { none, given, recomputed };

  Array batch() { return Array::filled(dtype_, count_, cycle_.offset()); }
  Array per_channel() const { return Array::filled(dtype_, plan_.channels, info(dtype_).itemsize); }
  // Stores that bypass the cache want whole items, and two outputs that lie alike.
  std::size_t output_offset(bool bypass) {
    const std::size_t offset = cycle_.offset();
    return bypass ? offset / info(dtype_).itemsize * info(dtype_).itemsize : offset;
  }

  // Tile by tile, in two parts: as threads have them.
  template <class Body>
  void for_each_region(Body body) const {
    const FloatMode mode;
    for (std::size_t begin = 0; begin < plan_.channels; begin += plan_.tile) {
      const std::size_t end = std::min(begin + plan_.tile, plan_.channels);
      const std::size_t half = plan_.blocks / 2;
      if (half > 0) body(batchnorm::Region{{begin, end}, {0, half}});
      body(batchnorm::Region{{begin, end}, {half, plan_.blocks}});
    }
  }

  // Calls run(region, a, b) with room for a pair of values for each channel of the region, that it must fill.
  template <class Run>
  void for_each_pair(Run run) {
    for_each_region([&](const batchnorm::Region& region) {
      const Array a(DType::float64, region.channels.size(), 8);
      const Array b(DType::float64, region.channels.size(), 0);
      check_isa(run(region, reinterpret_cast<double*>(a.data()), reinterpret_cast<double*>(b.data())));
      a.check_defined();
      b.check_defined();
      ++calls;
    });
  }

  void moments() {
    const Array x = batch();
    for_each_pair([&](const batchnorm::Region& region, double* mean, double* m2) {
      return kernels_.moments(plan_, region, x.data(), mean, m2);
    });
  }

  void normalize(bool has_residual, bool relu, bool bypass) {
    const Array x = batch();
    const Array residual = batch();
    const Array y(dtype_, count_, output_offset(bypass));
    const Array high = per_channel();
    const Array scale = per_channel();
    const Array offset = per_channel();
    const batchnorm::Forward pass{
        x.data(),     has_residual ? residual.data() : nullptr, y.data(), relu, bypass, high.data(), scale.data(),
        offset.data()};
    for_each_region([&](const batchnorm::Region& region) {
      check_isa(kernels_.normalize(plan_, region, pass));
      ++calls;
    });
    y.check_defined();
  }

  void sums(Mask mask) {
    const Array x = batch();
    const Array dy = batch();
    const Array y = batch();
    const Array high = per_channel();
    const Array scale = per_channel();
    const Array offset = per_channel();
    const batchnorm::Backward pass{x.data(),
                                   dy.data(),
                                   mask == Mask::given ? y.data() : nullptr,
                                   mask != Mask::none,
                                   false,
                                   nullptr,
                                   nullptr,
                                   false,
                                   high.data(),
                                   scale.data(),
                                   offset.data(),
                                   nullptr,
                                   nullptr};
    for_each_pair([&](const batchnorm::Region& region, double* sum, double* product) {
      return kernels_.sums(plan_, region, pass, sum, product);
    });
  }

  void gradients(Mask mask, bool has_residual, bool frozen, bool bypass) {
    const Array x = batch();
    const Array dy = batch();
    const Array y = batch();
    const std::size_t place = output_offset(bypass);
    const Array dx(dtype_, count_, place);
    const Array dresidual(dtype_, count_, bypass ? place : output_offset(false));
    const Array high = per_channel();
    const Array scale = per_channel();
    const Array offset = per_channel();
    const Array level = per_channel();
    const Array slope = per_channel();
    const batchnorm::Backward pass{x.data(),
                                   dy.data(),
                                   mask == Mask::given ? y.data() : nullptr,
                                   mask != Mask::none,
                                   frozen,
                                   dx.data(),
                                   has_residual ? dresidual.data() : nullptr,
                                   bypass,
                                   high.data(),
                                   scale.data(),
                                   offset.data(),
                                   frozen ? nullptr : level.data(),
                                   frozen ? nullptr : slope.data()};
    for_each_region([&](const batchnorm::Region& region) {
      check_isa(kernels_.input_gradients(plan_, region, pass));
      ++calls;
    });
    dx.check_defined();
    if (has_residual) dresidual.check_defined();
  }

  const batchnorm::Kernels& kernels_;
  DType dtype_;
  batchnorm::Plan plan_;
  std::size_t count_;
  Cycle& cycle_;
};

template <class... Ds>
void run_batchnorm(TypeList<Ds...> /*dtypes*/, const batchnorm::Table& table) {
  Cycle cycle;
  for (const Shape& shape : kShapes) {
    (BatchNorm(table.kernels[static_cast<std::size_t>(Ds::id)], Ds::id, shape, cycle).run(), ...);
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> available;
  for (const Isa isa : available_isas()) available.emplace_back(isa_name(isa));
  const std::vector<std::string> wanted(arguments + std::min(count, 2), arguments + count);
  if (count < 2 || available != wanted) {
    std::printf("available here:");
    for (const std::string& name : available) std::printf(" %s", name.c_str());
    std::printf("\nexpected:");
    for (const std::string& name : wanted) std::printf(" %s", name.c_str());
    std::printf("\n");
    return 2;
  }
  if (RUNNING_ON_VALGRIND == 0) std::printf("not under Valgrind: nothing is checked but that it runs\n");
  set_isa(arguments[1]);
  const KernelTable& table = active_kernels();
  run_updates(table);
  run_step_kernels(DTypes{}, *table.step);
  run_batchnorm(ComputeTypes{}, *table.batchnorm);
  std::printf("%s: %zu rules, %zu calls, %zu wrong\n", arguments[1], table.count, calls, failures);
  return failures == 0 ? 0 : 1;
}
