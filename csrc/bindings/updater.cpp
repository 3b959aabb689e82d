#include "bindings/updater.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/batch.h"
#include "bindings/device.h"
#include "bindings/device_counts.h"
#include "bindings/device_step.h"
#include "bindings/recipe.h"
#include "bindings/step.h"
#include "bindings/turn.h"
#include "cpu/dispatch.h"

namespace onepass {
namespace {

constexpr const char* kMiddleOfStep =
    "this optimizer is in the middle of a step, of another thread or of a schedule's caller; nothing was done";

// What an optimizer steps: its parameters, their states and step counts. Pointers are not kept, array objects are.
class Updater final : public Naming {
 public:
  // `groups`: for each group its rule's name; `group_of`: for each parameter its group; `slots`: for each parameter a
  // tuple of state arrays in the rule's order; `extras`: for each parameter a tuple of its average, mirror, remainder
  // and accumulator, None for those that it does not have; the names are those of messages.
  Updater(std::vector<std::string> groups, std::vector<std::size_t> group_of, const py::list& params,
          const std::vector<py::tuple>& slots, const std::vector<py::tuple>& extras,
          std::vector<std::string> param_names, std::vector<std::string> grad_names,
          std::vector<std::string> mirror_names, std::uint64_t seed, bool stochastic, std::int64_t accumulate)
      : rules_(std::move(groups)),
        group_of_(std::move(group_of)),
        param_names_(std::move(param_names)),
        grad_names_(std::move(grad_names)),
        mirror_names_(std::move(mirror_names)),
        accumulate_(accumulate),
        seed_(seed) {
    for (const std::size_t size : {group_of_.size(), slots.size(), extras.size(), param_names_.size(),
                                   grad_names_.size(), mirror_names_.size()}) {
      if (size != params.size()) throw py::value_error("params and what comes with each differ in length");
    }
    for (std::size_t i = 0; i < params.size(); ++i) {
      if (group_of_[i] >= rules_.size()) throw py::value_error("group_of: no such group");
      if (slots[i].size() != kernel_named(rules_[group_of_[i]]).slots.count) {
        throw py::value_error("slots: wrong number of states for rule " + rules_[group_of_[i]]);
      }
      if (extras[i].size() != kStreams - kEma) throw py::value_error("extras: wrong number of arrays");
      Owned owned;
      owned.stream[kParam] = params[i];
      for (std::size_t k = 0; k < slots[i].size(); ++k) owned.stream[kFirstSlot + k] = slots[i][k];
      for (std::size_t k = 0; k < extras[i].size(); ++k) {
        if (!extras[i][k].is_none()) owned.stream[kEma + k] = extras[i][k];
      }
      arrays_.push_back(std::move(owned));
    }
    counts_ = std::vector<std::atomic<std::int64_t>>(arrays_.size());
    received_ = std::vector<std::int64_t>(arrays_.size());
    first_of_group_.resize(rules_.size());
    batch_.stochastic = stochastic;
  }

  std::string name(std::size_t index, std::size_t stream) const override {
    if (stream == kParam) return param_names_[index];
    if (stream == kGrad) return grad_names_[index];
    if (stream == kMirror) return mirror_names_[index];
    const char* const state = stream == kEma         ? "ema"
                              : stream == kRemainder ? "remainder"
                              : stream == kAccumulator
                                  ? "accumulator"
                                  : kernel_named(rules_[group_of_[index]]).slots.data[stream - kFirstSlot];
    return "state[" + std::to_string(index) + "]['" + state + "']";
  }

  // Validates parameters, states and gradients (None, or one for each parameter) and writes nothing.
  void check(py::handle grads) {
    const Turn turn(stepping_);
    const Release release(*this);
    take_gradients(grads);
    batch_.zero_grads = false;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      const bool has_grad = !grads_.empty() && !grads_[i].is_none();
      batch_.add(kernel_named(rules_[group_of_[i]]), arrays_of(i, has_grad), nullptr, i);
    }
    batch_.validate(*this);
    devices_.assign(batch_.devices().begin(), batch_.devices().end());
  }

