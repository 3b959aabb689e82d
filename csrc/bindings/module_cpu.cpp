// The Python module onepass._cpu. It knows rules, arrays and steps; hyper-parameters and recipes live in Python.
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
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/batch.h"
#include "bindings/batchnorm.h"
#include "bindings/step.h"
#include "bindings/turn.h"
#include "core/partition.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace onepass {
namespace {

std::vector<std::string> text(const Names& names) { return {names.data, names.data + names.count}; }

const Kernel& kernel_named(const std::string& rule) {
  const Kernel* kernel = find_kernel(active_kernels(), rule);
  if (kernel == nullptr) throw py::value_error("rule: '" + rule + "' is not in the registry");
  return *kernel;
}

py::list registry() {
  const KernelTable& table = active_kernels();
  py::list rules;
  for (std::size_t k = 0; k < table.count; ++k) {
    const Kernel& kernel = table.kernels[k];
    py::dict row;
    row["name"] = kernel.rule;
    row["slots"] = py::tuple(py::cast(text(kernel.slots)));
    row["coefficients"] = py::tuple(py::cast(text(kernel.coefficients)));
    row["yardstick"] = kernel.yardstick;
    rules.append(row);
  }
  return rules;
}

double number(py::handle value, const char* what) {
  const double result = PyFloat_AsDouble(value.ptr());
  if (result == -1.0 && PyErr_Occurred() != nullptr) {
    const py::error_already_set error;
    if (!error.matches(PyExc_TypeError)) throw error;
    throw py::type_error(std::string(what) + ": expected a number, got " +
                         std::string(py::str(py::type::handle_of(value).attr("__name__"))));
  }
  return result;
}

// A rule's kernel with the names of its coefficients as Python strings: looking a dict up by one builds nothing.
struct BoundKernel {
  explicit BoundKernel(const Kernel& k) : kernel(&k) {
    for (const std::string& name : text(k.coefficients)) {
      keys.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str())));
    }
  }
  const Kernel* kernel;
  std::vector<py::object> keys;
};

// `recipe`: (coefficients, sign, l1, l2, decay, ema_decay, noise, max_unit_norm) for the t-th step, as
// Optimizer.surround() gives it. `coefficients` is a dict of the rule's coefficients by name, all of them and no other.
Setting read_setting(const BoundKernel& bound, py::handle recipe, std::int64_t t) {
  const Kernel& kernel = *bound.kernel;
  constexpr py::ssize_t fields = 8;
  if (PyTuple_Check(recipe.ptr()) == 0 || PyTuple_GET_SIZE(recipe.ptr()) != fields) {
    throw py::type_error("recipe: expected (coefficients, sign, l1, l2, decay, ema_decay, noise, max_unit_norm)");
  }
  const auto item = [&](py::ssize_t k) { return py::handle(PyTuple_GET_ITEM(recipe.ptr(), k)); };
  const py::handle coefficients = item(0);
  Setting setting{};
  if (PyDict_Check(coefficients.ptr()) == 0) throw py::type_error("coefficients: expected a dict");
  for (std::size_t k = 0; k < kernel.coefficients.count; ++k) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    PyDict_GetItemRef(coefficients.ptr(), bound.keys[k].ptr(), &found);
    const auto value = py::reinterpret_steal<py::object>(found);
#else
    const auto value =
        py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(coefficients.ptr(), bound.keys[k].ptr()));
#endif
    if (!value) {
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      throw py::key_error(std::string(kernel.rule) + " needs the coefficient '" + kernel.coefficients.data[k] + "'");
    }
    setting.coefficients[k] = number(value, kernel.coefficients.data[k]);
  }
  if (!std::cmp_equal(PyDict_Size(coefficients.ptr()), kernel.coefficients.count)) {
    throw py::key_error(std::string(kernel.rule) + " takes the coefficients " +
                        std::string(py::str(py::cast(text(kernel.coefficients)))) + " and no other");
  }
  Around& around = setting.around;
  around.sign = number(item(1), "sign");
  around.l1 = number(item(2), "l1");
  around.l2 = number(item(3), "l2");
  around.decay = number(item(4), "decay");
  if (!item(5).is_none()) around.ema_decay = number(item(5), "ema_decay");
  around.noise = number(item(6), "noise");
  around.ema_starts = t == 1;
  setting.t = static_cast<std::uint64_t>(t);
  if (!item(7).is_none()) {
    const auto unit_norm = item(7).cast<std::pair<double, std::vector<std::int64_t>>>();
    setting.unit_limit = unit_norm.first;
    setting.axes = unit_norm.second;
  }
  return setting;
}

