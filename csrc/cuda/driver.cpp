#include "cuda/driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "core/step.h"
#include "cuda/launch.h"
#include "cuda/support.h"
#include "cuda/update.h"

namespace onepass::cuda {
namespace {

cudaStream_t stream_of(const Place& place) { return static_cast<cudaStream_t>(place.stream); }

// --- Tables ----------------------------------------------------------------------------------------------------------

const UpdateKernels& update_kernels(const Kernel& kernel, std::size_t storage) {
  for (const auto& part : {update_part_0, update_part_1, update_part_2, update_part_3}) {
    for (const RuleKernels& row : part) {
      if (std::string_view(row.rule) == kernel.rule) return row.storages[storage];
    }
  }
  throw std::runtime_error(std::string("rule ") + kernel.rule + " has no CUDA kernels" +
                           (kernel.yardstick ? ": it is a yardstick of the CPU" : ": the modules are of two builds"));
}

bool is_double(const Tensor& tensor) { return compute_type(tensor) == DType::float64; }

// What a launch does to tensors, by the kernels of their kind.
template <class S, std::size_t streams>
struct Launched {
  const char* name;
  void (*kernel)(Table<S, streams>);
  unsigned lanes;
};

// What all launches of an operation have in common.
struct Common {
  Place place;
  const Verdict* verdict = nullptr;
  const double* clips = nullptr;
  const std::byte* settings = nullptr;  // on the device, for each cohort one of float and one of double
  std::span<const std::uint32_t> cohorts_of;
};

// A tensor of an operation, and its position in the step.
struct Item {
  const Tensor* tensor;
  const Tensor* original;  // of the step: what `tensor` is a copy or a piece of
  std::uint32_t position;
  std::uint64_t first = 0;  // the element of the whole tensor at which it begins
  bool random = false;      // its elements need random numbers
  bool rounds = false;      // by chance; of the sum of gradients: it starts
  const UnitParams* units = nullptr;
};

constexpr std::size_t kSettingsBytes = (sizeof(Setting<float>) + sizeof(Setting<double>) + 15) / 16 * 16;

template <class S>
const Setting<S>* setting_on_device(const std::byte* settings, std::size_t cohort) {
  const std::byte* const at = settings + cohort * kSettingsBytes;
  return reinterpret_cast<const Setting<S>*>(std::is_same_v<S, float> ? at : at + sizeof(Setting<float>));
}

template <class S>
Setting<S> setting_for(const Tensor& tensor) {
  Setting<S> setting{};
  if (tensor.coefficients != nullptr) round_coefficients(tensor.coefficients, kMaxCoefficients, setting.coefficients);
  setting.around = Surroundings<S>(*tensor.around);
  setting.around.set_scale(tensor.around->scaling, 1.0, false);
  setting.scaling = tensor.around->scaling;
  setting.t = tensor.key.t;
  return setting;
}

// --- Launches that are kept ------------------------------------------------------------------------------------------

class Kept {
 public:
  Kept() = default;
  virtual ~Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  virtual void launch(const Place& place) = 0;
};

using Keep = std::vector<std::unique_ptr<Kept>>;

// A kernel and its one parameter.
template <class Params>
class KeptParams : public Kept {
 public:
  KeptParams(const char* name, void (*kernel)(Params), unsigned blocks, unsigned threads, const Params& params)
      : name_(name), kernel_(kernel), blocks_(blocks), threads_(threads), params_(params) {}
  void launch(const Place& place) override {
    cuda::launch(name_, kernel_, dim3(blocks_), dim3(threads_), 0, stream_of(place), params_);
  }

 protected:
  Params& params() { return params_; }

 private:
  const char* name_;
  void (*kernel_)(Params);
  unsigned blocks_, threads_;
  Params params_;
};

// A table, whose settings are those of its tensors at each launch.
template <class S, std::size_t streams>
class KeptTable final : public KeptParams<Table<S, streams>> {
 public:
  KeptTable(const Launched<S, streams>& launched, const Table<S, streams>& table,
            std::vector<const Tensor*> of_settings)
      : KeptParams<Table<S, streams>>(launched.name, launched.kernel, table.blocks, kThreads, table),
        of_settings_(std::move(of_settings)) {}
  void launch(const Place& place) override {
    for (std::size_t k = 0; k < of_settings_.size(); ++k) {
      this->params().settings[k] = setting_for<S>(*of_settings_[k]);
    }
    KeptParams<Table<S, streams>>::launch(place);
  }

 private:
  std::vector<const Tensor*> of_settings_;  // one for each setting
};

// Fills tables with tensors and launches each when it is full. One is kept for each kernel that is met, because tensors
// of several kinds may take turns.
template <class S, std::size_t streams>
class Tables {
 public:
  // `keep`: where launches are kept; null: nowhere.
  explicit Tables(const Common& common, Keep* keep = nullptr) : common_(common), keep_(keep) {}