  // `recipes`: for each group a callable of t that gives what read_setting() takes for the t-th step of a parameter of
  // that group. Called once for each different t, before anything is written. They are passed each time, because a
  // schedule may belong to what owns the optimizer, and this class takes no part in garbage collection.
  // `bound`: `grads` is a tuple that is the same at each step.
  void step(py::handle grads, const py::list& recipes, py::handle given_options, bool bound) {
    const Turn turn(stepping_);
    const Release release(*this);
    if (swapped_) {
      throw std::runtime_error("parameters and averages are exchanged; call swap_ema() before the next step");
    }
    if (grads.is_none()) throw py::type_error("grads: expected gradients, got None");
    if (recipes.size() != rules_.size()) throw py::value_error("recipes: one for each group is needed");
    if (devices_.size() != arrays_.size()) throw std::runtime_error("check() comes before the first step");
    const StepOptions options = StepOptions::read(given_options);
    const Summation summation{accumulate_, accumulated_ + 1 >= accumulate_};
    take_gradients(grads);
    refresh_kernels();
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      if (!grads_[i].is_none() || (summation.last && received_[i] != 0)) stepped_.push_back(i);
    }
    const bool counted_by_devices = on_devices() && !stepped_.empty() && leave_counting_to_devices(options);
    const auto setting_at = [&](std::size_t group, std::int64_t t) -> Setting& {
      Setting* const setting = summation.last ? setting_for(group, t, recipes) : neutral_setting();
      options.enter(setting->around);
      setting->around.scaling.accumulate = static_cast<double>(accumulate_);
      return *setting;
    };
    DeviceCounts::Call call;
    if (counted_by_devices) device_counts_->begin(call, stepped_, stepped_devices(), setting_at);
    for (const std::size_t i : stepped_) {
      const std::int64_t t =
          counted_by_devices ? call.cohorts[call.cohorts_of[settings_of_.size()]].first : counts_[i] + 1;
      Setting* const setting = &setting_at(group_of_[i], t);
      if (counted_by_devices) setting->around.ema_starts = false;  // averages are read, whether they start or not
      settings_of_.push_back(setting);
    }
    const bool keeps = bound && on_devices() && accumulate_ == 1 && !counted_by_devices;
    Batch& batch = keeps ? bound_batch_ : batch_;
    const bool kept = keeps && is_bound_ && batch.zero_grads == options.zero_grads && bound_.is(grads) &&
                      std::ranges::none_of(settings_of_, [](const Setting* s) { return s->unit_limit > 0.0; });
    batch.seed = seed_;
    batch.zero_grads = options.zero_grads;
    if (kept) {
      batch.renew(settings_of_, *this);
    } else {
      if (keeps) forget_bound();
      std::size_t k = 0;
      for (const std::size_t i : stepped_) {
        batch.add(*kernels_[group_of_[i]].kernel, arrays_of(i, !grads_[i].is_none()), settings_of_[k++], i);
      }
      if (options.zero_grads && stepped_.size() < arrays_.size()) leave_the_others_alone(batch);
      batch.validate(*this);
      if (accumulate_ > 1) {
        for (k = 0; k < stepped_.size(); ++k) batch.tensors()[k].sum_starts = received_[stepped_[k]] == 0;
      }
      // Units have settings of their own.
      is_bound_ = keeps && batch.is_fixed() &&
                  std::ranges::none_of(batch.tensors(), [](const Tensor& t) { return t.units != nullptr; });
      if (is_bound_) bound_ = py::reinterpret_borrow<py::object>(grads);
    }
    turn.writes();
    Outcome outcome;
    DeviceReport report;
    Isa isa = isa_.load(std::memory_order_relaxed);
    if (!on_devices()) {
      outcome = run_step(batch, options, summation, *this, isa);
    } else {
      const bool waits = options.nonfinite == NonFinite::skip && !counted_by_devices;
      report = run_on_devices(batch, options, summation, *this, memory_, waits,
                              counted_by_devices ? &call.deferred : nullptr, is_bound_ && keeps ? &plan_ : nullptr);
      if (stepped_.empty() && options.needs_norm() && summation.last) {  // of no gradients
        fill_on(devices_.front(), memory_.norm(devices_.front()), 0.0);
        report.norm = true;
      }
      outcome.skipped =
          waits && report.skipped && memory_.skipped(stepped_devices().front()).attr("item")().cast<bool>();
    }
    isa_.store(isa, std::memory_order_relaxed);
    const std::scoped_lock lock(numbers_);
    grad_norm_ = outcome.grad_norm;
    has_device_norm_ = report.norm;
    if (counted_by_devices) {
      if (!device_counts_->is_prepared()) {
        device_counts_->done(stepped_, options.nonfinite == NonFinite::skip && options.needs_norm());
      }
    } else if (outcome.skipped) {
      ++skipped_;
    } else if (summation.last) {
      for (const std::size_t i : stepped_) counts_[i].fetch_add(1, std::memory_order_relaxed);
      if (accumulate_ > 1) std::ranges::fill(received_, 0);
      accumulated_ = 0;
    } else {
      for (const std::size_t i : stepped_) ++received_[i];
      ++accumulated_;
    }
  }

