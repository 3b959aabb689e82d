// What this machine can do, and where each rule stands on that: bandwidth at each level of the memory (a small triad),
// arithmetic without memory, and the rate of every rule's kernel at each level. Samples are printed as JSON; statistics
// and files are bench/roofline.py's.
//
//   roofline [--quick]        the instruction set in use is the library's choice, or ONEPASS_ISA
//
// * The triad, to[i] += scale * times[i], moves 12 bytes for each element: 8 are read, 4 written. Like a rule it writes
//   what it has read, so no line is fetched only to be overwritten, and all that is moved is counted.
// * A level's working sets are those well inside it: at most half of the level, at least twice the one below; memory
//   begins at four times the last cache. Caches of one core hold a thread's share of a working set, the last level all
//   of it. The bandwidth of a level is the triad's at the middle one, over which every rule runs, too.
// * Each thread has a span of its own and goes over it again and again, so that starting threads is no part of the
//   figure. Rules are called as kernels, on the same terms; what dispatch and dividing the work cost is to be seen in
//   micro.cpp.
// * All that belongs to a level runs in turns, sample by sample.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "arrays.h"
#include "core/dtype.h"
#include "core/kernel.h"
#include "core/tensor.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/float_mode.h"
#include "cpu/parallel.h"
#include "roofline_kernels.h"

#if !defined(ONEPASS_VERSION)
#define ONEPASS_VERSION "unknown"
#endif

namespace onepass::roofline {
extern const Kernels kernels_scalar;
#if defined(ONEPASS_HAVE_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(ONEPASS_HAVE_AVX512)
extern const Kernels kernels_avx512;
#endif
}  // namespace onepass::roofline