constexpr const char* kBusy =
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
  }

  // `recipes`: for each group a callable of t that gives what read_setting() takes for the t-th step of a parameter of
  // that group. Called once for each different t, before anything is written. They are passed each time, because a
  // schedule may belong to what owns the optimizer, and this class takes no part in garbage collection.
  void step(py::handle grads, const py::list& recipes, py::handle given_options) {
    const Turn turn(stepping_);
    const Release release(*this);
    if (swapped_) {
      throw std::runtime_error("parameters and averages are exchanged; call swap_ema() before the next step");
    }
    if (grads.is_none()) throw py::type_error("grads: expected gradients, got None");
    if (recipes.size() != rules_.size()) throw py::value_error("recipes: one for each group is needed");
    const StepOptions options = StepOptions::read(given_options);
    const Summation summation{accumulate_, accumulated_ + 1 >= accumulate_};
    take_gradients(grads);
    refresh_kernels();
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      if (grads_[i].is_none() && (!summation.last || received_[i] == 0)) continue;
      Setting* const setting = summation.last ? setting_for(group_of_[i], counts_[i] + 1, recipes) : neutral_setting();
      options.enter(setting->around);
      setting->around.accumulate = static_cast<double>(accumulate_);
      settings_of_.push_back(setting);
      stepped_.push_back(i);
    }
    batch_.seed = seed_;
    batch_.zero_grads = options.zero_grads;
    std::size_t k = 0;
    for (const std::size_t i : stepped_) {
      batch_.add(*kernels_[group_of_[i]].kernel, arrays_of(i, !grads_[i].is_none()), settings_of_[k++], i);
    }
    if (options.zero_grads && stepped_.size() < arrays_.size()) leave_the_others_alone();
    batch_.validate(*this);
    if (accumulate_ > 1) {
      for (k = 0; k < stepped_.size(); ++k) batch_.tensors()[k].sum_starts = received_[stepped_[k]] == 0;
    }
    turn.writes();
    Isa isa = isa_.load(std::memory_order_relaxed);
    const Outcome outcome = run_step(batch_, options, summation, *this, isa);
    isa_.store(isa, std::memory_order_relaxed);
    const std::scoped_lock lock(numbers_);
    grad_norm_ = outcome.grad_norm;
    if (outcome.skipped) {
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

  // Exchanges parameters and averages of all that was stepped before; mirrors follow the parameters.
  void swap_ema() {
    const Turn turn(stepping_);
    const Release release(*this);
    refresh_kernels();
    batch_.zero_grads = false;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      if (!arrays_[i].stream[kEma] || counts_[i] == 0) continue;
      batch_.add(*kernels_[group_of_[i]].kernel, arrays_of(i, false), neutral_setting(), i);
    }
    batch_.validate(*this);
    turn.writes();
    batch_.exchange();
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
    if (!tries) batch_.show();
  }

  // All that an optimizer knows of the past beside its arrays. Between enter() and leave().
  void restore(const std::vector<std::int64_t>& counts, std::vector<std::int64_t> received, std::int64_t accumulated,
               std::uint64_t seed, std::int64_t skipped, bool swapped) {
    if (counts.size() != arrays_.size() || received.size() != arrays_.size()) {
      throw py::value_error("counts, received: one for each parameter is needed");
    }
    const std::scoped_lock lock(numbers_);
    std::ranges::copy(counts, counts_.begin());
    received_ = std::move(received);
    accumulated_ = accumulated;
    seed_ = seed;
    skipped_ = skipped;
    swapped_ = swapped;
  }

  std::vector<std::int64_t> counts() const {
    const std::scoped_lock lock(numbers_);
    return {counts_.begin(), counts_.end()};
  }

  std::optional<double> grad_norm() const {
    const std::scoped_lock lock(numbers_);
    return grad_norm_;
  }
  std::uint64_t seed() const { return seed_; }
  std::int64_t skipped() const { return skipped_; }
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
      updater.cohorts_.clear();
      updater.cohort_index_.clear();
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
  void leave_the_others_alone() {
    std::size_t k = 0;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      if (k < stepped_.size() && stepped_[k] == i) {
        ++k;
      } else {
        batch_.leave_alone(arrays_of(i, false), i);
      }
    }
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
    if (!cohorts_.empty() && cohorts_.back().group == group && cohorts_.back().t == t) return &cohorts_.back().setting;
    if (!cohorts_.empty()) {
      const auto found = cohort_index_.find({group, t});
      if (found != cohort_index_.end()) return &found->second->setting;
    }
    const py::object recipe = recipes[group];
    const auto count = py::reinterpret_steal<py::object>(PyLong_FromLongLong(t));
    const auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(recipe.ptr(), count.ptr()));
    if (!result) throw py::error_already_set();
    const Setting setting = read_setting(kernels_[group], result, t);
    if (!cohorts_.empty()) cohort_index_[{cohorts_.back().group, cohorts_.back().t}] = &cohorts_.back();
    cohorts_.push_back({group, t, setting});
    return &cohorts_.back().setting;
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
  std::optional<double> grad_norm_;   // of the last step
  std::atomic<bool> swapped_{false};  // parameters and averages
  Setting neutral_setting_{};

  const KernelTable* table_ = nullptr;
  std::vector<BoundKernel> kernels_;
  std::atomic<Isa> isa_{Isa::scalar};
  Turnstile stepping_{"optimizer", kBusy};

  // Of the step under way; kept between steps for their memory.
  Batch batch_;
  std::vector<py::object> grads_;
  std::vector<std::size_t> stepped_;
  std::vector<Setting*> settings_of_;
  std::deque<Cohort> cohorts_;
  std::map<std::pair<std::size_t, std::int64_t>, Cohort*> cohort_index_;
};

