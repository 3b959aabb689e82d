// What a step reads, writes and computes, and how it is divided: by counting. The kernel units and the drivers around
// them are the package's own, compiled for an instruction set that counts (counting.h) and linked with a parallel_for()
// that does the same.
//
//   counting         each element of each array is read and written as often as the library says, and by nothing else
//   counting --json  what the rules read, write and compute for a parameter in float32
#include "counting.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "batchnorm/plan.h"
#include "core/dtype.h"
#include "core/kernel.h"
#include "core/layout.h"
#include "core/tensor.h"
#include "cpu/batchnorm.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/update.h"

namespace counting {
namespace {

// Elements that are looked after: how often each was read and written.
struct Watched {
  const std::byte* begin;
  std::size_t itemsize;
  std::vector<unsigned> reads;
  std::vector<unsigned> writes;

  bool holds(const void* address) const {
    const auto* const at = static_cast<const std::byte*>(address);
    return std::less_equal<>{}(begin, at) && std::less<>{}(at, begin + itemsize * reads.size());
  }
};

struct Log {
  std::vector<Watched> arrays;
  std::array<std::size_t, 5> operations{};
  std::size_t bytes = 0;
  std::size_t elsewhere = 0;  // accesses to what is not watched
  std::size_t crooked = 0;    // accesses that are not to one whole element

  void watch(const void* data, std::size_t itemsize, std::size_t count) {
    arrays.push_back({static_cast<const std::byte*>(data), itemsize, std::vector<unsigned>(count, 0),
                      std::vector<unsigned>(count, 0)});
  }
  const Watched* find(const void* data) const {
    const auto found = std::ranges::find_if(arrays, [=](const Watched& array) { return array.begin == data; });
    return found == arrays.end() ? nullptr : &*found;
  }
  void access(const void* address, std::size_t count, std::vector<unsigned> Watched::* accesses) {
    for (Watched& array : arrays) {
      if (!array.holds(address)) continue;
      const auto offset = static_cast<std::size_t>(static_cast<const std::byte*>(address) - array.begin);
      if (count != array.itemsize || offset % count != 0) ++crooked;
      ++(array.*accesses)[offset / array.itemsize];
      bytes += count;
      return;
    }
    ++elsewhere;
  }
  void forget_accesses() {
    for (Watched& array : arrays) {
      std::ranges::fill(array.reads, 0U);
      std::ranges::fill(array.writes, 0U);
    }
    operations = {};
    bytes = elsewhere = crooked = 0;
  }
};

Log log;  // of the one thread that there is

// How the work was divided.
struct Division {
  std::size_t regions = 0;  // calls of parallel_for that may go to several threads
  std::size_t parts = 0;
  std::size_t kernels = 0;  // calls of update kernels that are counted(): below
};

Division division;

}  // namespace

void note_read(const void* from, std::size_t bytes) { log.access(from, bytes, &Watched::reads); }
void note_write(const void* to, std::size_t bytes) { log.access(to, bytes, &Watched::writes); }
void note(Operation operation) { ++log.operations[static_cast<std::size_t>(operation)]; }

}  // namespace counting

// --- In the place of dispatch.cpp and parallel.cpp -------------------------------------------------------------------

namespace onepass {

extern const KernelTable kernels_counting;

const KernelTable& active_kernels() { return kernels_counting; }

// Last part first: nobody may rely on their order.
void parallel_for(std::size_t threads, std::size_t parts, void (*body)(void*, std::size_t), void* context) {
  if (std::min(threads, parts) > 1) ++counting::division.regions;
  counting::division.parts += parts;
  for (std::size_t part = parts; part > 0; --part) body(context, part - 1);
}

}  // namespace onepass