  void add(const Launched<S, streams>& launched, const Item& item) {
    const Tensor& tensor = *item.tensor;
    if (tensor.count == 0) return;
    Filling& filling = filling_for(launched);
    Table<S, streams>& table = *filling.table;
    const std::uint8_t head = item.random ? kInGroups : head_for(tensor, launched.lanes);
    const std::uint64_t blocks = blocks_for(tensor.count, head, launched.lanes);
    if (blocks > kMostBlocks) throw std::runtime_error("a tensor is too large for one launch");
    int setting = setting_in(filling, item);
    const bool alone = item.first != 0 || item.units != nullptr;
    if (table.tensors == Table<S, streams>::capacity || table.blocks + blocks > kMostBlocks || setting < 0 ||
        (table.tensors > 0 && (alone || table.seed != tensor.key.seed))) {
      flush(filling);
      setting = setting_in(filling, item);  // of the new table
    }
    if (table.tensors == 0) table.seed = tensor.key.seed;
    Entry<streams>& entry = table.entries[table.tensors];
    for (std::size_t stream = 0; stream < streams; ++stream) entry.data[stream] = tensor.streams.data[stream];
    entry.count = tensor.count;
    entry.first_block = table.blocks;
    entry.position = item.position;
    entry.index = tensor.key.index;
    entry.setting = static_cast<std::uint8_t>(setting);
    entry.head = head;
    entry.mirror = tensor.dtypes[kMirror];
    entry.rounds = item.rounds;
    table.first = item.first;
    if (item.units != nullptr) std::memcpy(&table.entries[1], item.units, sizeof *item.units);
    table.blocks += static_cast<std::uint32_t>(blocks);
    ++table.tensors;
    if (alone) flush(filling);
  }

  void flush() {
    for (Filling& filling : fillings_) flush(filling);
  }

 private:
  static constexpr std::uint64_t kMostBlocks = 0x7FFFFFFF;  // of a grid

  struct Filling {
    Launched<S, streams> launched;
    std::unique_ptr<Table<S, streams>> table;
    const Tensor* of_settings[kSettings];  // whose settings are in the table
    std::size_t settings;
    std::int64_t cohort;  // of settings on the device: the table's only one
  };

  Filling& filling_for(const Launched<S, streams>& launched) {
    for (Filling& filling : fillings_) {
      if (filling.launched.kernel == launched.kernel) return filling;
    }
    Filling& filling = fillings_.emplace_back();
    filling.launched = launched;
    filling.table = std::make_unique_for_overwrite<Table<S, streams>>();
    clear(filling);
    return filling;
  }

  void clear(Filling& filling) const {
    Table<S, streams>& table = *filling.table;
    table.tensors = table.blocks = 0;
    table.seed = table.first = 0;
    table.verdict = common_.verdict;
    table.clips = common_.clips;
    table.on_device = nullptr;
    filling.settings = 0;
    filling.cohort = -1;
  }

  // The number of a tensor's setting in the table; negative if there is no room for it.
  int setting_in(Filling& filling, const Item& item) const {
    if (common_.settings != nullptr) {
      const std::int64_t cohort = common_.cohorts_of[item.position];
      if (filling.cohort >= 0 && filling.cohort != cohort) return -1;
      filling.cohort = cohort;
      filling.table->on_device = setting_on_device<S>(common_.settings, static_cast<std::size_t>(cohort));
      return 0;
    }
    const Around* const around = item.original->around;
    for (std::size_t k = 0; k < filling.settings; ++k) {
      if (filling.of_settings[k]->around == around) return static_cast<int>(k);
    }
    if (filling.settings == kSettings) return -1;
    filling.of_settings[filling.settings] = item.original;
    filling.table->settings[filling.settings] = setting_for<S>(*item.original);
    return static_cast<int>(filling.settings++);
  }

  // Where vectors begin.
  static std::uint8_t head_for(const Tensor& tensor, unsigned lanes) {
    if (lanes == 1) return kInGroups;
    std::uintptr_t addresses[streams];
    std::size_t itemsizes[streams];
    std::size_t count = 0;
    for (std::size_t stream = 0; stream < streams; ++stream) {
      if (tensor.streams.data[stream] == nullptr) continue;
      addresses[count] = reinterpret_cast<std::uintptr_t>(tensor.streams.data[stream]);
      itemsizes[count++] = itemsize(tensor, stream);
    }
    return head_of(addresses, itemsizes, count, lanes, tensor.count);
  }

  void flush(Filling& filling) const {
    const Table<S, streams>& table = *filling.table;
    if (table.tensors > 0) {
      launch(filling.launched.name, filling.launched.kernel, dim3(table.blocks), dim3(kThreads), 0,
             stream_of(common_.place), table);
      if (keep_ != nullptr) {
        keep_->push_back(std::make_unique<KeptTable<S, streams>>(
            filling.launched, table,
            std::vector<const Tensor*>(filling.of_settings, filling.of_settings + filling.settings)));
      }
    }
    clear(filling);
  }

