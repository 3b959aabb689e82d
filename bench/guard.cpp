// Every kernel, and the calls around them, over one number of elements and then over a larger one, for Valgrind's
// callgrind, which counts instructions. guard.py runs it; each count is that of a dump with a name:
//
//   "<case> <n>": the work of the case over n elements. Two of a case, and their difference is what elements cost:
//   what is paid once for a call, and by the counting itself, is in both.
//   "<case> / <n>": one call, which is to be divided by n.
//
// guard <instruction set> | guard --list
//
// Cases are read from the kernel table: a new rule, dtype or row of storage is counted with the others.
#include <valgrind/callgrind.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/kernel.h"
#include "core/philox.h"
#include "core/tensor.h"
#include "core/type_list.h"
#include "cpu/batchnorm.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/float_mode.h"
#include "cpu/update.h"

namespace {

using namespace onepass;

// Whole vectors on every instruction set, and whole groups of random numbers.
constexpr std::size_t kFew = 1024;
constexpr std::size_t kMore = 3072;
constexpr std::size_t kAlignment = 64;

// --- Arrays that are the same in each run
// ------------------------------------------------------------------------------

class Array {
 public:
  explicit Array(std::size_t bytes) : bytes_(bytes), block_(bytes + kAlignment) {
    const auto address = reinterpret_cast<std::uintptr_t>(block_.data());
    offset_ = (kAlignment - address % kAlignment) % kAlignment;
  }
  std::byte* data() { return block_.data() + offset_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::vector<std::byte> block_;
  std::size_t offset_;
};

template <class D>
void fill_as(std::byte* to, std::size_t count) {
  std::uint32_t seed = 1;
  for (std::size_t k = 0; k < count; ++k) {
    seed = seed * 1664525U + 1013904223U;
    const double magnitude = static_cast<double>(1U + (seed >> 8U)) * 0x1p-24;
    const typename D::Storage stored =
        D::narrow(static_cast<typename D::Compute>(seed % 2 == 0 ? magnitude : -magnitude));
    std::memcpy(to + k * sizeof stored, &stored, sizeof stored);
  }
}

// Numbers between -1 and 1, as they lie in memory; made once for each dtype.
template <class... Ds>
const std::byte* numbers(TypeList<Ds...> /*dtypes*/, DType dtype) {
  static std::vector<Array> made = [] {
    std::vector<Array> arrays;
    (arrays.emplace_back(kMore * sizeof(typename Ds::Storage)), ...);
    std::size_t k = 0;
    (fill_as<Ds>(arrays[k++].data(), kMore), ...);
    return arrays;
  }();
  return made[static_cast<std::size_t>(dtype == DType::uint16 ? DType::bfloat16 : dtype)].data();
}

void refill(std::byte* to, DType dtype) { std::memcpy(to, numbers(DTypes{}, dtype), kMore * info(dtype).itemsize); }

// --- Counting --------------------------------------------------------------------------------------------------------

template <class Call>
void count(const std::string& name, Call call) {
  CALLGRIND_ZERO_STATS;
  call();
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

// `prepare()` before each call(n), so that both find the same numbers. What the first call of all does once is counted
// in neither.
template <class Prepare, class Call>
void count_elements(const std::string& name, std::size_t few, std::size_t more, std::size_t per_n, Prepare prepare,
                    Call call) {
  prepare();
  call(few);
  for (const std::size_t n : {few, more}) {
    prepare();
    const std::string title = name + " " + std::to_string(n * per_n);
    count(title, [&] { call(n); });
  }
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "guard: %s\n", what);
  std::exit(1);
}

void require_isa(Isa ran) { require(ran == active_kernels().isa, "a kernel of another instruction set ran"); }

// --- Updates ---------------------------------------------------------------------------------------------------------

struct Wishes {
  const char* name;
  bool everything = false;  // that no other member names
  bool split = false;
  bool noise = false;
  bool rounding = false;
};

constexpr Wishes kPlain = {.name = ""};
constexpr Wishes kRounding = {.name = "/whole-rounding", .rounding = true};
constexpr Wishes kWhole = {.name = "/whole", .everything = true};
constexpr Wishes kSplit = {.name = "/whole-split", .everything = true, .split = true};
constexpr Wishes kRandom = {.name = "/whole-random", .everything = true, .noise = true, .rounding = true};

bool is_narrow(DType dtype) { return info(dtype).itemsize < info(info(dtype).compute).itemsize; }

// The arrays of a part and what is done to them. All terms are there in the forms that have everything.
class Step {
 public:
  Step(const Kernel& kernel, std::size_t storage, const Wishes& wishes)
      : kernel_(kernel),
        storage_(storage),
        whole_(wishes.everything || wishes.rounding),
        coefficients_(kernel.coefficients.count, 0.5) {
    const StorageInfo row = kStorages[storage];
    const DType compute = info(row.param).compute;
    add(kParam, row.param);
    add(kGrad, row.grad);
    for (std::size_t k = 0; k < kernel.slots.count; ++k) add(kFirstSlot + k, row.state);
    static constexpr RandomKey key{12345, 6, 7, Purpose::rounding};
    if (wishes.rounding && (is_narrow(row.param) || is_narrow(row.state))) part_.random.rounding = &key;
    if (!wishes.everything) return;
    around_.scaling = {.scale = 0.5, .accumulate = 3.0};
    around_.l1 = 0.125;
    around_.l2 = 0.25;
    around_.decay = 0.75;
    around_.clip_value = 0.5;
    around_.ema_decay = 0.75;
    around_.zero_grads = true;
    add(kEma, wishes.split ? compute : row.param);
    add(kMirror, DType::bfloat16);
    add(kAccumulator, compute);
    if (wishes.split) add(kRemainder, DType::uint16);
    if (!wishes.noise) return;
    around_.noise = 0.5;
    noise_ = Array(kMore * sizeof(float));
    refill(noise_.data(), DType::float32);
    part_.random.noise = noise_.as<float>();
  }