namespace {

using namespace onepass;
using counting::division;
using counting::log;
using counting::Operation;

std::size_t checks = 0;
std::size_t failures = 0;

void check(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  if (++failures <= 40) std::printf("%s\n", what.c_str());
}

void check_equal(std::size_t counted, std::size_t expected, const std::string& what) {
  check(counted == expected, what + ": " + std::to_string(counted) + ", not " + std::to_string(expected));
}

constexpr const char* kStreamNames[kStreams] = {"param", "grad",   "slot 0",    "slot 1",     "slot 2",
                                                "ema",   "mirror", "remainder", "accumulator"};

using Memory = std::vector<double>;  // of any dtype: aligned, and small positive numbers in all of them

Memory memory_of(std::size_t count, DType dtype) {
  Memory memory(count * info(dtype).itemsize / sizeof(double) + 1);
  std::memset(memory.data(), 0x3C, memory.size() * sizeof(double));
  return memory;
}

void check_all(const std::vector<unsigned>& counts, unsigned expected, const std::string& what) {
  const auto wrong = std::ranges::find_if(counts, [=](unsigned count) { return count != expected; });
  check(wrong == counts.end(), wrong == counts.end()
                                   ? what
                                   : what + ": element " + std::to_string(wrong - counts.begin()) + " " +
                                         std::to_string(*wrong) + " times, not " + std::to_string(expected));
}

// Each element of an array equally often.
void check_accesses(const void* data, unsigned reads, unsigned writes, const std::string& what) {
  const counting::Watched* const array = log.find(data);
  check(array != nullptr, what + ": is not watched");
  if (array == nullptr) return;
  check_all(array->reads, reads, what + ": read");
  check_all(array->writes, writes, what + ": written");
}

// Nothing but what is watched, in whole elements. `buffers`: memory of the driver's own is used, too.
void check_nothing_else(const std::string& what, bool buffers = false) {
  if (!buffers) check_equal(log.elsewhere, 0, what + ": accesses elsewhere");
  check_equal(log.crooked, 0, what + ": accesses to something else than an element");
}

// --- One pass --------------------------------------------------------------------------------------------------------

// What a step can be asked for beyond the update itself.
struct Wishes {
  const char* name;
  bool terms = false;  // scale, clip_value, l1, l2, decay
  bool zero_grads = false;
  bool ema = false;
  bool ema_starts = false;
  bool mirror = false;
  bool remainder = false;
  bool accumulator = false;
  bool gradient = true;
  bool noise = false;
  bool stochastic = false;
};

constexpr Wishes kWishes[] = {
    {.name = "plain"},
    {.name = "terms", .terms = true},
    {.name = "zero_grads", .zero_grads = true},
    {.name = "ema", .ema = true},
    {.name = "first ema", .ema = true, .ema_starts = true},
    {.name = "mirror", .mirror = true},
    {.name = "remainder", .remainder = true},
    {.name = "accumulator", .accumulator = true},
    {.name = "accumulator alone", .accumulator = true, .gradient = false},
    {.name = "noise", .noise = true},
    {.name = "stochastic", .stochastic = true},
    {.name = "all", .terms = true, .zero_grads = true, .ema = true, .mirror = true, .accumulator = true},
    {.name = "all, split",
     .terms = true,
     .zero_grads = true,
     .ema = true,
     .mirror = true,
     .remainder = true,
     .accumulator = true},
    {.name = "all, by chance",
     .terms = true,
     .zero_grads = true,
     .ema = true,
     .mirror = true,
     .accumulator = true,
     .noise = true,
     .stochastic = true},
};

// A tensor with arrays of its own, all of which are watched.
class Case {
 public:
  Case(const Kernel& kernel, std::size_t storage, const Wishes& wishes, std::size_t count)
      : coefficients_(kernel.coefficients.count, 0.5) {
    const StorageInfo row = kStorages[storage];
    if (wishes.terms) {
      around_.scaling.scale = 0.5;
      around_.l1 = 0.125;
      around_.l2 = 0.25;
      around_.decay = 0.75;
      around_.clip_value = 0.5;
      tensor_.clip = 0.5;
    }
    around_.scaling.accumulate = wishes.accumulator ? 2.0 : 1.0;
    around_.noise = wishes.noise ? 0.5 : 0.0;
    around_.ema_decay = 0.75;
    around_.ema_starts = wishes.ema_starts;
    around_.zero_grads = wishes.zero_grads;

    tensor_.kernel = &kernel;
    tensor_.storage = storage;
    tensor_.count = count;
    tensor_.coefficients = coefficients_.data();
    tensor_.around = &around_;
    tensor_.stochastic = wishes.stochastic;
    set(kParam, row.param);
    if (wishes.gradient) set(kGrad, row.grad);
    for (std::size_t k = 0; k < kernel.slots.count; ++k) set(kFirstSlot + k, row.state);
    if (wishes.ema) set(kEma, wishes.remainder ? DType::float32 : row.param);
    if (wishes.mirror) set(kMirror, DType::float16);
    if (wishes.remainder) set(kRemainder, DType::uint16);
    if (wishes.accumulator) set(kAccumulator, info(row.param).compute);
  }

  Tensor& tensor() { return tensor_; }