  const Common& common_;
  Keep* keep_;
  std::vector<Filling> fillings_;
};

// --- Arrays in another order -----------------------------------------------------------------------------------------

// Elements of a tensor that are copied into order at a time: enough for a full machine, and still in its cache when
// they are used. A multiple of all blocks of which sums are made.
constexpr std::uint64_t kCopiedElements = std::uint64_t{1} << 21U;
static_assert(kCopiedElements % kSquaresBlock == 0 && kCopiedElements % kRandomGroup == 0);
constexpr std::size_t kCopiedBytes = kCopiedElements * sizeof(double);

bool is_copied(const Tensor& tensor, std::size_t stream) {
  if (tensor.streams.data[stream] == nullptr) return false;
  if (tensor.walk != nullptr && tensor.walk->gather[stream]) return true;
  return reinterpret_cast<std::uintptr_t>(tensor.streams.data[stream]) % itemsize(tensor, stream) != 0;
}

std::size_t copied_streams(const Tensor& tensor) {
  std::size_t count = 0;
  for (std::size_t stream = 0; stream < kStreams; ++stream) count += is_copied(tensor, stream) ? 1 : 0;
  return count;
}

void copy(const Tensor& tensor, std::size_t stream, std::uint64_t first, std::uint64_t count, std::byte* contiguous,
          bool gathers, const Place& place) {
  CopyParams params{};
  params.strided = tensor.streams.data[stream];
  params.contiguous = contiguous;
  params.first = first;
  params.count = count;
  params.itemsize = static_cast<std::uint32_t>(itemsize(tensor, stream));
  params.gathers = gathers;
  bool aligned = reinterpret_cast<std::uintptr_t>(params.strided) % params.itemsize == 0;
  if (tensor.walk != nullptr && tensor.walk->gather[stream]) {
    for (const Axis& axis : tensor.walk->axes[stream]) {
      params.strides.length[params.strides.axes] = axis.length;
      params.strides.stride[params.strides.axes++] = axis.stride;
      aligned = aligned && axis.stride % static_cast<std::ptrdiff_t>(params.itemsize) == 0;
    }
  } else {
    params.strides.axes = 1;
    params.strides.length[0] = tensor.count;
    params.strides.stride[0] = static_cast<std::int64_t>(params.itemsize);
  }
  params.aligned = aligned;
  const std::uint64_t blocks = std::min<std::uint64_t>(divide_up(count, kThreads), 0xFFFF);
  launch("a copy into order", copy_strided, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream_of(place),
         params);
}

// Calls action(tensor, first element) for pieces of a tensor whose arrays all lie in the order of the parameter, at
// addresses of items; what is written is copied back. `uncertain`: the device decides whether anything is written at
// all, so that what is copied back has to be there before.
template <class Reads, class Writes, class Action>
void for_pieces(const Tensor& tensor, std::byte* room, const Place& place, bool uncertain, Reads reads, Writes writes,
                Action action) {
  if (copied_streams(tensor) == 0) {
    action(tensor, std::uint64_t{0});
    return;
  }
  for (std::uint64_t first = 0; first < tensor.count; first += kCopiedElements) {
    const std::uint64_t count = std::min<std::uint64_t>(kCopiedElements, tensor.count - first);
    Tensor piece = tensor;
    piece.walk = nullptr;
    piece.count = count;
    std::byte* next = room;
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      if (tensor.streams.data[stream] == nullptr) continue;
      if (!is_copied(tensor, stream)) {
        piece.streams.data[stream] += first * itemsize(tensor, stream);
        continue;
      }
      piece.streams.data[stream] = next;
      next += kCopiedBytes;
      if (reads(stream) || (uncertain && writes(stream))) {
        copy(tensor, stream, first, count, piece.streams.data[stream], true, place);
      }
    }
    action(std::as_const(piece), first);
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      if (is_copied(tensor, stream) && writes(stream)) {
        copy(tensor, stream, first, count, piece.streams.data[stream], false, place);
      }
    }
  }
}

// --- Scratch memory --------------------------------------------------------------------------------------------------

std::uint64_t parts_of(const Tensor& tensor) { return divide_up(tensor.count, kSquaresBlock); }

constexpr std::size_t kAlignment = 256;
constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// What of a share's scratch memory is used for what.
struct Scratch {
  DeviceSquares* parts = nullptr;
  DeviceSquares* sums = nullptr;
  double* clips = nullptr;
  Verdict* verdict = nullptr;
  std::byte* settings = nullptr;
  double* unit_sums = nullptr;
  std::byte* copies = nullptr;
  std::byte* whole_copies = nullptr;  // of parameters whose units are measured
  std::size_t bytes = 0;

  Scratch(const Step& step, std::size_t share) {
    std::uint64_t part_count = 0;
    std::uint64_t unit_count = 0;
    std::size_t copied = 0;
    std::size_t whole = 0;
    for (std::size_t k = 0; k < step.tensors.size(); ++k) {
      if (!step.shares_of.empty() && step.shares_of[k] != share) continue;
      const Tensor& tensor = step.tensors[k];
      part_count += parts_of(tensor);
      if (tensor.units != nullptr) unit_count = std::max(unit_count, tensor.units->outer * tensor.units->units);
      copied = std::max(copied, copied_streams(tensor));
      std::size_t of_units = 0;
      for (const std::size_t stream : {std::size_t{kParam}, std::size_t{kRemainder}}) {
        if (tensor.units != nullptr && is_copied(tensor, stream)) {
          of_units += aligned(tensor.count * itemsize(tensor, stream));
        }
      }
      whole = std::max(whole, of_units);
    }
    std::byte* const base = share < step.shares.size() ? step.shares[share].scratch : nullptr;
    const auto take = [&]<class T>(T*& to, std::size_t count) {
      if (base != nullptr) to = reinterpret_cast<T*>(base + bytes);
      bytes += aligned(count * sizeof(T));
    };
    if (step.judgement != nullptr) {
      take(parts, part_count);
      take(sums, step.tensors.size());
      take(clips, step.tensors.size());
      take(verdict, 1);
    }
    if (!step.cohorts.empty()) take(settings, step.cohorts.size() * kSettingsBytes);
    if (unit_count > 0) take(unit_sums, unit_count);
    if (copied > 0) take(copies, copied * kCopiedBytes);
    if (whole > 0) take(whole_copies, whole);
  }
};