  void count_it(const std::string& name) {
    part_.coefficients = coefficients_.data();
    part_.around = &around_;
    part_.clip = 1.0;
    part_.mirror = DType::bfloat16;
    const UpdateFn update = (whole_ ? kernel_.whole : kernel_.plain)[storage_];
    count_elements(
        name, kFew, kMore, 1,
        [&] {
          for (auto& [dtype, array] : arrays_) refill(array.data(), dtype);
        },
        [&](std::size_t n) {
          const FloatMode mode;
          part_.count = n;
          require_isa(update(part_));
        });
  }

 private:
  void add(std::size_t stream, DType dtype) {
    arrays_.emplace_back(dtype, Array(kMore * info(dtype).itemsize));
    part_.streams.data[stream] = arrays_.back().second.data();
  }

  const Kernel& kernel_;
  std::size_t storage_;
  bool whole_;
  std::vector<double> coefficients_;
  Around around_;
  std::vector<std::pair<DType, Array>> arrays_;
  Array noise_{0};
  Part part_{};
};

std::string storage_name(std::size_t storage) {
  const StorageInfo row = kStorages[storage];
  return std::string(info(row.param).name) + "-" + info(row.grad).name + "-" + info(row.state).name;
}

void count_updates(const KernelTable& table) {
  for (std::size_t k = 0; k < table.count; ++k) {
    const Kernel& kernel = table.kernels[k];
    for (std::size_t storage = 0; storage < Storages::size; ++storage) {
      const auto add = [&](const Wishes& wishes) {
        Step(kernel, storage, wishes).count_it(std::string(kernel.rule) + "/" + storage_name(storage) + wishes.name);
      };
      add(kPlain);
      if (kernel.yardstick) continue;
      const StorageInfo row = kStorages[storage];
      const bool is_adam = std::string_view(kernel.rule) == "adam";
      const bool is_float32 = row.param == DType::float32 && row.grad == DType::float32 && row.state == DType::float32;
      // What surrounds the rules is the same code for all of them.
      if (is_float32 || is_adam) add(kWhole);
      if (is_adam && row.param == DType::bfloat16) add(kSplit);
      if (is_adam) add(kRandom);
      if (is_adam && (is_narrow(row.param) || is_narrow(row.state))) add(kRounding);
    }
  }
}

// --- The rest of a step ----------------------------------------------------------------------------------------------

template <class... Ds>
void count_step_kernels(TypeList<Ds...> /*dtypes*/, const StepKernels& kernels) {
  const auto of_dtype = [&](DType dtype) {
    const DTypeKernels& row = kernels.dtypes[static_cast<std::size_t>(dtype)];
    const std::string end = std::string("/") + info(dtype).name;
    Array values(kMore * info(dtype).itemsize);
    Array sums(kMore * sizeof(double));
    Array other(kMore * sizeof(double));
    const auto prepare = [&] {
      refill(values.data(), dtype);
      std::memset(sums.data(), 0, sums.bytes());
      refill(other.data(), info(dtype).compute);
    };
    count_elements("squares" + end, kFew, kMore, 1, prepare, [&](std::size_t n) {
      const FloatMode mode;
      require(row.squares(values.data(), n).finite, "squares: not finite");
    });
    count_elements("add_squares" + end, kFew, kMore, 1, prepare, [&](std::size_t n) {
      const FloatMode mode;
      row.add_squares(values.data(), n, sums.as<double>());
    });
    count_elements("accumulate" + end, kFew, kMore, 1, prepare, [&](std::size_t n) {
      const FloatMode mode;
      row.accumulate(values.data(), n, 0.5, other.data(), other.data());
    });
    Array mirror(kMore * sizeof(std::uint16_t));
    const Around around;
    Part part{};
    part.streams.data[kParam] = values.data();
    part.streams.data[kMirror] = mirror.data();
    part.around = &around;
    part.clip = 1.0;
    part.mirror = DType::bfloat16;
    count_elements("finish" + end, kFew, kMore, 1, prepare, [&](std::size_t n) {
      const FloatMode mode;
      part.count = n;
      require_isa(row.finish(part, other.data()));
    });
    count_elements("show" + end, kFew, kMore, 1, prepare, [&](std::size_t n) {
      const FloatMode mode;
      part.count = n;
      row.show(part);
    });
  };
  (of_dtype(Ds::id), ...);

  Array high(kMore * sizeof(std::uint16_t));
  Array low(kMore * sizeof(std::uint16_t));
  Array numbers(kMore * sizeof(std::uint32_t));
  const auto prepare = [&] {
    refill(high.data(), DType::bfloat16);
    refill(low.data(), DType::uint16);
  };
  const RandomKey key{12345, 6, 7, Purpose::noise};
  count_elements("join", kFew, kMore, 1, prepare, [&](std::size_t n) {
    const FloatMode mode;
    kernels.join(high.data(), low.data(), n, numbers.as<float>());
  });
  count_elements("normals", kFew, kMore, 1, prepare, [&](std::size_t n) {
    const FloatMode mode;
    kernels.normals(key, 0, n, numbers.as<float>());
  });
}

// --- Whole calls -----------------------------------------------------------------------------------------------------

// Tensors of Adam in float32, of `elements` each.
class Many {
 public:
  Many(std::size_t count, std::size_t elements)
      : kernel_(*find_kernel(active_kernels(), "adam")), coefficients_(kernel_.coefficients.count, 0.5) {
    for (std::size_t k = 0; k < count; ++k) {
      Tensor& tensor = tensors_.emplace_back();
      tensor.kernel = &kernel_;
      tensor.storage = find_storage(DType::float32, DType::float32, DType::float32);
      tensor.count = elements;
      tensor.coefficients = coefficients_.data();
      tensor.around = &around_;
      for (const std::size_t stream :
           {std::size_t{kParam}, std::size_t{kGrad}, kFirstSlot + std::size_t{0}, kFirstSlot + std::size_t{1}}) {
        arrays_.emplace_back(elements * sizeof(float));
        fill_as<Float32>(arrays_.back().data(), elements);
        tensor.set(stream, arrays_.back().data(), DType::float32);
      }
    }
  }
  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  const Kernel& kernel_;
  std::vector<double> coefficients_;
  Around around_;
  std::vector<Array> arrays_;
  std::vector<Tensor> tensors_;
};

void count_calls() {
  const auto steps = [](const char* name, std::size_t tensors, std::size_t elements) {
    const Many many(tensors, elements);
    std::vector<Squares> sums(tensors);
    const auto update_them = [&] { require_isa(update(many.tensors(), 1)); };
    const auto measure_them = [&] { measure(many.tensors(), 1, sums); };
    update_them();  // takes its memory
    measure_them();
    count(std::string("call/update/") + name + " / " + std::to_string(tensors), update_them);
    count(std::string("call/measure/") + name + " / " + std::to_string(tensors), measure_them);
  };
  steps("1x64", 1, 64);
  steps("100x100", 100, 100);
}

// --- Batch normalization ---------------------------------------------------------------------------------------------

struct Shape {
  const char* name;
  std::size_t outer, more_outer, channels, inner;  // whole blocks of the plan, of one chunk
};

constexpr Shape kShapes[] = {{"NCHW", 16, 48, 2, 256}, {"NHWC", 2048, 4096, 32, 1}, {"NC", 64, 128, 1000, 1}};

template <class D>
void count_batchnorm(const Shape& shape) {
  using T = typename D::Storage;
  const std::size_t per_channel = shape.more_outer * shape.inner;
  Array x(per_channel * shape.channels * sizeof(T));
  Array y(x.bytes());
  Array dy(x.bytes());
  fill_as<D>(x.data(), per_channel * shape.channels);
  fill_as<D>(dy.data(), per_channel * shape.channels);
  std::vector<double> mean(shape.channels);
  std::vector<double> invstd(shape.channels);
  const auto batch = [&](auto& call, std::size_t outer) {
    call.dtype = D::id;
    call.outer = outer;
    call.channels = shape.channels;
    call.inner = shape.inner;
    call.x = x.data();
    call.relu = true;
  };
  const auto forward = [&](std::size_t outer, bool training) {
    batchnorm::ForwardCall call;
    batch(call, outer);
    call.y = y.data();
    call.eps = 1e-5;
    call.training = training;
    std::vector<T> zeros(shape.channels, T(0));
    std::vector<T> ones(shape.channels, T(1));
    call.running_mean = zeros.data();
    call.running_var = ones.data();
    call.mean = mean.data();
    call.invstd = invstd.data();
    require_isa(batchnorm::forward(call, 1));
  };
  const auto backward = [&](std::size_t outer) {
    batchnorm::BackwardCall call;
    batch(call, outer);
    call.dy = dy.data();
    call.mean = mean.data();
    call.invstd = invstd.data();
    call.dx = y.data();
    require_isa(batchnorm::backward(call, 1));
  };
  const auto nothing = [] {};
  const std::string end = std::string("/") + shape.name + "/" + D::name;
  const std::size_t per_outer = shape.channels * shape.inner;
  const auto count_pass = [&](const char* name, auto pass) {
    count_elements(name + end, shape.outer, shape.more_outer, per_outer, nothing, pass);
  };
  count_pass("batchnorm/forward", [&](std::size_t outer) { forward(outer, true); });
  count_pass("batchnorm/inference", [&](std::size_t outer) { forward(outer, false); });
  forward(shape.outer, true);
  count_pass("batchnorm/backward", backward);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--list") {
    for (const Isa isa : available_isas()) std::puts(isa_name(isa));
    return 0;
  }
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s <instruction set> | --list\n", argv[0]);
    return 2;
  }
  set_isa(std::string_view(argv[1]));
  set_cache_sizes({std::size_t{1} << 20, std::size_t{8} << 20});  // whatever this machine has
  CALLGRIND_START_INSTRUMENTATION;
  count_updates(active_kernels());
  count_step_kernels(DTypes{}, *active_kernels().step);
  count_calls();
  for (const Shape& shape : kShapes) {
    count_batchnorm<Float32>(shape);
    count_batchnorm<Float64>(shape);
  }
  return 0;
}