  // `runs` of reads and writes as the library declares them.
  void check_declared(const std::string& what) const {
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const std::byte* const data = tensor_.streams.data[stream];
      if (data == nullptr) continue;
      check_accesses(data, reads(tensor_, stream) ? 1 : 0, writes(tensor_, stream) ? 1 : 0,
                     what + ", " + kStreamNames[stream]);
    }
    check_equal(log.bytes, traffic(tensor_), what + ": bytes");
  }

 private:
  void set(std::size_t stream, DType dtype) {
    memories_.push_back(memory_of(tensor_.count, dtype));
    tensor_.set(stream, memories_.back().data(), dtype);
    log.watch(memories_.back().data(), info(dtype).itemsize, tensor_.count);
  }

  std::vector<double> coefficients_;
  Around around_;
  Tensor tensor_;
  std::vector<Memory> memories_;
};

std::string title(const Kernel& kernel, std::size_t storage, const char* wishes) {
  const StorageInfo row = kStorages[storage];
  return std::string(kernel.rule) + " (" + info(row.param).name + ", " + info(row.grad).name + ", " +
         info(row.state).name + "), " + wishes;
}

// Below and above what is worth an aligned beginning; in one part and in several.
void check_passes() {
  for (std::size_t k = 0; k < kernels_counting.count; ++k) {
    const Kernel& kernel = kernels_counting.kernels[k];
    for (std::size_t storage = 0; storage < Storages::size; ++storage) {
      for (const Wishes& wishes : kWishes) {
        if (wishes.remainder && kStorages[storage].param != DType::bfloat16) continue;
        for (const std::size_t count : {std::size_t{7}, std::size_t{1063}}) {
          for (const std::size_t threads : {std::size_t{1}, std::size_t{3}}) {
            log.arrays.clear();
            Case one(kernel, storage, wishes, count);
            log.forget_accesses();
            update({&one.tensor(), 1}, threads);
            const std::string what = title(kernel, storage, wishes.name);
            one.check_declared(what);
            check_nothing_else(what, wishes.noise || wishes.stochastic);
          }
        }
      }
    }
  }
}

// A gradient that lies in another order is gathered by plain code, and read from the gathered block: nothing else of it
// is touched, and everything else is as before.
void check_gathered() {
  const Kernel& kernel = kernels_counting.kernels[0];
  log.arrays.clear();
  Case one(kernel, find_storage(DType::float32, DType::float32, DType::float32), kWishes[0], 35 * 40);
  Walk walk;
  walk.axes[kGrad] = {{40, 4}, {35, 160}};
  walk.gather[kGrad] = true;
  one.tensor().walk = &walk;
  log.forget_accesses();
  update({&one.tensor(), 1}, 2);
  check_accesses(one.tensor().streams.data[kParam], 1, 1, "gathered, param");
  check_accesses(one.tensor().streams.data[kGrad], 0, 0, "gathered, grad");
  check_equal(log.elsewhere, one.tensor().count, "gathered: accesses to blocks");
}

void check_norms() {
  for (const StorageInfo& row : kStorages) {
    for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
      log.arrays.clear();
      const std::size_t storage = find_storage(row.param, row.grad, row.state);
      Case one(kernels_counting.kernels[0], storage, kWishes[0], 3 * kSquaresBlock + 77);
      log.forget_accesses();
      Squares sum{};
      measure({&one.tensor(), 1}, threads, {&sum, 1});
      const std::string what = std::string("norm of ") + info(row.grad).name;
      check(sum.sum > 0.0 && sum.finite, what + ": a wrong sum");
      check_accesses(one.tensor().streams.data[kParam], 0, 0, what + ", param");
      check_accesses(one.tensor().streams.data[kGrad], 1, 0, what + ", grad");
    }
  }
}

// --- Batch normalization ---------------------------------------------------------------------------------------------

struct Shape {
  const char* name;
  std::size_t outer, channels, inner;
};

constexpr Shape kShapes[] = {{"NCHW", 6, 5, 300}, {"NHWC", 2048, 256, 1}, {"NC", 520, 1000, 1}};

// The values of a block are looked at before they are summed, so that sums are of deviations from a number nearby: a
// few rows, or a piece of a run, that the sums then find in the first-level cache.
std::size_t looked_at_twice(const Shape& shape) {
  const batchnorm::Plan plan = batchnorm::make_plan(shape.outer, shape.channels, shape.inner, sizeof(float));
  const counting::Watched* const x = &log.arrays.front();
  const auto more = std::ranges::count_if(x->reads, [](unsigned count) { return count == 3; });
  const std::size_t most =
      plan.blocks * (plan.long_runs ? batchnorm::kSampleRun * shape.channels
                                    : batchnorm::kSampleRows * plan.fold * shape.channels * shape.inner);
  check(static_cast<std::size_t>(more) <= most, std::string(shape.name) + ": samples larger than they may be");
  return static_cast<std::size_t>(more);
}