namespace {

using namespace onepass;
using namespace onepass::bench;

constexpr const roofline::Kernels* kAll[] = {
    &roofline::kernels_scalar,
#if defined(ONEPASS_HAVE_AVX2)
    &roofline::kernels_avx2,
#endif
#if defined(ONEPASS_HAVE_AVX512)
    &roofline::kernels_avx512,
#endif
};

// Null: not built.
const roofline::Kernels* kernels_of(Isa isa) {
  for (const roofline::Kernels* kernels : kAll) {
    if (kernels->isa == isa) return kernels;
  }
  return nullptr;
}

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;

struct Options {
  bool quick = false;
  std::size_t samples = 15;
  double sample_seconds = 5e-3;
  std::size_t least = 8 * kKiB;
  std::size_t most = 512 * kMiB;
};

std::atomic<bool> failed{false};

// --- Levels ----------------------------------------------------------------------------------------------------------

struct Caches {
  std::size_t level1, level2, level3;
};

Caches find_caches(const Options& options) {
  if (options.quick) return {32 * kKiB, 256 * kKiB, 2 * kMiB};
  long level1 = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  level1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
  const CacheSizes sizes = cache_sizes();
  return {level1 > 0 ? static_cast<std::size_t>(level1) : 32 * kKiB, sizes.level2, sizes.level3};
}

struct Level {
  const char* name;
  std::size_t least, most;  // working sets, of all threads together
};

// A level that has no room for working sets of its own (a last cache as large as the one below) is left out.
std::vector<Level> levels_of(const Caches& caches, std::size_t threads) {
  const std::size_t level1 = threads * caches.level1;
  const std::size_t level2 = threads * caches.level2;
  std::vector<Level> levels = {{"L1", 0, level1 / 2}, {"L2", 2 * level1, level2 / 2}};
  if (caches.level3 > caches.level2) levels.push_back({"L3", 2 * level2, caches.level3 / 2});
  levels.push_back({"DRAM", 4 * std::max(level2, caches.level3), SIZE_MAX});
  std::erase_if(levels, [](const Level& level) { return level.least > level.most; });
  return levels;
}

struct WorkingSet {
  std::size_t bytes;
  const Level* level;  // null: between two levels
};

// Powers of two, and one between them for a level that has none.
std::vector<WorkingSet> working_sets(const std::vector<Level>& levels, const Options& options) {
  std::vector<WorkingSet> sets;
  for (std::size_t bytes = options.least; bytes <= std::max(options.most, levels.back().least); bytes *= 2) {
    sets.push_back({bytes, nullptr});
    for (const Level& level : levels) {
      if (bytes >= level.least && bytes <= level.most) sets.back().level = &level;
    }
  }
  for (const Level& level : levels) {
    const auto inside = [&](const WorkingSet& set) { return set.level == &level; };
    if (std::ranges::any_of(sets, inside)) continue;
    sets.push_back({level.most == SIZE_MAX ? level.least : level.least / 2 + level.most / 2, &level});
  }
  return sets;
}

// --- Samples ---------------------------------------------------------------------------------------------------------

struct Row {
  std::string name, kind;
  std::size_t threads = 1;
  std::size_t elements = 0;
  std::size_t bytes = 0;        // moved in one pass
  std::size_t working_set = 0;  // 0: registers alone
  double operations = 0;        // of one pass, where they are counted
  std::string level, yardstick, note;
  std::vector<double> samples;  // seconds of one pass
};

// Does `passes` passes over the span of a thread.
using Work = std::function<void(std::size_t thread, std::size_t passes)>;

struct Task {
  Row row;
  Work work;
};

double seconds_of(const Task& task, std::size_t passes) {
  struct Context {
    const Work* work;
    std::size_t passes;
  } context{&task.work, passes};
  const auto body = [](void* given, std::size_t part) {
    const auto* const work = static_cast<const Context*>(given);
    const FloatMode mode;
    (*work->work)(part, work->passes);
  };
  const auto start = std::chrono::steady_clock::now();
  parallel_for(task.row.threads, task.row.threads, body, &context);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / static_cast<double>(passes);
}

// Each sample comes after a pass that is not timed, unless one pass is all of it: data are where they will be, and
// workers are awake.
double sample(const Task& task, std::size_t passes) {
  if (passes > 1) seconds_of(task, 1);
  return seconds_of(task, passes);
}

void measure(std::vector<Task>& tasks, const Options& options) {
  std::vector<std::size_t> passes;
  for (const Task& task : tasks) {
    std::size_t count = 1;
    for (;;) {
      const double taken = sample(task, count) * static_cast<double>(count);
      if (taken >= options.sample_seconds) break;
      const double wanted = static_cast<double>(count) * options.sample_seconds / std::max(taken, 1e-7);
      count = std::clamp(static_cast<std::size_t>(wanted) + 1, 2 * count, 16 * count);
    }
    passes.push_back(count);
  }
  for (std::size_t round = 0; round < options.samples; ++round) {
    for (std::size_t k = 0; k < tasks.size(); ++k) tasks[k].row.samples.push_back(sample(tasks[k], passes[k]));
  }
}

// --- The triad and the rules -----------------------------------------------------------------------------------------

// What the triad adds to: an array that no rule has. Sums of positive numbers in float32 stay finite: from 2^24 of them
// on, what is added is lost in rounding.
constexpr std::size_t kTriad = kFirstSlot + kMaxSlots;

// One array for each stream, shared by all: parameters and states are 0 at first, gradients are positive.
class Streams32 {
 public:
  explicit Streams32(std::size_t largest) {
    for (std::size_t stream = 0; stream <= kTriad; ++stream) {
      // The triad and a rule without slots have two arrays in a working set, other rules have three or more.
      const bool slot = stream >= kFirstSlot && stream != kTriad;
      memory_.emplace_back(largest / (slot ? 3 : 2) + 64, stream);
    }
    fill_with_numbers(DType::float32, memory_[kGrad].data(), memory_[kGrad].size() / sizeof(float), 1);
  }
  std::byte* stream(std::size_t k) const { return memory_[k].data(); }
  float* floats(std::size_t k) const { return reinterpret_cast<float*>(memory_[k].data()); }

