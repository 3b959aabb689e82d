// Every kernel by itself, under google-benchmark: each rule in each storage, batch normalization in each layout, and
// norms; for each instruction set of this machine, each size and each number of threads. What there is to measure is
// read from the library's own lists, so that a new rule, dtype or instruction set needs no line here.
//
//   micro --benchmark_filter='update/adam/.*/avx2'  and all other flags of google-benchmark
//
// These are the kernels' own speeds. Steps follow one another on the same arrays, and small arrays stay in the caches
// on purpose: how fast a step is whose data have to be fetched is a matter of 16M, and of bench/peers. Calls go through
// the library's C++ face, so that choosing the kernel and dividing the work are included. A call of few bytes runs on
// the calling thread, whatever `threads` says, because that is what the library does: `threads_used` is 1 then.
//
// Times are those of one call. Counters are made of medians over samples of at least kSampleSeconds:
//
//   bytes_per_second       what the call must read and write at the least (traffic() in core/tensor.h)
//   parameters_per_second  for batch normalization elements_per_second
//   share_of_traffic       the time of the yardstick with the same streams and next to no arithmetic
//                          (rules/traffic.h) over that of the rule: 1 is as fast as the memory allows. Rule and
//                          yardstick run in turns, within one benchmark, over the same arrays
//   threads_used           among how many threads the library divides the call
//
// What was computed is looked at after each benchmark: results that are not finite, parameters that have not moved and
// an instruction set other than the wanted one are errors, and the exit status is 1 then.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "core/dtype.h"
#include "core/kernel.h"
#include "core/tensor.h"
#include "cpu/batchnorm.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/update.h"

#if !defined(ONEPASS_VERSION)
#define ONEPASS_VERSION "unknown"
#endif
#if !defined(ONEPASS_COMMIT)
#define ONEPASS_COMMIT "unknown"
#endif
#if !defined(ONEPASS_MIN_TIME)
#define ONEPASS_MIN_TIME "0.01"
#endif

namespace {

using namespace onepass;
using namespace onepass::bench;
using benchmark::State;

bool failed = false;

void fail(State& state, const std::string& why) {
  failed = true;
  state.SkipWithError(why.c_str());
}

// --- What is measured ------------------------------------------------------------------------------------------------

struct Size {
  const char* name;
  std::size_t count;
};

constexpr Size kSizes[] = {{"1K", std::size_t{1} << 10},
                           {"32K", std::size_t{1} << 15},
                           {"1M", std::size_t{1} << 20},
                           {"16M", std::size_t{1} << 24}};

// Of batch normalization, as (outer, channels, inner).
struct Batch {
  const char* layout;
  const char* shape;
  std::size_t outer, channels, inner;

  std::size_t count() const { return outer * channels * inner; }
};

constexpr Batch kBatches[] = {{"NC", "4096x1024", 4096, 1024, 1},
                              {"NCHW", "32x64x56x56", 32, 64, std::size_t{56} * 56},
                              {"NHWC", "32x64x56x56", std::size_t{32} * 56 * 56, 64, 1},
                              {"NCHW", "128x512x14x14", 128, 512, std::size_t{14} * 14},
                              {"NHWC", "128x512x14x14", std::size_t{128} * 14 * 14, 512, 1}};

std::string storage_name(const StorageInfo& row) {
  return std::string(info(row.param).name) + "-" + info(row.grad).name + "-" + info(row.state).name;
}

// Powers of two, and all that there are.
std::vector<std::size_t> thread_counts() {
  const std::size_t cpus = usable_cpus();
  std::vector<std::size_t> counts;
  for (std::size_t count = 1; count < cpus; count *= 2) counts.push_back(count);
  counts.push_back(cpus);
  return counts;
}

// --- Memory ----------------------------------------------------------------------------------------------------------

// The arrays of all benchmarks of a size. They are made when first asked for, and freed by the first benchmark of
// another size.
class Arrays {
 public:
  void use(std::size_t count) {
    if (count == count_) return;
    arrays_.clear();
    filled_.clear();
    count_ = count;
  }
  std::byte* zeros(std::size_t index, DType dtype) {
    std::byte* const data = at(index, dtype);
    std::memset(data, 0, count_ * info(dtype).itemsize);
    return data;
  }
  // NaN in every dtype: what is finite has been written.
  std::byte* outputs(std::size_t index, DType dtype) {
    std::byte* const data = at(index, dtype);
    std::memset(data, 0xFF, count_ * info(dtype).itemsize);
    return data;
  }
  // Numbers that nobody writes.
  std::byte* inputs(std::size_t index, DType dtype) {
    std::byte* const data = at(index, dtype);
    const auto [found, is_new] = filled_.try_emplace(index, dtype);
    if (is_new || found->second != dtype) {
      fill_with_numbers(dtype, data, count_, static_cast<std::uint32_t>(index) + 1);
      found->second = dtype;
    }
    return data;
  }