// --- A step ----------------------------------------------------------------------------------------------------------

// A share of a step, as it becomes launches.
class Stepper {
 public:
  Stepper(const Step& step, std::size_t share, Keep* measures = nullptr, Keep* updates = nullptr)
      : step_(step),
        share_(share),
        place_(step.shares[share].place),
        scratch_(step, share),
        measures_(measures),
        updates_(updates) {
    for (std::size_t k = 0; k < step.tensors.size(); ++k) {
      if (step.shares_of.empty() || step.shares_of[k] == share) {
        items_.push_back({&step.tensors[k], &step.tensors[k], static_cast<std::uint32_t>(k)});
      }
    }
  }

  // Of no tensors, for what concerns all of them.
  Stepper(const Step& step, std::size_t share, std::vector<Item> items)
      : step_(step),
        share_(share),
        place_(step.shares[share].place),
        scratch_(step, share),
        measures_(nullptr),
        updates_(nullptr),
        items_(std::move(items)) {}

  const Place& place() const { return place_; }
  DeviceSquares* sums() const { return scratch_.sums; }
  const std::vector<Item>& items() const { return items_; }

  // The squares of each tensor's gradient.
  void measure() {
    MeasureTable table;
    MeasureKernel kernel = nullptr;
    const auto flush = [&] {
      if (table.tensors > 0) {
        launch_kept(measures_, "the norms of gradients", kernel, table.blocks, kThreads, table);
      }
      table.tensors = table.blocks = 0;
    };
    table.tensors = table.blocks = 0;
    table.parts = scratch_.parts;
    std::uint64_t part = 0;
    for (const Item& item : items_) {
      const Tensor& whole = *item.tensor;
      const auto reads = [](std::size_t stream) { return stream == kGrad || stream == kAccumulator; };
      const auto nothing = [](std::size_t /*stream*/) { return false; };
      const bool copied = is_copied(whole, kGrad) || is_copied(whole, kAccumulator);
      const std::uint64_t first_part = part;
      const auto add = [&](const Tensor& tensor, std::uint64_t first) {
        if (tensor.count == 0) return;
        const MeasureKernel wanted =
            measure_for(tensor.streams.data[kGrad] != nullptr ? tensor.dtypes[kGrad] : compute_type(tensor));
        const std::uint64_t blocks = divide_up(parts_of(tensor), kPartsOfBlock);
        if (wanted != kernel || table.tensors == MeasureTable::capacity || table.blocks + blocks > 0x7FFFFFFF) flush();
        kernel = wanted;
        table.scale = tensor.around->scaling.scale;
        table.entries[table.tensors++] = {
            tensor.streams.data[kGrad], tensor.streams.data[kAccumulator], tensor.count, table.blocks,
            tensor.sum_starts,          first_part + first / kSquaresBlock};
        table.blocks += static_cast<std::uint32_t>(blocks);
        if (copied) flush();  // before its copy is overwritten
      };
      Tensor measured = whole;
      for (std::size_t stream = 0; stream < kStreams; ++stream) {
        if (!reads(stream)) measured.streams.data[stream] = nullptr;
      }
      for_pieces(measured, scratch_.copies, place_, false, reads, nothing, add);
      part += parts_of(whole);
    }
    flush();
    add_parts();
  }

  void judge(bool is_first) const {
    const Judgement& judgement = *step_.judgement;
    JudgeParams params{};
    params.sums = scratch_.sums;
    params.tensors = static_cast<std::uint32_t>(step_.tensors.size());
    params.max_grad_norm = judgement.max_grad_norm.value_or(-1.0);
    params.clip_norm = judgement.clip_norm.value_or(-1.0);
    params.scaling = judgement.scaling;
    params.summed = judgement.summed;
    params.skips = judgement.skips;
    params.verdict = scratch_.verdict;
    if (judgement.max_grad_norm || judgement.clip_norm) params.clips = scratch_.clips;
    if (is_first) {
      params.grad_norm = step_.grad_norm;
      params.skipped_now = step_.skipped_now;
      params.feedback = step_.feedback;
      params.call = step_.call;
      params.skipped = step_.skipped;
    }
    launch("the judgement of gradients", cuda::judge, dim3(1), dim3(kThreads), 0, stream_of(place_), params);
  }

  void settle() const {
    for (std::size_t k = 0; k < step_.cohorts.size(); ++k) {
      const Cohort& cohort = step_.cohorts[k];
      if (cohort.share != share_) continue;
      SettleParams params;
      params.verdict = step_.judgement != nullptr ? scratch_.verdict : nullptr;
      params.clock = cohort.clock;
      params.rows = cohort.resident ? cohort.rows : nullptr;
      params.first = cohort.first;
      params.count = cohort.count;
      params.around = cohort.around;
      std::byte* const at = scratch_.settings + k * kSettingsBytes;
      params.as_float = reinterpret_cast<Setting<float>*>(at);
      params.as_double = reinterpret_cast<Setting<double>*>(at + sizeof(Setting<float>));
      if (!cohort.resident) {
        if (cohort.count > kMostRows) throw std::runtime_error("too many rows");
        std::copy_n(cohort.rows, cohort.count, params.given);
      }
      launch("the coefficients of a step", cuda::settle, dim3(1), dim3(1), 0, stream_of(place_), params);
    }
  }