// One step over arrays that the caller owns. `names`: what params, grads and each slot's list are called; `single`:
// they are arrays, not lists.
class OwnedArrays final : public Naming {
 public:
  OwnedArrays(const std::vector<std::string>& names, bool single) : names_(names), single_(single) {}
  std::string name(std::size_t index, std::size_t stream) const override {
    return single_ ? names_[stream] : names_[stream] + "[" + std::to_string(index) + "]";
  }

 private:
  const std::vector<std::string>& names_;
  bool single_;
};

// `streams`: for each stream but the gradients' the list of its arrays, or None; `recipe` as in read_setting();
// `summation`: (calls in a sum of gradients, which of them this is). Returns (gradient norm or None, skipped).
py::tuple update_owned(const std::string& rule, const std::vector<py::object>& grads, const py::list& streams,
                       const py::tuple& recipe, std::int64_t t, const py::object& given_options, std::uint64_t seed,
                       bool stochastic, std::pair<std::int64_t, std::int64_t> summation,
                       const std::vector<std::string>& names, bool single) {
  const Kernel& kernel = kernel_named(rule);
  if (streams.size() != kStreams || names.size() != kStreams) throw py::value_error("streams: wrong number of lists");
  std::vector<std::vector<py::object>> arrays(kStreams);
  for (std::size_t stream = 0; stream < kStreams; ++stream) {
    if (!streams[stream].is_none()) arrays[stream] = streams[stream].cast<std::vector<py::object>>();
  }
  arrays[kGrad] = grads;
  const std::size_t count = arrays[kParam].size();
  for (std::size_t stream = 0; stream < kStreams; ++stream) {
    if (streams[stream].is_none() && stream != kGrad) continue;
    if (arrays[stream].size() != count) {
      throw py::value_error(names[stream] + ": " + std::to_string(arrays[stream].size()) + " given for " +
                            std::to_string(count) + " parameters");
    }
  }
  for (std::size_t k = 0; k < kMaxSlots; ++k) {
    if (streams[kFirstSlot + k].is_none() == (k < kernel.slots.count)) {
      throw py::value_error("rule " + rule + " has " + std::to_string(kernel.slots.count) + " slots");
    }
  }

  const OwnedArrays naming(names, single);
  const StepOptions options = StepOptions::read(given_options);
  const Summation sum{summation.first, summation.second >= summation.first};
  Setting setting = read_setting(BoundKernel(kernel), recipe, t);
  options.enter(setting.around);
  setting.around.accumulate = static_cast<double>(sum.calls);
  if (!sum.last) setting.unit_limit = 0.0;
  Batch batch;
  batch.seed = seed;
  batch.stochastic = stochastic;
  batch.zero_grads = options.zero_grads;
  const auto arrays_of = [&](std::size_t i) {
    Arrays of_param;
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const bool optional = stream == kGrad || stream == kMirror;
      if (arrays[stream].empty() || (optional && arrays[stream][i].is_none())) continue;
      of_param.stream[stream] = arrays[stream][i];
    }
    return of_param;
  };
  for (std::size_t i = 0; i < count; ++i) {
    if (!grads[i].is_none()) {
      batch.add(kernel, arrays_of(i), &setting, i);
    } else if (sum.calls > 1) {
      throw py::type_error(naming.name(i, kGrad) + ": None, and gradients are summed over " +
                           std::to_string(sum.calls) + " calls; leave the parameter out of all of them, or pass zeros");
    }
  }
  for (std::size_t i = 0; i < count && options.zero_grads; ++i) {
    if (grads[i].is_none()) batch.leave_alone(arrays_of(i), i);
  }
  batch.validate(naming);
  if (sum.calls > 1) {
    for (Tensor& tensor : batch.tensors()) tensor.sum_starts = summation.second == 1;
  }
  Isa isa = Isa::scalar;
  const Outcome outcome = run_step(batch, options, sum, naming, isa);
  return py::make_tuple(outcome.grad_norm, outcome.skipped);
}