  // Leaves counts to the devices, with what the next `steps` steps need, so that a step may be captured into a CUDA
  // graph; or, with 0, takes them back. Waits for the devices.
  void prepare_capture(const py::list& recipes, std::int64_t steps) {
    const Turn turn(stepping_);
    const Release release(*this);
    if (!on_devices()) throw py::type_error("params: are on the host, and only steps on CUDA devices can be captured");
    if (accumulate_ > 1) throw py::value_error("accumulate: a sum of gradients cannot be captured");
    take_counts_back();
    memory_.keep_all(steps > 0);
    if (steps == 0) return;
    refresh_kernels();
    auto counts = std::make_shared<DeviceCounts>(group_of_, plain_counts(), devices_,
                                                 std::vector<bool>(arrays_.size(), true), skipped_, devices_.front());
    counts->prepare(steps, [&](std::size_t group, std::int64_t t) -> const Setting& {
      forget_cohorts();  // one at a time: there may be a million
      return *setting_for(group, t, recipes);
    });
    {
      const std::scoped_lock lock(numbers_);
      device_counts_ = std::move(counts);
    }
    reserve_memory();
  }
  bool is_prepared() const { return device_counts_ != nullptr && device_counts_->is_prepared(); }

  // Exchanges parameters and averages of all that was stepped before; mirrors follow the parameters.
  void swap_ema() {
    const Turn turn(stepping_);
    const Release release(*this);
    refresh_kernels();
    batch_.zero_grads = false;
    const std::vector<std::int64_t> known = counts();
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      if (!arrays_[i].stream[kEma] || known[i] == 0) continue;
      batch_.add(*kernels_[group_of_[i]].kernel, arrays_of(i, false), neutral_setting(), i);
    }
    batch_.validate(*this);
    turn.writes();
    if (on_devices()) {
      run_on_devices(batch_, memory_, &cuda::Backend::exchange);
    } else {
      batch_.exchange();
    }
    swapped_ = !swapped_;
  }

  // Validates parameters and mirrors and, unless it only `tries`, rounds the ones into the others. Between enter() and
  // leave(), for what has written into parameters.
  void show(bool tries) {
    const Release release(*this);
    batch_.zero_grads = false;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      if (!arrays_[i].stream[kMirror]) continue;
      batch_.add(kernel_named(rules_[group_of_[i]]), arrays_of(i, false), neutral_setting(), i);
    }
    batch_.validate(*this);
    if (tries) return;
    if (on_devices()) {
      run_on_devices(batch_, memory_, &cuda::Backend::show);
    } else {
      batch_.show();
    }
  }

  // All that an optimizer knows of the past beside its arrays. Between enter() and leave().
  void restore(const std::vector<std::int64_t>& counts, std::vector<std::int64_t> received, std::int64_t accumulated,
               std::uint64_t seed, std::int64_t skipped, bool swapped) {
    if (counts.size() != arrays_.size() || received.size() != arrays_.size()) {
      throw py::value_error("counts, received: one for each parameter is needed");
    }
    const std::scoped_lock lock(numbers_);
    device_counts_.reset();
    std::ranges::copy(counts, counts_.begin());
    received_ = std::move(received);
    accumulated_ = accumulated;
    seed_ = seed;
    skipped_ = skipped;
    swapped_ = swapped;
  }

  // These wait for devices that count.
  std::vector<std::int64_t> counts() const { return counted().counts; }
  std::int64_t skipped() const { return counted().skipped; }

  // None, a number, or on devices a CuPy array without dimensions, the same for all steps.
  py::object grad_norm() const {
    const std::scoped_lock lock(numbers_);
    if (has_device_norm_) return memory_.norm();
    return py::cast(grad_norm_);
  }
  std::uint64_t seed() const { return seed_; }
  bool swapped() const { return swapped_; }
  std::int64_t accumulated() const { return accumulated_; }
  std::vector<std::int64_t> received() const { return received_; }

  // Between the two no step begins: for Python code that reads or writes counts and states as a whole. What writes says
  // so before.
  void enter() { stepping_.take(); }
  void writes() { stepping_.writes(); }
  void leave() { stepping_.leave(); }

  const char* last_isa() const { return isa_name(isa_); }

 private:
  struct Owned {
    py::object stream[kStreams];
  };

  struct Cohort {
    std::size_t group;
    std::int64_t t;
    Setting setting;
  };

  // Drops, at the end of a step that passed or failed, what it held of the caller's; and at its beginning, what a
  // thread was about to step that a fork has left behind.
  struct Release {
    Updater& updater;
    explicit Release(Updater& u) : updater(u) { drop(); }
    ~Release() { drop(); }
    void drop() const {
      updater.batch_.clear();
      updater.grads_.clear();
      updater.stepped_.clear();
      updater.settings_of_.clear();
      updater.forget_cohorts();
    }
    Release(const Release&) = delete;
    Release& operator=(const Release&) = delete;
  };

  Arrays arrays_of(std::size_t index, bool has_grad) const {
    Arrays arrays;
    for (std::size_t stream = 0; stream < kStreams; ++stream) arrays.stream[stream] = arrays_[index].stream[stream];
    if (has_grad) arrays.stream[kGrad] = grads_[index];
    return arrays;
  }

  // What is zeroed as a gradient may not lie in the arrays of a parameter that this call does not step, either.
  void leave_the_others_alone(Batch& batch) const {
    std::size_t k = 0;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      if (k < stepped_.size() && stepped_[k] == i) {
        ++k;
      } else {
        batch.leave_alone(arrays_of(i, false), i);
      }
    }
  }

  void forget_bound() {
    is_bound_ = false;
    bound_ = py::object();
    plan_.reset();
    bound_batch_.clear();
  }

  bool on_devices() const { return !devices_.empty() && devices_.front() != kHost; }

  std::vector<std::int64_t> plain_counts() const { return {counts_.begin(), counts_.end()}; }

  DeviceCounts::Counted counted() const {
    std::shared_ptr<DeviceCounts> devices;
    {
      const std::scoped_lock lock(numbers_);
      if (device_counts_ == nullptr) return {plain_counts(), skipped_, 0};
      devices = device_counts_;
    }
    DeviceCounts::Counted counted = devices->read();  // lets other threads run
    counted.require_complete();
    return counted;
  }

  void take_counts_back() {
    if (device_counts_ == nullptr) return;
    const DeviceCounts::Counted counted = device_counts_->read();
    {
      const std::scoped_lock lock(numbers_);
      std::ranges::copy(counted.counts, counts_.begin());
      skipped_ = counted.skipped;
      device_counts_.reset();
    }
    counted.require_complete();  // once: the host counts on from what was done
  }

  std::vector<int> stepped_devices() const {
    std::vector<int> devices;
    devices.reserve(stepped_.size());
    for (const std::size_t i : stepped_) devices.push_back(devices_[i]);
    return devices;
  }

  // Whether the current streams of these devices are being captured.
  static bool is_captured(const std::vector<int>& devices) {
    std::map<int, bool> captured;
    for (const int device : devices) {
      const auto [found, is_new] = captured.try_emplace(device, false);
      if (is_new) found->second = backend().is_capturing(current_place(device));
    }
    for (const auto& [device, is] : captured) {
      if (is == captured.begin()->second) continue;
      throw std::runtime_error("step: the current stream of device " +
                               std::to_string(is ? device : captured.begin()->first) +
                               " is being captured, and that of device " +
                               std::to_string(is ? captured.begin()->first : device) + " is not; capture both or none");
    }
    return !captured.empty() && captured.begin()->second;
  }

  // Whether a step's counts are left to the devices: where they know alone whether it counts, or when it will run.
  bool leave_counting_to_devices(const StepOptions& options) {
    const std::vector<int> devices = stepped_devices();
    if (is_captured(devices)) {
      if (!is_prepared()) {
        throw std::runtime_error(
            "step: the current stream is being captured, and the counts of steps are kept by the host; call "
            "prepare_capture() before the capture");
      }
      if (options.nonfinite == NonFinite::raise) {
        throw py::value_error("nonfinite: 'raise' waits for the device, which a captured step cannot; use 'skip'");
      }
    }
    if (is_prepared()) {
      if (device_counts_->fits(stepped_, devices)) return true;
      throw py::value_error(
          "grads: after prepare_capture() parameters of one group and count are stepped together, or none of them; "
          "call prepare_capture(0) to step them apart");
    }
    if (accumulate_ > 1) return false;
    if (device_counts_ != nullptr && !device_counts_->fits(stepped_, devices)) take_counts_back();
    if (device_counts_ == nullptr && options.nonfinite == NonFinite::skip) {
      std::vector<bool> together(arrays_.size(), false);
      for (const std::size_t i : stepped_) together[i] = true;
      // The first device is that of the first parameter which is stepped.
      auto counts =
          std::make_shared<DeviceCounts>(group_of_, plain_counts(), devices_, together, skipped_, devices.front());
      const std::scoped_lock lock(numbers_);
      device_counts_ = std::move(counts);
    }
    return device_counts_ != nullptr;
  }

  // What a step needs that measures its gradients, before it is captured.
  void reserve_memory() {
    batch_.zero_grads = false;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      batch_.add(*kernels_[group_of_[i]].kernel, arrays_of(i, false), neutral_setting(), i);
    }
    batch_.validate(*this);
    reserve_for_steps(batch_, memory_, arrays_.size());
    batch_.clear();
  }

  // Of calls that update nothing.
  Setting* neutral_setting() {
    neutral_setting_ = Setting{};
    return &neutral_setting_;
  }

  void take_gradients(py::handle grads) {
    grads_.clear();
    if (grads.is_none()) return;
    // A tuple of our own: the caller's list may change under us.
    const auto sequence = py::reinterpret_steal<py::object>(PySequence_Tuple(grads.ptr()));
    if (!sequence) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(sequence.ptr()));
    if (count != arrays_.size()) {
      throw py::value_error("grads: " + std::to_string(count) + " given for " + std::to_string(arrays_.size()) +
                            " parameters");
    }
    for (std::size_t i = 0; i < count; ++i) {
      grads_.push_back(
          py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(sequence.ptr(), static_cast<py::ssize_t>(i))));
    }
  }

  void refresh_kernels() {
    const KernelTable* table = &active_kernels();
    if (table == table_) return;
    kernels_.clear();
    for (const std::string& rule : rules_) kernels_.emplace_back(*find_kernel(*table, rule));
    table_ = table;
  }

  // Parameters that have received equally many gradients share one setting; nearly always that is a group.
  Setting* setting_for(std::size_t group, std::int64_t t, const py::list& recipes) {
    if (Cohort* const known = find_cohort(group, t)) return &known->setting;
    const py::object recipe = recipes[group];
    const auto count = py::reinterpret_steal<py::object>(PyLong_FromLongLong(t));
    const auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(recipe.ptr(), count.ptr()));
    if (!result) throw py::error_already_set();
    Setting setting = read_setting(kernels_[group], result, t);
    if (used_cohorts_ == cohorts_.size()) cohorts_.emplace_back();
    Cohort& cohort = cohorts_[used_cohorts_++];
    cohort = {group, t, std::move(setting)};
    if (first_of_group_[group] == nullptr) {
      first_of_group_[group] = &cohort;
    } else {
      cohort_index_[{group, t}] = &cohort;
    }
    return &cohort.setting;
  }

  // The first of each group needs no index, whose nodes are allocated.
  Cohort* find_cohort(std::size_t group, std::int64_t t) const {
    Cohort* const first = first_of_group_[group];
    if (first == nullptr || first->t == t) return first;
    const auto found = cohort_index_.find({group, t});
    return found == cohort_index_.end() ? nullptr : found->second;
  }

  void forget_cohorts() {
    for (std::size_t k = 0; k < used_cohorts_; ++k) first_of_group_[cohorts_[k].group] = nullptr;
    used_cohorts_ = 0;
    cohort_index_.clear();
  }

  std::vector<std::string> rules_;
  std::vector<std::size_t> group_of_;
  std::vector<std::string> param_names_, grad_names_, mirror_names_;
  std::vector<Owned> arrays_;
  std::vector<std::atomic<std::int64_t>> counts_;
  // What a step leaves in numbers, for those who ask beside one: held for a moment and across no code of Python's, so
  // that no fork takes it along.
  mutable std::mutex numbers_;

  std::int64_t accumulate_;                   // calls in a sum of gradients
  std::atomic<std::int64_t> accumulated_{0};  // calls in the sum that is under way
  std::vector<std::int64_t> received_;        // gradients of each parameter in it
  std::atomic<std::uint64_t> seed_;
  std::atomic<std::int64_t> skipped_{0};
  std::optional<double> grad_norm_;  // of the last step, or none of these two
  bool has_device_norm_ = false;
  std::atomic<bool> swapped_{false};  // parameters and averages
  Setting neutral_setting_{};

  const KernelTable* table_ = nullptr;
  std::vector<BoundKernel> kernels_;
  std::atomic<Isa> isa_{Isa::scalar};
  Turnstile stepping_{"optimizer", kMiddleOfStep};

  std::vector<int> devices_;  // of the parameters
  DeviceMemory memory_;
  std::shared_ptr<DeviceCounts> device_counts_;  // null: the host counts; changed under numbers_

  // Of steps over CuPy's arrays with gradients that are bound: validated once, because such arrays do not move.
  Batch bound_batch_;
  bool is_bound_ = false;
  py::object bound_;
  std::unique_ptr<cuda::Plan> plan_;

  // Of the step under way; kept between steps for their memory.
  Batch batch_;
  std::vector<py::object> grads_;
  std::vector<std::size_t> stepped_;
  std::vector<Setting*> settings_of_;
  std::deque<Cohort> cohorts_;  // of which so many are used; those behind them keep their memory
  std::size_t used_cohorts_ = 0;
  std::vector<Cohort*> first_of_group_;
  std::map<std::pair<std::size_t, std::int64_t>, Cohort*> cohort_index_;
};

}  // namespace