 private:
  std::vector<Memory> memory_;
};

// The share of each thread: whole cache lines. 0: too small to be shared.
std::size_t span_of(std::size_t bytes, std::size_t arrays, std::size_t threads) {
  constexpr std::size_t line = 64 / sizeof(float);
  return bytes / (arrays * sizeof(float) * threads) / line * line;
}

std::string size_name(std::size_t bytes) {
  return bytes % kMiB == 0 ? std::to_string(bytes / kMiB) + "M" : std::to_string(bytes / kKiB) + "K";
}

Task triad_task(const WorkingSet& set, std::size_t threads, const Streams32& streams,
                const roofline::Kernels& kernels) {
  const std::size_t span = span_of(set.bytes, 2, threads);
  Task task;
  task.row.name = "triad/" + size_name(set.bytes) + "/" + std::to_string(threads);
  task.row.kind = "triad";
  task.row.threads = threads;
  task.row.elements = span * threads;
  task.row.bytes = 3 * sizeof(float) * task.row.elements;
  task.row.working_set = 2 * sizeof(float) * task.row.elements;
  task.row.level = set.level == nullptr ? "" : set.level->name;
  float* const to = streams.floats(kTriad);
  const float* const times = streams.floats(kGrad);
  task.work = [=, &kernels](std::size_t thread, std::size_t passes) {
    for (std::size_t k = 0; k < passes; ++k) {
      kernels.triad(to + thread * span, times + thread * span, 0.5F, span);
    }
  };
  return task;
}

Task rule_task(const Kernel& kernel, const WorkingSet& set, std::size_t threads, const Streams32& streams,
               const KernelTable& table) {
  static const std::vector<double> coefficients = neutral_coefficients();
  static const Around around;
  const std::size_t arrays = kFirstSlot + kernel.slots.count;
  const std::size_t span = span_of(set.bytes, arrays, threads);
  Tensor tensor;
  tensor.kernel = &kernel;
  tensor.storage = find_storage(DType::float32, DType::float32, DType::float32);
  tensor.count = span * threads;
  tensor.coefficients = coefficients.data();
  tensor.around = &around;
  for (std::size_t k = 0; k < arrays; ++k) tensor.set(k, streams.stream(k), DType::float32);

  Task task;
  task.row.name = std::string("rule/") + kernel.rule + "/" + set.level->name + "/" + std::to_string(threads);
  task.row.kind = "rule";
  task.row.threads = threads;
  task.row.elements = tensor.count;
  task.row.bytes = traffic(tensor);
  task.row.working_set = arrays * sizeof(float) * tensor.count;
  task.row.level = set.level->name;
  if (const Kernel* const yardstick = yardstick_of(table, kernel); yardstick != nullptr) {
    task.row.yardstick = yardstick->rule;
  }
  const UpdateFn update = kernel.plain[tensor.storage];
  const Isa isa = table.isa;
  task.work = [=](std::size_t thread, std::size_t passes) {
    const Part part{from_element(tensor, tensor.streams, thread * span),
                    span,
                    tensor.coefficients,
                    tensor.around,
                    1.0,
                    DType::uint16,
                    {}};
    for (std::size_t k = 0; k < passes; ++k) {
      if (update(part) != isa && !failed.exchange(true)) {
        std::fputs("a kernel of another instruction set ran\n", stderr);
      }
    }
  };
  return task;
}

void check_triad(const Streams32& streams, std::size_t elements) {
  if (all_finite(DType::float32, streams.stream(kTriad), elements, true)) return;
  std::fputs("the triad has left something out, or made it NaN or infinite\n", stderr);
  failed = true;
}

void check_rules(const Streams32& streams, const KernelTable& table, std::size_t elements) {
  std::size_t slots = 0;
  for (std::size_t k = 0; k < table.count; ++k) slots = std::max(slots, table.kernels[k].slots.count);
  bool good = all_finite(DType::float32, streams.stream(kParam), elements, true);
  for (std::size_t k = 0; k < slots; ++k) {
    good = good && all_finite(DType::float32, streams.stream(kFirstSlot + k), elements, false);
  }
  if (good) return;
  std::fputs("a parameter is where it was, or something is NaN or infinite\n", stderr);
  failed = true;
}

// The triad over the working sets of a level (null: those that are in none), and every rule over the middle one.
std::vector<Row> run_level(const Level* level, const std::vector<WorkingSet>& all, std::size_t threads,
                           const Options& options) {
  const KernelTable& table = active_kernels();
  std::vector<WorkingSet> sets;
  for (const WorkingSet& set : all) {
    if (set.level == level && span_of(set.bytes, kFirstSlot + kMaxSlots, threads) > 0) sets.push_back(set);
  }
  if (sets.empty()) return {};
  const Streams32 streams(sets.back().bytes);
  const std::size_t middle = sets.size() / 2;
  std::vector<Task> tasks;
  tasks.reserve(sets.size() + table.count);
  for (const WorkingSet& set : sets) tasks.push_back(triad_task(set, threads, streams, *kernels_of(table.isa)));
  if (level != nullptr) {
    for (std::size_t k = 0; k < table.count; ++k) {
      tasks.push_back(rule_task(table.kernels[k], sets[middle], threads, streams, table));
    }
  }
  measure(tasks, options);
  check_triad(streams, tasks[sets.size() - 1].row.elements);
  if (level != nullptr) check_rules(streams, table, tasks.back().row.elements);

  std::vector<Row> rows;
  if (level != nullptr) {
    rows.push_back(tasks[middle].row);
    rows.back().note = rows.back().name;
    rows.back().name = std::string("bandwidth/") + level->name + "/" + std::to_string(threads);
    rows.back().kind = "bandwidth";
  }
  for (Task& task : tasks) rows.push_back(std::move(task.row));
  return rows;
}

// --- Arithmetic ------------------------------------------------------------------------------------------------------

Task peak_task(const char* name, float (*run)(std::size_t), const roofline::Kernels& kernels, std::size_t threads,
               const char* note) {
  constexpr std::size_t rounds = 1000;
  Task task;
  task.row.name = std::string("peak/") + name + "/" + isa_name(kernels.isa) + "/" + std::to_string(threads);
  task.row.kind = "peak";
  task.row.threads = threads;
  task.row.elements = rounds * kernels.elements * threads;
  task.row.operations = 2.0 * static_cast<double>(task.row.elements);
  task.row.note = note;
  task.work = [run](std::size_t /*thread*/, std::size_t passes) {
    static std::atomic<float> seen;
    for (std::size_t k = 0; k < passes; ++k) seen.store(run(rounds), std::memory_order_relaxed);
  };
  return task;
}

std::vector<Row> run_peaks(std::size_t threads, const Options& options) {
  std::vector<Task> tasks;
  for (const Isa isa : available_isas()) {
    const roofline::Kernels& kernels = *kernels_of(isa);
    tasks.push_back(peak_task("float32", kernels.multiply_add, kernels, threads,
                              "one multiplication and one addition for each element, never fused"));
    tasks.push_back(
        peak_task("divide", kernels.divide_root, kernels, threads, "one division and one root for each element"));
  }
  measure(tasks, options);
  std::vector<Row> rows;
  rows.reserve(tasks.size());
  for (Task& task : tasks) rows.push_back(std::move(task.row));
  return rows;
}

// --- JSON ------------------------------------------------------------------------------------------------------------

void print(const Row& row, bool first) {
  std::printf(
      "%s\n  {\"case\": \"%s\", \"kind\": \"%s\", \"threads\": %zu, \"elements\": %zu, \"bytes\": %zu, "
      "\"working_set\": %zu,\n   \"operations\": %.17g, \"level\": \"%s\", \"yardstick\": \"%s\", "
      "\"note\": \"%s\",\n   \"samples\": [",
      first ? "" : ",", row.name.c_str(), row.kind.c_str(), row.threads, row.elements, row.bytes, row.working_set,
      row.operations, row.level.c_str(), row.yardstick.c_str(), row.note.c_str());
  for (std::size_t k = 0; k < row.samples.size(); ++k) std::printf("%s%.6e", k == 0 ? "" : ", ", row.samples[k]);
  std::printf("]}");
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (const std::string& argument : std::vector<std::string>(argv + std::min(argc, 1), argv + argc)) {
    if (argument != "--quick") {
      std::fprintf(stderr, "roofline: unknown argument '%s'; there is --quick\n", argument.c_str());
      return 2;
    }
    options = {true, 3, 2e-4, 8 * kKiB, 8 * kMiB};
  }
  const Caches caches = find_caches(options);
  const std::size_t cpus = usable_cpus();
  std::printf(
      "{\"version\": \"%s\", \"isa\": \"%s\", \"cpus\": %zu,\n \"caches\": {\"L1\": %zu, \"L2\": %zu, "
      "\"L3\": %zu},\n \"rows\": [",
      ONEPASS_VERSION, isa_name(active_kernels().isa), cpus, caches.level1, caches.level2, caches.level3);
  bool first = true;
  const auto print_all = [&](const std::vector<Row>& rows) {
    for (const Row& row : rows) print(row, std::exchange(first, false));
  };
  std::vector<std::size_t> thread_counts = {1};
  if (cpus > 1) thread_counts.push_back(cpus);
  for (const std::size_t threads : thread_counts) {
    const std::vector<Level> levels = levels_of(caches, threads);
    const std::vector<WorkingSet> sets = working_sets(levels, options);
    for (const Level& level : levels) print_all(run_level(&level, sets, threads, options));
    print_all(run_level(nullptr, sets, threads, options));
    print_all(run_peaks(threads, options));
  }
  std::printf("]}\n");
  return failed ? 1 : 0;
}