// A NumPy array over the memory of a parameter, for Python code that computes with it: the array itself, or a view of
// what it exports. Validates it as a parameter.
py::object as_ndarray(const py::object& param, const std::string& name) {
  try {
    Keeper keeper;
    const ArrayView view = view_array(param, keeper);
    require_updatable(view);
    if (py::isinstance<py::array>(param)) return param;
    const std::vector<py::ssize_t> shape(view.shape.begin(), view.shape.end());
    const std::vector<py::ssize_t> strides(view.strides.begin(), view.strides.end());
    auto held = std::make_unique<Keeper>(std::move(keeper));
    const py::capsule owner(held.get(), [](void* pointer) { delete static_cast<Keeper*>(pointer); });
    [[maybe_unused]] const Keeper* const owned = held.release();
    return py::array(numpy_dtype(view.dtype), shape, strides, view.data, owner);
  } catch (const ArgumentError& error) {
    error.raise(name);
  }
}

// The turns of several objects, taken in one go and given back in one go: an interrupt finds all of them taken or none.
class Turns {
 public:
  explicit Turns(std::vector<py::object> objects) : objects_(std::move(objects)) {}
  void enter() const {
    std::size_t taken = 0;
    try {
      for (; taken < objects_.size(); ++taken) objects_[taken].attr("__enter__")();
    } catch (...) {
      leave(taken);
      throw;
    }
  }
  void leave() const { leave(objects_.size()); }

 private:
  void leave(std::size_t taken) const {
    while (taken-- > 0) objects_[taken].attr("__exit__")(py::none(), py::none(), py::none());
  }
  std::vector<py::object> objects_;
};

// Calls each function with its arguments, one after another. The interpreter runs signal handlers between instructions
// of Python, and here are none: if all are compiled functions, an interrupt finds all of them done or none.
void call_all(const std::vector<std::pair<py::object, py::tuple>>& calls) {
  for (const auto& [function, arguments] : calls) {
    if (!py::reinterpret_steal<py::object>(PyObject_CallObject(function.ptr(), arguments.ptr()))) {
      throw py::error_already_set();
    }
  }
}

// A state array filled with `value`, like `param` in shape and memory order, and like it in its place relative to cache
// lines, so that a kernel that is aligned in one is aligned in both. `dtype`: of NumPy, of any kind.
py::object state_like(const py::array& param, double value, const py::dtype& dtype) {
  Keeper keeper;
  const ArrayView view = view_array(param, keeper);
  const py::object numpy = py::module_::import("numpy");
  const auto itemsize = static_cast<std::size_t>(dtype.itemsize());
  const auto nbytes = static_cast<py::ssize_t>(view.count * itemsize);
  // NumPy's own allocation: zeros that cost nothing until they are touched, and huge pages.
  const auto memory = numpy.attr("zeros")(nbytes + static_cast<py::ssize_t>(2 * kCacheLine), "u1").cast<py::array>();
  const auto* const start = static_cast<const std::byte*>(memory.data());
  // The elements before the parameter's first cache line, and where that line begins in the state.
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(view.data) % kCacheLine;
  const std::size_t before =
      misaligned % view.itemsize() == 0 ? (kCacheLine - misaligned) % kCacheLine / view.itemsize() : 0;
  const std::size_t shift =
      (2 * kCacheLine * itemsize - reinterpret_cast<std::uintptr_t>(start) % kCacheLine - before * itemsize) %
      kCacheLine;
  const std::vector<py::ssize_t> shape(view.shape.begin(), view.shape.end());
  std::vector<py::ssize_t> strides(view.strides.begin(), view.strides.end());
  for (py::ssize_t& stride : strides) {
    stride = stride / static_cast<py::ssize_t>(view.itemsize()) * static_cast<py::ssize_t>(itemsize);
  }
  py::array state(dtype, shape, strides, start + shift, memory);
  if (value != 0.0) state.attr("fill")(value);
  return state;
}