  void update() {
    const Common common = this->common();
    Tables<float, kPlainStreams> plain_float(common, updates_);
    Tables<double, kPlainStreams> plain_double(common, updates_);
    Tables<float, kStreams> whole_float(common, updates_);
    Tables<double, kStreams> whole_double(common, updates_);
    const Kernel* rule_before = nullptr;
    std::size_t storage_before = 0;
    const UpdateKernels* found = nullptr;
    const auto add = [&](const Tensor& tensor, const Item& item, std::uint64_t first) {
      if (tensor.kernel != rule_before || tensor.storage != storage_before) {
        rule_before = tensor.kernel;
        storage_before = tensor.storage;
        found = &update_kernels(*tensor.kernel, tensor.storage);
      }
      const UpdateKernels& kernels = *found;
      const Item piece{&tensor, item.original, item.position, first, is_random(tensor), has_rounding(tensor)};
      const bool plain = is_plain(tensor);
      const char* const rule = tensor.kernel->rule;
      if (is_double(tensor)) {
        if (plain) {
          plain_double.add({rule, kernels.plain_double, kernels.lanes}, piece);
        } else {
          whole_double.add({rule, kernels.whole_double, kernels.lanes}, piece);
        }
      } else if (plain) {
        plain_float.add({rule, kernels.plain_float, kernels.lanes}, piece);
      } else {
        whole_float.add({rule, kernels.whole_float, kernels.lanes}, piece);
      }
    };
    const auto flush = [&] {
      plain_float.flush();
      plain_double.flush();
      whole_float.flush();
      whole_double.flush();
    };
    for (const Item& item : items_) {
      Tensor tensor = *item.tensor;
      if (tensor.units != nullptr) {  // what shows the new parameter waits until that is final
        tensor.streams.data[kEma] = nullptr;
        tensor.streams.data[kMirror] = nullptr;
      }
      if (copied_streams(tensor) == 0) {
        add(tensor, item, 0);
        if (tensor.units != nullptr) flush();
      } else {
        for_pieces(
            tensor, scratch_.copies, place_, is_uncertain(common),
            [&](std::size_t stream) { return reads(tensor, stream); },
            [&](std::size_t stream) { return writes(tensor, stream); },
            [&](const Tensor& piece, std::uint64_t first) {
              add(piece, item, first);
              flush();
            });
      }
      if (tensor.units != nullptr) limit_units(item);
    }
    flush();
  }

  void accumulate() {
    for_tables({.name = "the sum of gradients",
                .kernels = &SupportKernels::accumulate,
                .stream = kGrad,
                .uses = {kGrad, kAccumulator},
                .reads = [](const Tensor& tensor, std::size_t stream) { return stream == kGrad || !tensor.sum_starts; },
                .writes = [](const Tensor& tensor,
                             std::size_t stream) { return stream == kAccumulator || tensor.around->zero_grads; }});
  }

  // Sums that an update reads and to which nothing was added.
  void start_sums() {
    std::vector<Tensor> empty;
    std::vector<Item> items;
    for (const Item& item : items_) {
      const Tensor& tensor = *item.tensor;
      if (tensor.streams.data[kAccumulator] == nullptr || !tensor.sum_starts) continue;
      static const Around neutral{};
      Tensor& start = empty.emplace_back(tensor);
      start.streams.data[kGrad] = nullptr;
      start.dtypes[kGrad] = compute_type(tensor);
      start.around = &neutral;
      items.push_back(item);
    }
    for (std::size_t k = 0; k < items.size(); ++k) items[k].tensor = items[k].original = &empty[k];
    Common common;
    common.place = place_;
    for_tables(common, items,
               {.name = "the start of a sum",
                .kernels = &SupportKernels::accumulate,
                .stream = kGrad,
                .uses = {kAccumulator},
                .reads = [](const Tensor& /*tensor*/, std::size_t /*stream*/) { return false; },
                .writes = [](const Tensor& /*tensor*/, std::size_t /*stream*/) { return true; }});
  }

  void zero_gradients() {
    for_tables({.name = "the zeroing of gradients",
                .kernels = &SupportKernels::zero,
                .stream = kGrad,
                .uses = {kGrad},
                .reads = [](const Tensor& /*tensor*/, std::size_t /*stream*/) { return false; },
                .writes = [](const Tensor& /*tensor*/, std::size_t /*stream*/) { return true; }});
  }

  void exchange() {
    for_tables({.name = "the exchange of averages",
                .kernels = &SupportKernels::exchange,
                .stream = kParam,
                .uses = {kParam, kEma, kMirror, kRemainder},
                .reads = [](const Tensor& /*tensor*/, std::size_t stream) { return stream != kMirror; },
                .writes = [](const Tensor& /*tensor*/, std::size_t /*stream*/) { return true; }});
  }