void bind_updater(const py::module_& m) {
  py::class_<Updater>(m, "Updater")
      .def(py::init<std::vector<std::string>, std::vector<std::size_t>, const py::list&, const std::vector<py::tuple>&,
                    const std::vector<py::tuple>&, std::vector<std::string>, std::vector<std::string>,
                    std::vector<std::string>, std::uint64_t, bool, std::int64_t>(),
           py::arg("groups"), py::arg("group_of"), py::arg("params"), py::arg("slots"), py::arg("extras"),
           py::arg("param_names"), py::arg("grad_names"), py::arg("mirror_names"), py::arg("seed"),
           py::arg("stochastic"), py::arg("accumulate"))
      .def("check", &Updater::check, py::arg("grads").none(true))
      .def("step", &Updater::step, py::arg("grads"), py::arg("recipes"), py::arg("options").none(true) = py::none(),
           py::arg("bound") = false)
      .def("swap_ema", &Updater::swap_ema)
      .def("prepare_capture", &Updater::prepare_capture, py::arg("recipes"), py::arg("steps"))
      .def_property_readonly("prepared", &Updater::is_prepared)
      .def("show", &Updater::show, py::arg("tries"))
      .def("restore", &Updater::restore, py::arg("counts"), py::arg("received"), py::arg("accumulated"),
           py::arg("seed"), py::arg("skipped"), py::arg("swapped"))
      .def("__enter__", &Updater::enter)
      .def("writes", &Updater::writes)
      .def("__exit__", [](Updater& updater, const py::args& /*exception*/) { updater.leave(); })
      .def_property_readonly("counts", &Updater::counts)
      .def_property_readonly("seed", &Updater::seed)
      .def_property_readonly("skipped", &Updater::skipped)
      .def_property_readonly("swapped", &Updater::swapped)
      .def_property_readonly("accumulated", &Updater::accumulated)
      .def_property_readonly("received", &Updater::received)
      .def_property_readonly("grad_norm", &Updater::grad_norm)
      .def_property_readonly("last_isa", &Updater::last_isa);
}

}  // namespace onepass