// NumPy's types and the names that are interned here are those of the interpreter that was first.
bool in_subinterpreter() { return PyInterpreterState_Get() != PyInterpreterState_Main(); }
constexpr const char* kMainOnly =
    "onepass works in the main interpreter only, and this is a sub-interpreter; use processes instead";

}  // namespace
}  // namespace onepass

// Python calls the entry point below, and not pybind11's: before CPython 3.12 that one would ask for the lock of the
// main interpreter, and wait for it for ever in a sub-interpreter. From 3.13 on the entry point runs in the main
// interpreter, whoever imports, so the module's own code asks again.
#define PyInit__cpu PyInit_by_pybind11  // NOLINT(bugprone-reserved-identifier,cppcoreguidelines-macro-usage)
PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  using namespace onepass;  // NOLINT(google-build-using-namespace): the module's one function
  if (in_subinterpreter()) throw py::import_error(kMainOnly);
  // While nobody else is here: what is set up once, and what another thread, or a fork in between, would wait for.
  is_numpy_array(py::none());
  prepare_threads();
  watch_forks();
  m.doc() = "The CPU kernels of onepass. Use the classes and functions of the package instead.";
  m.attr("__version__") = ONEPASS_VERSION;

  py::class_<Updater>(m, "Updater")
      .def(py::init<std::vector<std::string>, std::vector<std::size_t>, const py::list&, const std::vector<py::tuple>&,
                    const std::vector<py::tuple>&, std::vector<std::string>, std::vector<std::string>,
                    std::vector<std::string>, std::uint64_t, bool, std::int64_t>(),
           py::arg("groups"), py::arg("group_of"), py::arg("params"), py::arg("slots"), py::arg("extras"),
           py::arg("param_names"), py::arg("grad_names"), py::arg("mirror_names"), py::arg("seed"),
           py::arg("stochastic"), py::arg("accumulate"))
      .def("check", &Updater::check, py::arg("grads").none(true))
      .def("step", &Updater::step, py::arg("grads"), py::arg("recipes"), py::arg("options").none(true) = py::none())
      .def("swap_ema", &Updater::swap_ema)
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

  m.def("update", &update_owned, py::arg("rule"), py::arg("grads"), py::arg("streams"), py::arg("recipe"), py::arg("t"),
        py::arg("options").none(true), py::arg("seed"), py::arg("stochastic"), py::arg("summation"), py::arg("names"),
        py::arg("single") = false);
  m.def("as_ndarray", &as_ndarray, py::arg("param"), py::arg("name"));
  py::class_<Turns>(m, "Turns")
      .def(py::init<std::vector<py::object>>(), py::arg("objects"))
      .def("__enter__", &Turns::enter)
      .def("__exit__", [](const Turns& turns, const py::args& /*exception*/) { turns.leave(); });
  m.def("call_all", &call_all, py::arg("calls"));
  m.def("state_like", &state_like, py::arg("param"), py::arg("value"), py::arg("dtype"));
  m.def("registry", &registry);
  m.def("dtypes", [] {
    std::vector<std::string> names;
    for (const DTypeInfo& dtype : DTypeTable<DTypes>::rows) names.emplace_back(dtype.name);
    return names;
  });
  m.def("compute_dtypes", [] {
    std::vector<std::string> names;
    for (const DTypeInfo& dtype : DTypeTable<ComputeTypes>::rows) names.emplace_back(dtype.name);
    return names;
  });
  m.def("storages", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> rows;
    for (const StorageInfo& row : kStorages) {
      rows.emplace_back(info(row.param).name, info(row.grad).name, info(row.state).name);
    }
    return rows;
  });

  bind_batchnorm(m);

  m.def("isa", [] { return isa_name(active_kernels().isa); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("set_isa", [](const std::string& name) { set_isa(name); }, py::arg("name"));
  m.def("serial_bytes", &serial_bytes);
  m.def("set_serial_bytes", &set_serial_bytes, py::arg("count"));
  m.def(
      "set_cache_sizes", [](std::size_t level2, std::size_t level3) { set_cache_sizes({level2, level3}); },
      py::arg("level2"), py::arg("level3"));
  m.def("get_num_threads", &thread_count);
  m.def("set_num_threads", &set_thread_count, py::arg("count"));
}
#undef PyInit__cpu

extern "C" PYBIND11_EXPORT PyObject* PyInit__cpu() {  // NOLINT(bugprone-reserved-identifier)
  if (!onepass::in_subinterpreter()) return PyInit_by_pybind11();
  PyErr_SetString(PyExc_ImportError, onepass::kMainOnly);
  return nullptr;
}