  void show() {
    for_tables({.name = "the mirrors of parameters",
                .kernels = &SupportKernels::show,
                .stream = kParam,
                .uses = {kParam, kMirror, kRemainder},
                .reads = [](const Tensor& /*tensor*/, std::size_t stream) { return stream != kMirror; },
                .writes = [](const Tensor& /*tensor*/, std::size_t stream) { return stream == kMirror; }});
  }

 private:
  // One kernel for each dtype of a stream, over all tensors that have it.
  struct Operation {
    const char* name;
    TableKernels SupportKernels::* kernels;
    Stream stream;
    std::vector<Stream> uses;
    bool (*reads)(const Tensor& tensor, std::size_t stream);
    bool (*writes)(const Tensor& tensor, std::size_t stream);
  };

  void for_tables(const Operation& operation) { for_tables(common(), items_, operation); }
  void for_tables(const Common& common, const std::vector<Item>& items, const Operation& operation) const {
    Tables<float, kStreams> floats(common);
    Tables<double, kStreams> doubles(common);
    for (const Item& item : items) {
      Tensor tensor = *item.tensor;
      for (std::size_t stream = 0; stream < kStreams; ++stream) {
        if (std::ranges::find(operation.uses, stream) == operation.uses.end()) tensor.streams.data[stream] = nullptr;
      }
      const bool copied = copied_streams(tensor) > 0;
      const TableKernels& kernels = support_for(tensor.dtypes[operation.stream]).*operation.kernels;
      for_pieces(
          tensor, scratch_.copies, place_, is_uncertain(common),
          [&](std::size_t stream) { return operation.reads(tensor, stream); },
          [&](std::size_t stream) { return operation.writes(tensor, stream); },
          [&](const Tensor& piece, std::uint64_t first) {
            Item of_piece = item;
            of_piece.tensor = &piece;
            of_piece.first = first;
            of_piece.rounds = tensor.sum_starts;
            if (kernels.as_double != nullptr) {
              doubles.add({operation.name, kernels.as_double, kernels.lanes}, of_piece);
            } else {
              floats.add({operation.name, kernels.as_float, kernels.lanes}, of_piece);
            }
            if (copied) {  // before its copy is overwritten
              floats.flush();
              doubles.flush();
            }
          });
    }
    floats.flush();
    doubles.flush();
  }

  template <class Params>
  void launch_kept(Keep* keep, const char* name, void (*kernel)(Params), unsigned blocks, unsigned threads,
                   const Params& params) const {
    launch(name, kernel, dim3(blocks), dim3(threads), 0, stream_of(place_), params);
    if (keep != nullptr) {
      keep->push_back(std::make_unique<KeptParams<Params>>(name, kernel, blocks, threads, params));
    }
  }

  static bool is_uncertain(const Common& common) { return common.verdict != nullptr || common.settings != nullptr; }

  Common common() const {
    Common common;
    common.place = place_;
    if (step_.judgement != nullptr) {
      common.verdict = step_.judgement->skips ? scratch_.verdict : nullptr;
      if (step_.judgement->max_grad_norm || step_.judgement->clip_norm) common.clips = scratch_.clips;
    }
    common.settings = scratch_.settings;
    common.cohorts_of = step_.cohorts_of;
    return common;
  }

  // From the squares of blocks to those of tensors.
  void add_parts() const {
    SumTable table;
    table.parts = scratch_.parts;
    table.sums = scratch_.sums;
    table.tensors = 0;
    const auto flush = [&] {
      if (table.tensors > 0) {
        launch_kept(measures_, "the norms of gradients", sum_parts, table.tensors, kSumLanes, table);
      }
      table.tensors = 0;
    };
    std::uint64_t part = 0;
    for (const Item& item : items_) {
      const std::uint64_t parts = parts_of(*item.tensor);
      if (table.tensors == SumTable::capacity) flush();
      table.entries[table.tensors++] = {part, parts, item.position};
      part += parts;
    }
    flush();
  }

  // Measures the units of a parameter that has been updated, scales it back and passes it on.
  void limit_units(const Item& item) {
    const Tensor& tensor = *item.tensor;
    if (tensor.count == 0) return;
    const Common common = this->common();
    const Units& units = *tensor.units;
    const UnitParams params{units.outer, units.depth, units.units, units.run, units.limit, scratch_.unit_sums};
    const SupportKernels& kernels = support_for(tensor.dtypes[kParam]);
    Entry<kStreams> entry{};
    std::byte* room = scratch_.whole_copies;
    for (const std::size_t stream : {std::size_t{kParam}, std::size_t{kRemainder}}) {
      entry.data[stream] = tensor.streams.data[stream];
      if (!is_copied(tensor, stream)) continue;
      copy(tensor, stream, 0, tensor.count, room, true, place_);
      entry.data[stream] = room;
      room += aligned(tensor.count * itemsize(tensor, stream));
    }
    const std::uint64_t blocks =
        divide_up(units.outer * units.units, units.run == 1 ? kUnitThreads : kUnitThreads / kGroupLanes);
    launch("the norms of units", kernels.unit_squares, dim3(static_cast<unsigned>(blocks)), dim3(kUnitThreads), 0,
           stream_of(place_), entry, params, common.verdict);

    Tensor later = tensor;
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const bool kept = stream == kParam || stream == kRemainder || stream == kEma || stream == kMirror;
      if (!kept) later.streams.data[stream] = nullptr;
    }
    Tables<float, kStreams> floats(common);
    Tables<double, kStreams> doubles(common);
    for_pieces(
        later, scratch_.copies, place_, is_uncertain(common), [&](std::size_t stream) { return reads(tensor, stream); },
        [&](std::size_t stream) { return writes(tensor, stream); },
        [&](const Tensor& piece, std::uint64_t first) {
          const Item of_piece{&piece, item.original, item.position, first, true, has_rounding(later), &params};
          if (kernels.finish.as_double != nullptr) {
            doubles.add({"the limit of units", kernels.finish.as_double, 1}, of_piece);
          } else {
            floats.add({"the limit of units", kernels.finish.as_float, 1}, of_piece);
          }
        });
  }

  const Step& step_;
  std::size_t share_;
  Place place_;
  Scratch scratch_;
  Keep* measures_;
  Keep* updates_;
  std::vector<Item> items_;
};