void check_batchnorm(const Shape& shape, bool channelwise) {
  const std::size_t count = shape.outer * shape.channels * shape.inner;
  constexpr std::size_t mebibyte = std::size_t{1} << 20;
  set_cache_sizes(channelwise ? CacheSizes{2 * mebibyte, 64 * mebibyte} : CacheSizes{4096, 4096});
  std::vector<float> x(count), y(count), dy(count, 0.5F), dx(count), residual(count, 1.0F), dresidual(count);
  for (std::size_t k = 0; k < count; ++k) x[k] = static_cast<float>(k * 2654435761U % 1000U);
  std::vector<double> mean(shape.channels), invstd(shape.channels);
  const auto watch = [&] {
    log.arrays.clear();
    for (const auto* const array : {&x, &y, &dy, &dx, &residual, &dresidual}) {
      log.watch(array->data(), sizeof(float), count);
    }
    division = {};
  };
  const std::string name = std::string(shape.name) + (channelwise ? " by channels" : " by chunks");
  // Groups of channels go their ways alone, unless rows are so short that there is one group. Or all sums are made,
  // then what follows from them where that is much, then the map.
  const bool folded = batchnorm::make_plan(shape.outer, shape.channels, shape.inner, sizeof(float)).fold > 1;
  const std::size_t finish = shape.channels > 256 ? 1 : 0;
  const std::size_t regions = channelwise && !folded ? 1 : 2 + finish;

  for (const bool training : {true, false}) {
    watch();
    batchnorm::ForwardCall forward;
    forward.outer = shape.outer;
    forward.channels = shape.channels;
    forward.inner = shape.inner;
    forward.x = x.data();
    forward.y = y.data();
    forward.residual = residual.data();
    forward.eps = 1e-5;
    forward.training = training;
    std::vector<float> running_mean(shape.channels), running_var(shape.channels, 1.0F);
    forward.running_mean = running_mean.data();
    forward.running_var = running_var.data();
    forward.mean = mean.data();
    forward.invstd = invstd.data();
    batchnorm::forward(forward, 2);
    const std::string what = "forward " + name + (training ? ", training" : ", not training");
    if (training) {
      const counting::Watched& input = log.arrays.front();
      const std::size_t samples = looked_at_twice(shape);
      const auto twice =
          static_cast<std::size_t>(std::ranges::count_if(input.reads, [](unsigned reads) { return reads == 2; }));
      check_equal(twice + samples, count, what + ": elements of x that are read for the sums and for y");
      check_all(input.writes, 0, what + ", x: written");
    } else {
      check_accesses(x.data(), 1, 0, what + ", x");
    }
    check_accesses(residual.data(), 1, 0, what + ", residual");
    check_accesses(y.data(), 0, 1, what + ", y");
    check_accesses(dy.data(), 0, 0, what + ", dy");
    check_equal(division.regions, training ? regions : 1, what + ": regions");

    watch();
    batchnorm::BackwardCall backward;
    backward.outer = shape.outer;
    backward.channels = shape.channels;
    backward.inner = shape.inner;
    backward.x = x.data();
    backward.y = y.data();
    backward.relu = true;
    backward.dy = dy.data();
    backward.frozen = !training;
    backward.mean = mean.data();
    backward.invstd = invstd.data();
    backward.dx = dx.data();
    backward.dresidual = dresidual.data();
    batchnorm::backward(backward, 2);
    const std::string back = "backward " + name + (training ? "" : ", frozen");
    check_accesses(dy.data(), 2, 0, back + ", dy");
    check_accesses(y.data(), 2, 0, back + ", y");
    check_accesses(x.data(), 2, 0, back + ", x");  // frozen, compilers leave out the second: nothing is done with it
    check_accesses(dx.data(), 0, 1, back + ", dx");
    check_accesses(dresidual.data(), 0, 1, back + ", dresidual");
    check_equal(division.regions, training ? regions : 1 + finish, back + ": regions");
  }
  set_cache_sizes({0, 0});
}

// --- How the work is divided -----------------------------------------------------------------------------------------

UpdateFn counted_kernel = nullptr;

Isa count_and_run(const Part& part) {
  ++division.kernels;
  return counted_kernel(part);
}

// Tensors of Adam, with kernels that count their calls.
struct Many {
  Kernel kernel;
  std::vector<std::unique_ptr<Case>> cases;
  std::vector<Tensor> tensors;