 private:
  std::byte* at(std::size_t index, DType dtype) {
    const std::size_t bytes = count_ * info(dtype).itemsize;
    Memory& array = arrays_[index];
    if (array.size() < bytes) {
      array = Memory();  // freed before there is another
      array = Memory(bytes, index);
      filled_.erase(index);
    }
    return array.data();
  }

  std::size_t count_ = 0;
  std::map<std::size_t, Memory> arrays_;
  std::map<std::size_t, DType> filled_;
};

Arrays arrays;

// --- Time ------------------------------------------------------------------------------------------------------------

// The clock takes 30 ns: one part in 3000 of half of this.
constexpr double kSampleSeconds = 2e-4;
// For medians, even where one pass is enough for google-benchmark.
constexpr std::size_t kRounds = 5;

template <class Run>
double seconds_of(std::size_t passes, const Run& run) {
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t k = 0; k < passes; ++k) run();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / static_cast<double>(passes);
}

double median(std::vector<double> values) {
  const std::size_t half = values.size() / 2;
  std::ranges::sort(values);
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

struct Medians {
  double run = 0.0;
  double yardstick = 0.0;
};

// Samples of `run` and of `yardstick`, which may be empty, in turns; `restore` undoes what the yardstick has done,
// which adds to states without end: float16 parameters would not survive them. google-benchmark learns the times of
// `run`, and says how often.
template <class Run>
Medians measure_in_turns(State& state, const Run& run, const std::function<void()>& yardstick,
                         const std::function<void()>& restore = {}) {
  double once = seconds_of(1, run);  // wakes threads, and fetches what fits into the caches
  if (once < kSampleSeconds) once = std::max(seconds_of(1, run), 1e-9);
  const auto passes = static_cast<std::size_t>(std::max(1.0, kSampleSeconds / once + 0.5));
  std::vector<double> runs;
  std::vector<double> yardsticks;
  while (state.KeepRunningBatch(static_cast<benchmark::IterationCount>(kRounds * passes))) {
    double total = 0.0;
    for (std::size_t round = 0; round < kRounds; ++round) {
      if (yardstick) yardsticks.push_back(seconds_of(passes, yardstick));
      if (restore) {
        restore();
        run();
      }
      runs.push_back(seconds_of(passes, run));
      total += runs.back() * static_cast<double>(passes);
    }
    state.SetIterationTime(total);
  }
  return {median(runs), yardsticks.empty() ? 0.0 : median(yardsticks)};
}

void set_counter(State& state, const char* name, double value) {
  state.counters[name] = benchmark::Counter(value, benchmark::Counter::kDefaults, benchmark::Counter::kIs1000);
}

void count_rates(State& state, const char* elements_per_second, std::size_t elements, std::size_t bytes,
                 double seconds) {
  set_counter(state, "bytes_per_second", static_cast<double>(bytes) / seconds);
  set_counter(state, elements_per_second, static_cast<double>(elements) / seconds);
}

// `bytes`: what the library compares with its limit (divide() in cpu/update.cpp, Route in cpu/batchnorm.cpp).
void count_threads(State& state, std::size_t threads, std::size_t bytes) {
  set_counter(state, "threads_used", bytes < serial_bytes() ? 1.0 : static_cast<double>(threads));
}

// The instruction set that ran, if it is always the same one.
class Ran {
 public:
  explicit Ran(Isa wanted) : wanted_(wanted) {}
  void note(Isa isa) { right_ = right_ && isa == wanted_; }
  bool right() const { return right_; }

 private:
  Isa wanted_;
  bool right_ = true;
};

constexpr const char* kOtherIsa = "the kernels that ran are of another instruction set";

// --- Updates ---------------------------------------------------------------------------------------------------------

struct UpdateCase {
  std::string rule;
  std::size_t storage;
  Isa isa;
  std::size_t count;
  std::size_t threads;
};

void run_update(State& state, const UpdateCase& given) {
  set_isa(given.isa);
  const KernelTable& table = active_kernels();
  const StorageInfo row = kStorages[given.storage];
  const std::vector<double> coefficients = neutral_coefficients();
  const Around around;
  Tensor tensor;
  tensor.kernel = find_kernel(table, given.rule);
  const Kernel* const yardstick = yardstick_of(table, *tensor.kernel);
  if (yardstick == nullptr) {
    fail(state, "there is no yardstick with the streams of this rule");
    return;
  }
  tensor.storage = given.storage;
  tensor.count = given.count;
  tensor.coefficients = coefficients.data();
  tensor.around = &around;
  arrays.use(given.count);
  tensor.set(kParam, arrays.zeros(kParam, row.param), row.param);
  tensor.set(kGrad, arrays.inputs(kGrad, row.grad), row.grad);
  for (std::size_t k = 0; k < tensor.kernel->slots.count; ++k) {
    tensor.set(kFirstSlot + k, arrays.zeros(kFirstSlot + k, row.state), row.state);
  }
  Tensor traffic_tensor = tensor;
  traffic_tensor.kernel = yardstick;

  Ran ran(given.isa);
  const Medians medians = measure_in_turns(
      state, [&] { ran.note(update({&tensor, 1}, given.threads)); },
      [&] { ran.note(update({&traffic_tensor, 1}, given.threads)); },
      [&] {
        for (std::size_t k = 0; k < tensor.kernel->slots.count; ++k) arrays.zeros(kFirstSlot + k, row.state);
      });

  if (!ran.right()) return fail(state, kOtherIsa);
  if (!all_finite(row.param, tensor.streams.data[kParam], given.count, true)) {
    return fail(state, "a parameter is where it was, or NaN or infinite");
  }
  for (std::size_t k = 0; k < tensor.kernel->slots.count; ++k) {
    if (!all_finite(row.state, tensor.streams.data[kFirstSlot + k], given.count, false)) {
      return fail(state, "a state is NaN or infinite");
    }
  }
  count_rates(state, "parameters_per_second", given.count, traffic(tensor), medians.run);
  set_counter(state, "share_of_traffic", medians.yardstick / medians.run);
  count_threads(state, given.threads, traffic(tensor));
}

// --- Norms -----------------------------------------------------------------------------------------------------------

struct NormCase {
  DType dtype;
  Isa isa;
  std::size_t count;
  std::size_t threads;
};

void run_norm(State& state, const NormCase& given) {
  set_isa(given.isa);
  const Around around;
  arrays.use(given.count);
  Tensor tensor;
  tensor.count = given.count;
  tensor.around = &around;
  tensor.set(kGrad, arrays.inputs(kGrad, given.dtype), given.dtype);

  Squares squares{};
  Ran ran(given.isa);
  const Medians medians = measure_in_turns(state,
                                           [&] {
                                             measure({&tensor, 1}, given.threads, {&squares, 1});
                                             ran.note(active_kernels().isa);
                                           },
                                           {});

  // The mean of the squares of numbers between 0.5 and 1.5.
  const double mean = squares.sum / static_cast<double>(given.count);
  if (!ran.right()) return fail(state, kOtherIsa);
  const bool sound = squares.finite && mean > 0.25 && mean < 2.25;
  if (!sound) return fail(state, "a wrong sum of squares");
  const std::size_t bytes = given.count * info(given.dtype).itemsize;
  count_rates(state, "parameters_per_second", given.count, bytes, medians.run);
  count_threads(state, given.threads, bytes);
}

// --- Batch normalization ---------------------------------------------------------------------------------------------

struct BatchCase {
  bool backward;
  Batch batch;
  DType dtype;
  Isa isa;
  std::size_t threads;
};

void run_batchnorm(State& state, const BatchCase& given) {
  constexpr std::size_t x = 0;
  constexpr std::size_t y = 1;
  constexpr std::size_t dy = 2;
  constexpr std::size_t dx = 3;
  set_isa(given.isa);
  const Batch& batch = given.batch;
  const std::size_t itemsize = info(given.dtype).itemsize;
  arrays.use(batch.count());
  const auto per_channel = [&](std::uint32_t seed) {
    Memory values(batch.channels * itemsize, 0);
    if (seed != 0) fill_with_numbers(given.dtype, values.data(), batch.channels, seed);
    return values;
  };
  const Memory weight = per_channel(11);
  const Memory bias = per_channel(12);
  const Memory running_mean = per_channel(0);
  const Memory running_var = per_channel(0);
  const Memory dweight = per_channel(0);
  const Memory dbias = per_channel(0);
  std::vector<double> mean(batch.channels);
  std::vector<double> invstd(batch.channels);

  const auto fill_in = [&](batchnorm::Batch& call) {
    call.dtype = given.dtype;
    call.outer = batch.outer;
    call.channels = batch.channels;
    call.inner = batch.inner;
    call.weight = weight.data();
    call.bias = bias.data();
    call.x = arrays.inputs(x, given.dtype);
  };
  batchnorm::ForwardCall forward;
  fill_in(forward);
  forward.y = arrays.outputs(y, given.dtype);
  forward.eps = 1e-5;
  forward.training = true;
  forward.running_mean = running_mean.data();
  forward.running_var = running_var.data();
  forward.momentum = 0.1;
  forward.mean = mean.data();
  forward.invstd = invstd.data();
  Ran ran(given.isa);
  const auto run_forward = [&] { ran.note(batchnorm::forward(forward, given.threads)); };

  Medians medians;
  std::size_t streams = 2;  // x in, y out: that x is read twice where it does not stay in a cache is ours to bear
  const void* result = forward.y;
  if (!given.backward) {
    medians = measure_in_turns(state, run_forward, {});
  } else {
    run_forward();
    batchnorm::BackwardCall backward;
    fill_in(backward);
    backward.dy = arrays.inputs(dy, given.dtype);
    backward.mean = mean.data();
    backward.invstd = invstd.data();
    backward.dx = arrays.outputs(dx, given.dtype);
    backward.dweight = dweight.data();
    backward.dbias = dbias.data();
    streams = 3;
    result = backward.dx;
    medians = measure_in_turns(state, [&] { ran.note(batchnorm::backward(backward, given.threads)); }, {});
  }

  if (!ran.right()) return fail(state, kOtherIsa);
  if (!all_finite(given.dtype, static_cast<const std::byte*>(result), batch.count(), false)) {
    return fail(state, "an output is not finite");
  }
  const std::size_t bytes = streams * batch.count() * itemsize;
  count_rates(state, "elements_per_second", batch.count(), bytes, medians.run);
  count_threads(state, given.threads, bytes);
}

// --- Registration ----------------------------------------------------------------------------------------------------

std::string place(Isa isa, const char* size, std::size_t threads) {
  return std::string("/") + isa_name(isa) + (size == nullptr ? "" : std::string("/") + size) +
         "/threads:" + std::to_string(threads);
}

std::size_t registered = 0;

template <class Case>
void add(const std::string& name, void (*run)(State&, const Case&), const Case& given) {
  benchmark::RegisterBenchmark(name.c_str(), [run, given](State& state) { run(state, given); })
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
  ++registered;
}

template <class Visit>
void for_each_isa_and_thread_count(Visit visit) {
  for (const Isa isa : available_isas()) {
    for (const std::size_t threads : thread_counts()) visit(isa, threads);
  }
}

// Benchmarks run in the order in which they are registered: all of a size together, because they share arrays.
void register_updates(const Size& size) {
  const KernelTable& table = active_kernels();
  for (std::size_t storage = 0; storage < Storages::size; ++storage) {
    for (std::size_t k = 0; k < table.count; ++k) {
      const std::string rule = table.kernels[k].rule;
      for_each_isa_and_thread_count([&](Isa isa, std::size_t threads) {
        add("update/" + rule + "/" + storage_name(kStorages[storage]) + place(isa, size.name, threads), run_update,
            UpdateCase{rule, storage, isa, size.count, threads});
      });
    }
  }
}

template <class... Ds>
void register_norms(const Size& size, TypeList<Ds...> /*dtypes*/) {
  for (const DType dtype : {Ds::id...}) {
    for_each_isa_and_thread_count([&](Isa isa, std::size_t threads) {
      add("norm/" + std::string(info(dtype).name) + place(isa, size.name, threads), run_norm,
          NormCase{dtype, isa, size.count, threads});
    });
  }
}

template <class... Ds>
void register_batchnorm(const Batch& batch, TypeList<Ds...> /*dtypes*/) {
  for (const bool backward : {false, true}) {
    for (const DType dtype : {Ds::id...}) {
      const std::string name = std::string("batchnorm/") + (backward ? "backward/" : "forward/") + batch.layout + "/" +
                               batch.shape + "/" + info(dtype).name;
      for_each_isa_and_thread_count([&](Isa isa, std::size_t threads) {
        add(name + place(isa, nullptr, threads), run_batchnorm, BatchCase{backward, batch, dtype, isa, threads});
      });
    }
  }
}

void register_all() {
  for (const Size& size : kSizes) {
    register_updates(size);
    register_norms(size, DTypes{});
  }
  for (const Batch& batch : kBatches) register_batchnorm(batch, ComputeTypes{});
}

std::string cpu_model() {
  std::ifstream cpus("/proc/cpuinfo");
  for (std::string line; std::getline(cpus, line);) {
    const std::size_t value = line.find(": ");
    if (line.starts_with("model name") && value != std::string::npos) return line.substr(value + 2);
  }
  return "unknown";
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang++ ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::string joined(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words) line += (line.empty() ? "" : " ") + word;
  return line;
}

void describe(const std::vector<std::string>& command) {
  std::vector<std::string> isas;
  for (const Isa isa : available_isas()) isas.emplace_back(isa_name(isa));
  std::vector<std::string> counts;
  for (const std::size_t count : thread_counts()) counts.push_back(std::to_string(count));
  const char* const commit = std::getenv("ONEPASS_COMMIT");
  benchmark::AddCustomContext("onepass_version", ONEPASS_VERSION);
  benchmark::AddCustomContext("onepass_commit", commit != nullptr && *commit != '\0' ? commit : ONEPASS_COMMIT);
  benchmark::AddCustomContext("onepass_benchmarks", std::to_string(registered));
  benchmark::AddCustomContext("cpu", cpu_model());
  benchmark::AddCustomContext("compiler", compiler());
  benchmark::AddCustomContext("command", joined(command));
  benchmark::AddCustomContext("isa", joined(isas));
  benchmark::AddCustomContext("threads", joined(counts));
}

}  // namespace

int main(int argc, char** argv) {
  // google-benchmark's own default, half a second for each, makes half an hour of a thousand. A flag that is given
  // comes later, and counts.
  char min_time[] = "--benchmark_min_time=" ONEPASS_MIN_TIME;
  std::vector<char*> arguments(argv, argv + argc);
  arguments.insert(arguments.begin() + std::min(argc, 1), min_time);
  int count_of_arguments = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count_of_arguments, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count_of_arguments, arguments.data())) return 1;
  register_all();
  describe({argv, argv + argc});
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return failed ? 1 : 0;
}