// What of the settings of tensors decides on tables and kernels: which tensors share one, and what each asks for.
std::vector<std::uint32_t> pattern_of(std::span<const Tensor> tensors) {
  std::vector<std::uint32_t> pattern;
  pattern.reserve(2 * tensors.size());
  std::vector<const Around*> known;
  const Around* before = nullptr;
  std::uint32_t number = 0;
  for (const Tensor& tensor : tensors) {
    if (tensor.around != before) {
      before = tensor.around;
      number = static_cast<std::uint32_t>(std::ranges::find(known, before) - known.begin());
      if (number == known.size()) known.push_back(before);
    }
    pattern.push_back(number);
  }
  for (const Around* const around : known) {
    pattern.push_back((std::isinf(around->clip_value) ? 1U : 0U) | (around->zero_grads ? 2U : 0U) |
                      (around->noise != 0.0 ? 4U : 0U));
  }
  return pattern;
}

// What a plan is for, and its launches.
class KeptStep final : public Plan {
 public:
  explicit KeptStep(const Step& step) : step_(step), share_(step.shares[0]), pattern_(pattern_of(step.tensors)) {
    if (step.judgement != nullptr) judgement_ = *step.judgement;
  }

  // Whether launches of a step can be kept: whatever is copied, or limited by unit, makes launches in between.
  static bool is_possible(const Step& step) {
    return step.shares.size() == 1 && step.updates && step.cohorts.empty() &&
           std::ranges::all_of(step.tensors, [](const Tensor& tensor) {
             return tensor.units == nullptr && !tensor.sum_starts && copied_streams(tensor) == 0;
           });
  }

  bool serves(const Step& step) const {
    const bool same = step.tensors.data() == step_.tensors.data() && step.tensors.size() == step_.tensors.size() &&
                      step.shares.size() == 1 && step.shares[0].place.device == share_.place.device &&
                      step.shares[0].scratch == share_.scratch && step.updates && step.cohorts.empty() &&
                      (step.judgement != nullptr) == (step_.judgement != nullptr);
    const bool judged_alike = step.judgement == nullptr ||
                              (step.judgement->max_grad_norm.has_value() == judgement_.max_grad_norm.has_value() &&
                               step.judgement->clip_norm.has_value() == judgement_.clip_norm.has_value() &&
                               step.judgement->skips == judgement_.skips);
    return same && judged_alike && pattern_of(step.tensors) == pattern_;
  }

  Keep measures, updates;

 private:
  Step step_;  // its pointers are compared, and not followed
  Share share_;
  std::vector<std::uint32_t> pattern_;
  Judgement judgement_;
};

// --- Several devices -------------------------------------------------------------------------------------------------

