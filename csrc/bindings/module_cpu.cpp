// The Python module onepass._cpu. It knows rules, arrays and steps; hyper-parameters and recipes live in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/batch.h"
#include "bindings/batchnorm.h"
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

// `coefficients`: dict of the rule's coefficients by name, all of them and no other.
Setting read_setting(const BoundKernel& bound, py::handle coefficients, py::handle scale, py::handle l1, py::handle l2,
                     py::handle decay) {
  const Kernel& kernel = *bound.kernel;
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
  setting.around = {number(scale, "scale"), number(l1, "l1"), number(l2, "l2"), number(decay, "decay")};
  return setting;
}

constexpr const char* kBusy =
    "this optimizer is in the middle of a step, of another thread or of a schedule's caller; nothing was done";

// One step of an optimizer has an owner: a second thread, or a schedule that steps its own optimizer, is turned away.
class Turn {
 public:
  explicit Turn(std::atomic<bool>& taken) : taken_(taken) {
    if (taken_.exchange(true, std::memory_order_acquire)) throw std::runtime_error(kBusy);
  }
  ~Turn() { taken_.store(false, std::memory_order_release); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::atomic<bool>& taken_;
};

// What an optimizer steps: its parameters, their states and step counts. Pointers are not kept, array objects are.
class Updater final : public Naming {
 public:
  // `groups`: for each group its rule's name; `group_of`: for each parameter its group; `slots`: for each parameter a
  // tuple of state arrays in the rule's order; the names are those of messages.
  Updater(std::vector<std::string> groups, std::vector<std::size_t> group_of, const py::list& params,
          const std::vector<py::tuple>& slots, std::vector<std::string> param_names,
          std::vector<std::string> grad_names)
      : rules_(std::move(groups)),
        group_of_(std::move(group_of)),
        param_names_(std::move(param_names)),
        grad_names_(std::move(grad_names)) {
    if (group_of_.size() != params.size() || slots.size() != params.size() || param_names_.size() != params.size() ||
        grad_names_.size() != params.size()) {
      throw py::value_error("params and what comes with each differ in length");
    }
    for (std::size_t i = 0; i < params.size(); ++i) {
      if (group_of_[i] >= rules_.size()) throw py::value_error("group_of: no such group");
      if (slots[i].size() != kernel_named(rules_[group_of_[i]]).slots.count) {
        throw py::value_error("slots: wrong number of states for rule " + rules_[group_of_[i]]);
      }
      params_.emplace_back(params[i]);
      first_slot_.push_back(slots_.size());
      for (const py::handle slot : slots[i]) slots_.push_back(py::reinterpret_borrow<py::object>(slot));
    }
    counts_ = std::vector<std::atomic<std::int64_t>>(params_.size());
  }

  std::string name(std::size_t index, std::size_t stream) const override {
    if (stream == kParam) return param_names_[index];
    if (stream == kGrad) return grad_names_[index];
    return "state[" + std::to_string(index) + "]['" +
           kernel_named(rules_[group_of_[index]]).slots.data[stream - kFirstSlot] + "']";
  }

  // Validates parameters, states and gradients (None, or one for each parameter) and writes nothing.
  void check(py::handle grads) {
    const Turn turn(stepping_);
    const Release release(*this);
    take_gradients(grads);
    for (std::size_t i = 0; i < params_.size(); ++i) {
      const bool has_grad = !grads_.empty() && !grads_[i].is_none();
      batch_.add(kernel_named(rules_[group_of_[i]]), params_[i], has_grad ? py::handle(grads_[i]) : py::handle(),
                 slots_.data() + first_slot_[i], nullptr, i);
    }
    batch_.validate(*this);
  }