  Many(std::size_t count, std::size_t elements, const Wishes& wishes) : kernel(adam()) {
    log.arrays.clear();
    const std::size_t storage = find_storage(DType::float32, DType::float32, DType::float32);
    UpdateFn& used = (std::string_view(wishes.name) == "plain" ? kernel.plain : kernel.whole)[storage];
    counted_kernel = used;
    used = count_and_run;
    for (std::size_t k = 0; k < count; ++k) {
      cases.push_back(std::make_unique<Case>(kernel, storage, wishes, elements));
      tensors.push_back(cases.back()->tensor());
      log.arrays.clear();  // a search through thousands of arrays takes long
    }
    division = {};
  }
  static Kernel adam() {
    const Kernel* const end = kernels_counting.kernels + kernels_counting.count;
    return *std::find_if(kernels_counting.kernels, end,
                         [](const Kernel& kernel) { return std::string_view(kernel.rule) == "adam"; });
  }
};

void check_division() {
  constexpr std::size_t threads = 3;
  set_serial_bytes(std::size_t{4} << 20);
  {
    Many small(10, 1000, kWishes[0]);
    update(small.tensors, threads);
    check_equal(division.regions, 0, "a small step: regions");
    check_equal(division.kernels, 10, "a small step: kernels, one for each tensor");
  }
  set_serial_bytes(0);
  const Wishes& all = *std::ranges::find_if(kWishes, [](const Wishes& w) { return std::string_view(w.name) == "all"; });
  for (const Wishes& wishes : {kWishes[0], all}) {
    const std::string what = std::string(", ") + wishes.name;
    Many one(1, 100000, wishes);
    update(one.tensors, threads);
    check_equal(division.regions, 1, "one tensor: regions" + what);
    check_equal(division.kernels, division.parts, "one tensor: kernels, one for each part" + what);
    check(division.parts >= threads, "one tensor: fewer parts than threads" + what);

    Many many(1000, 100, wishes);
    update(many.tensors, threads);
    check_equal(division.regions, 1, "1000 tensors: regions" + what);
    check(
        division.kernels >= 1000 && division.kernels < 1000 + division.parts,
        "1000 tensors: " + std::to_string(division.kernels) + " kernels: one for each tensor and for each cut" + what);

    division = {};
    std::vector<Squares> sums(many.tensors.size());
    measure(many.tensors, threads, sums);  // what clipping by the norm adds
    update(many.tensors, threads);
    check_equal(division.regions, 2, "1000 tensors and their norm: regions" + what);
  }
}

// --- What rules cost -------------------------------------------------------------------------------------------------

void print_json() {
  constexpr std::size_t count = 16;
  const std::size_t storage = find_storage(DType::float32, DType::float32, DType::float32);
  const char* separator = "{";
  for (std::size_t k = 0; k < kernels_counting.count; ++k) {
    const Kernel& kernel = kernels_counting.kernels[k];
    if (kernel.yardstick) continue;
    log.arrays.clear();
    Case one(kernel, storage, kWishes[0], count);
    log.forget_accesses();
    update({&one.tensor(), 1}, 1);
    std::size_t read = 0;
    std::size_t written = 0;
    for (const counting::Watched& array : log.arrays) {
      for (std::size_t i = 0; i < count; ++i) {
        read += array.reads[i];
        written += array.writes[i];
      }
    }
    const auto each = [&](Operation operation) { return log.operations[static_cast<std::size_t>(operation)] / count; };
    std::printf(
        "%s\n  \"%s\": {\"slots\": %zu, \"reads\": %zu, \"writes\": %zu, \"adds\": %zu, \"multiplies\": %zu, "
        "\"divides\": %zu, \"roots\": %zu, \"others\": %zu}",
        separator, kernel.rule, kernel.slots.count, read / count, written / count, each(Operation::add),
        each(Operation::multiply), each(Operation::divide), each(Operation::root), each(Operation::other));
    separator = ",";
  }
  std::printf("\n}\n");
}

}  // namespace

int main(int argc, char** argv) {
  set_serial_bytes(0);
  if (argc == 2 && std::string_view(argv[1]) == "--json") {
    print_json();
    return 0;
  }
  if (argc != 1) {
    std::fprintf(stderr, "usage: %s [--json]\n", argv[0]);
    return 2;
  }
  check_passes();
  check_gathered();
  check_norms();
  for (const Shape& shape : kShapes) {
    for (const bool channelwise : {true, false}) check_batchnorm(shape, channelwise);
  }
  check_division();
  std::printf("counting: %zu checks, %zu wrong\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