class Event {
 public:
  explicit Event(const Place& place) {
    const OnDevice current(place.device);
    check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event");
  }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(const Place& place) const {
    const OnDevice current(place.device);
    check(cudaEventRecord(event_, stream_of(place)), "recording an event");
  }
  void wait(const Place& place) const {
    const OnDevice current(place.device);
    check(cudaStreamWaitEvent(stream_of(place), event_, 0), "waiting for an event");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

void after(const Place& later, const Place& earlier) {
  const Event event(earlier);
  event.record(earlier);
  event.wait(later);
}

// Every device gets the sums of all.
void exchange_sums(const std::vector<Stepper>& steppers) {
  for (const Stepper& to : steppers) {
    const OnDevice current(to.place().device);
    for (const Stepper& from : steppers) {
      if (&from == &to) continue;
      after(to.place(), from.place());
      const std::vector<Item>& items = from.items();
      for (std::size_t k = 0; k < items.size();) {  // positions that follow upon each other
        std::size_t end = k + 1;
        while (end < items.size() && items[end].position == items[end - 1].position + 1) ++end;
        const std::uint32_t first = items[k].position;
        check(cudaMemcpyPeerAsync(to.sums() + first, to.place().device, from.sums() + first, from.place().device,
                                  (end - k) * sizeof(DeviceSquares), stream_of(to.place())),
              "copying norms between devices");
        k = end;
      }
    }
  }
  for (const Stepper& from : steppers) {  // whose sums the next step overwrites
    for (const Stepper& to : steppers) {
      if (&from != &to) after(from.place(), to.place());
    }
  }
}

// --- The backend -----------------------------------------------------------------------------------------------------

class Driver final : public Backend {
 public:
  std::vector<DeviceInfo> devices() const override {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice) {
      (void)cudaGetLastError();
      return {};
    }
    check(status, "looking for CUDA devices");
    std::vector<DeviceInfo> devices;
    for (int device = 0; device < count; ++device) {
      cudaDeviceProp properties{};
      check(cudaGetDeviceProperties(&properties, device), "asking for a device's properties");
      devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
    }
    return devices;
  }
  std::string architectures() const override { return ONEPASS_CUDA_ARCHITECTURES; }
  bool is_capturing(const Place& place) const override {
    const OnDevice current(place.device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_of(place), &status), "asking whether a stream is captured");
    return status != cudaStreamCaptureStatusNone;
  }
  void synchronize(int device) const override {
    const OnDevice current(device);
    check(cudaDeviceSynchronize(), "waiting for a device");
  }
  int device_of(const void* memory) const override {
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, memory), "asking where memory lies");
    if (attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged) return attributes.device;
    throw std::runtime_error("its memory is not that of a CUDA device");
  }
  void follow(const Place& place, void* stream) const override {
    if (stream != place.stream) after(place, {place.device, stream});
  }

  std::size_t scratch_bytes(const Step& step, std::size_t share) const override { return Scratch(step, share).bytes; }

  void copy(const Place& place, void* to, const void* from, std::size_t bytes) const override {
    const OnDevice current(place.device);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(place)), "copying between host and device");
    check(cudaStreamSynchronize(stream_of(place)), "copying between host and device");
  }

  std::optional<std::size_t> step(const Step& step) const override {
    auto* kept = step.plan != nullptr ? static_cast<KeptStep*>(step.plan->get()) : nullptr;
    if (kept != nullptr && kept->serves(step)) return repeat(step, *kept);
    std::unique_ptr<KeptStep> plan;
    if (step.plan != nullptr) {
      step.plan->reset();
      if (KeptStep::is_possible(step)) plan = std::make_unique<KeptStep>(step);
    }
    std::vector<Stepper> steppers;
    steppers.reserve(step.shares.size());
    for (std::size_t share = 0; share < step.shares.size(); ++share) {
      steppers.emplace_back(step, share, plan ? &plan->measures : nullptr, plan ? &plan->updates : nullptr);
    }
    const auto each = [&](auto action) {
      for (Stepper& stepper : steppers) {
        const OnDevice current(stepper.place().device);
        action(stepper);
      }
    };
    if (step.judgement != nullptr) {
      each([](Stepper& stepper) { stepper.measure(); });
      if (steppers.size() > 1) exchange_sums(steppers);
      if (const auto bad = first_bad(step, steppers.front())) return bad;
      each([&](Stepper& stepper) { stepper.judge(&stepper == steppers.data()); });
    }
    each([&](Stepper& stepper) {
      stepper.settle();
      if (!step.updates) return stepper.accumulate();
      stepper.start_sums();
      stepper.update();
    });
    if (plan) *step.plan = std::move(plan);
    return std::nullopt;
  }

  void zero_gradients(const Step& step) const override { run(step, &Stepper::zero_gradients); }
  void exchange(const Step& step) const override { run(step, &Stepper::exchange); }
  void show(const Step& step) const override { run(step, &Stepper::show); }

  std::size_t batchnorm_scratch_bytes(const BatchnormShape& shape) const override {
    return cuda::batchnorm_scratch_bytes(shape);
  }
  void batchnorm_forward(const Place& place, const BatchnormForward& call) const override {
    const OnDevice current(place.device);
    cuda::batchnorm_forward(place, call);
  }
  void batchnorm_backward(const Place& place, const BatchnormBackward& call) const override {
    const OnDevice current(place.device);
    cuda::batchnorm_backward(place, call);
  }

 private:
  // For Step::raises the first tensor whose gradient is not finite.
  std::optional<std::size_t> first_bad(const Step& step, const Stepper& stepper) const {
    if (!step.raises) return std::nullopt;
    std::vector<DeviceSquares> sums(step.tensors.size());
    copy(stepper.place(), sums.data(), stepper.sums(), sums.size() * sizeof(DeviceSquares));
    const auto found = std::ranges::find_if(sums, [](const DeviceSquares& sum) { return sum.bad != 0; });
    if (found == sums.end()) return std::nullopt;
    return static_cast<std::size_t>(found - sums.begin());
  }

  std::optional<std::size_t> repeat(const Step& step, KeptStep& kept) const {
    const Place& place = step.shares[0].place;
    const OnDevice current(place.device);
    if (step.judgement != nullptr) {
      for (const auto& launched : kept.measures) launched->launch(place);
      const Stepper stepper(step, 0, std::vector<Item>{});
      if (const auto bad = first_bad(step, stepper)) return bad;
      stepper.judge(true);
    }
    for (const auto& launched : kept.updates) launched->launch(place);
    return std::nullopt;
  }

  static void run(const Step& step, void (Stepper::*operation)()) {
    for (std::size_t share = 0; share < step.shares.size(); ++share) {
      Stepper stepper(step, share);
      const OnDevice current(stepper.place().device);
      (stepper.*operation)();
    }
  }
};

}  // namespace

const Backend& the_driver() {
  static const Driver driver;
  return driver;
}

}  // namespace onepass::cuda