  // `recipes`: for each group a callable of t that gives (coefficients, scale, l1, l2, decay) for the t-th step of a
  // parameter of that group. Called once for each different t, before anything is written. They are passed each time,
  // because a schedule may belong to what owns the optimizer, and this class takes no part in garbage collection.
  void step(py::handle grads, const py::list& recipes) {
    const Turn turn(stepping_);
    const Release release(*this);
    if (grads.is_none()) throw py::type_error("grads: expected gradients, got None");
    if (recipes.size() != rules_.size()) throw py::value_error("recipes: one for each group is needed");
    take_gradients(grads);
    refresh_kernels();
    for (std::size_t i = 0; i < params_.size(); ++i) {
      if (grads_[i].is_none()) continue;
      settings_of_.push_back(setting_for(group_of_[i], counts_[i] + 1, recipes));
      stepped_.push_back(i);
    }
    std::size_t k = 0;
    for (const std::size_t i : stepped_) {
      batch_.add(*kernels_[group_of_[i]].kernel, params_[i], grads_[i], slots_.data() + first_slot_[i],
                 settings_of_[k++], i);
    }
    batch_.validate(*this);
    isa_ = batch_.run();
    for (const std::size_t i : stepped_) counts_[i].fetch_add(1, std::memory_order_relaxed);
  }

  std::vector<std::int64_t> counts() const { return {counts_.begin(), counts_.end()}; }
  void set_counts(const std::vector<std::int64_t>& counts) {
    if (counts.size() != params_.size()) throw py::value_error("counts: one for each parameter is needed");
    std::ranges::copy(counts, counts_.begin());
  }

  // Between the two no step begins: for Python code that reads or writes counts and states as a whole.
  void enter() {
    if (stepping_.exchange(true, std::memory_order_acquire)) throw std::runtime_error(kBusy);
  }
  void leave() { stepping_.store(false, std::memory_order_release); }

  const char* last_isa() const { return isa_name(isa_); }

 private:
  struct Cohort {
    std::size_t group;
    std::int64_t t;
    Setting setting;
  };

  // Drops, at the end of a step that passed or failed, what it held of the caller's.
  struct Release {
    Updater& updater;
    explicit Release(Updater& u) : updater(u) {}
    ~Release() {
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

  void take_gradients(py::handle grads) {
    grads_.clear();
    if (grads.is_none()) return;
    // A tuple of our own: the caller's list may change under us.
    const auto sequence = py::reinterpret_steal<py::object>(PySequence_Tuple(grads.ptr()));
    if (!sequence) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(sequence.ptr()));
    if (count != params_.size()) {
      throw py::value_error("grads: " + std::to_string(count) + " given for " + std::to_string(params_.size()) +
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
    if (PyTuple_Check(result.ptr()) == 0 || PyTuple_GET_SIZE(result.ptr()) != 5) {
      throw py::type_error("recipe: expected (coefficients, scale, l1, l2, decay)");
    }
    const auto item = [&](int k) { return py::handle(PyTuple_GET_ITEM(result.ptr(), k)); };
    const Setting setting = read_setting(kernels_[group], item(0), item(1), item(2), item(3), item(4));
    if (!cohorts_.empty()) cohort_index_[{cohorts_.back().group, cohorts_.back().t}] = &cohorts_.back();
    cohorts_.push_back({group, t, setting});
    return &cohorts_.back().setting;
  }

  std::vector<std::string> rules_;
  std::vector<std::size_t> group_of_;
  std::vector<std::string> param_names_, grad_names_;
  std::vector<py::object> params_;
  std::vector<py::object> slots_;
  std::vector<std::size_t> first_slot_;
  std::vector<std::atomic<std::int64_t>> counts_;

  const KernelTable* table_ = nullptr;
  std::vector<BoundKernel> kernels_;
  std::atomic<Isa> isa_{Isa::scalar};
  std::atomic<bool> stepping_{false};

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

void update_owned(const std::string& rule, const std::vector<py::object>& params, const std::vector<py::object>& grads,
                  const std::vector<std::vector<py::object>>& slots, const py::dict& coefficients, double scale,
                  double l1, double l2, double decay, const std::vector<std::string>& names, bool single) {
  const Kernel& kernel = kernel_named(rule);
  if (slots.size() != kernel.slots.count || names.size() != kFirstSlot + slots.size()) {
    throw py::value_error("rule " + rule + " has " + std::to_string(kernel.slots.count) + " slots");
  }
  const auto require_length = [&](const std::vector<py::object>& list, const std::string& name) {
    if (list.size() != params.size()) {
      throw py::value_error(name + ": " + std::to_string(list.size()) + " given for " + std::to_string(params.size()) +
                            " parameters");
    }
  };
  require_length(grads, names[kGrad]);
  for (std::size_t k = 0; k < slots.size(); ++k) require_length(slots[k], names[kFirstSlot + k]);

  const OwnedArrays naming(names, single);
  Setting setting = read_setting(BoundKernel(kernel), coefficients, py::float_(scale), py::float_(l1), py::float_(l2),
                                 py::float_(decay));
  Batch batch;
  std::vector<py::object> by_param;  // the slots of the first parameter, of the second, ...
  by_param.reserve(params.size() * slots.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    const std::size_t first = by_param.size();
    for (const std::vector<py::object>& slot : slots) by_param.push_back(slot[i]);
    if (!grads[i].is_none()) batch.add(kernel, params[i], grads[i], by_param.data() + first, &setting, i);
  }
  batch.validate(naming);
  batch.run();
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
    return py::array(py::dtype(info(view.dtype).name), shape, strides, view.data, owner);
  } catch (const ArgumentError& error) {
    error.raise(name);
  }
}

// A state array filled with `value`, like `param` in shape, dtype and memory order, and like it in its place relative
// to cache lines, so that a kernel that is aligned in one is aligned in both.
py::object state_like(const py::array& param, double value) {
  Keeper keeper;
  const ArrayView view = view_array(param, keeper);
  const py::object numpy = py::module_::import("numpy");
  const auto nbytes = static_cast<py::ssize_t>(view.count * view.itemsize());
  // NumPy's own allocation: zeros that cost nothing until they are touched, and huge pages.
  const auto memory = numpy.attr("zeros")(nbytes + static_cast<py::ssize_t>(2 * kCacheLine), "u1").cast<py::array>();
  const auto* const start = static_cast<const std::byte*>(memory.data());
  const auto shift = reinterpret_cast<std::uintptr_t>(view.data) - reinterpret_cast<std::uintptr_t>(start);
  const std::vector<py::ssize_t> shape(view.shape.begin(), view.shape.end());
  const std::vector<py::ssize_t> strides(view.strides.begin(), view.strides.end());
  py::array state(py::dtype(info(view.dtype).name), shape, strides, start + shift % kCacheLine, memory);
  if (value != 0.0) state.attr("fill")(value);
  return state;
}

}  // namespace
}  // namespace onepass

PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  using namespace onepass;  // NOLINT(google-build-using-namespace): the module's one function
  m.doc() = "The CPU kernels of onepass. Use the classes and functions of the package instead.";
  m.attr("__version__") = ONEPASS_VERSION;

  py::class_<Updater>(m, "Updater")
      .def(py::init<std::vector<std::string>, std::vector<std::size_t>, const py::list&, const std::vector<py::tuple>&,
                    std::vector<std::string>, std::vector<std::string>>(),
           py::arg("groups"), py::arg("group_of"), py::arg("params"), py::arg("slots"), py::arg("param_names"),
           py::arg("grad_names"))
      .def("check", &Updater::check, py::arg("grads").none(true))
      .def("step", &Updater::step, py::arg("grads"), py::arg("recipes"))
      .def("__enter__", &Updater::enter)
      .def("__exit__", [](Updater& updater, const py::args& /*exception*/) { updater.leave(); })
      .def_property("counts", &Updater::counts, &Updater::set_counts)
      .def_property_readonly("last_isa", &Updater::last_isa);

  m.def("update", &update_owned, py::arg("rule"), py::arg("params"), py::arg("grads"), py::arg("slots"),
        py::arg("coefficients"), py::arg("scale"), py::arg("l1"), py::arg("l2"), py::arg("decay"), py::arg("names"),
        py::arg("single") = false);
  m.def("as_ndarray", &as_ndarray, py::arg("param"), py::arg("name"));
  m.def("state_like", &state_like, py::arg("param"), py::arg("value"));
  m.def("registry", &registry);
  m.def("dtypes", [] {
    std::vector<std::string> names;
    for (const DTypeInfo& dtype : DTypeTable<DTypes>::rows) names.emplace_back(dtype.name);
    return names;
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
