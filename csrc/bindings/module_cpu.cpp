// The Python module onepass._cpu. It knows rules, arrays and steps; hyper-parameters and recipes live in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/batch.h"
#include "bindings/batchnorm.h"
#include "bindings/device.h"
#include "bindings/device_counts.h"
#include "bindings/device_step.h"
#include "bindings/recipe.h"
#include "bindings/step.h"
#include "bindings/turn.h"
#include "bindings/updater.h"
#include "core/partition.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace onepass {
namespace {

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
  setting.around.scaling.accumulate = static_cast<double>(sum.calls);
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
  if (!batch.on_host()) {
    for (const int device : devices_of(batch)) {
      if (!backend().is_capturing(current_place(device))) continue;
      throw std::runtime_error("step: the current stream is being captured, and a replay would take this step " +
                               std::to_string(t) + " again; use an optimizer, with prepare_capture()");
    }
    DeviceMemory memory;
    const bool skips = options.nonfinite == NonFinite::skip;
    const DeviceReport report = run_on_devices(batch, options, sum, naming, memory, skips, nullptr);
    return py::make_tuple(report.norm ? memory.norm() : py::none(),
                          report.skipped ? memory.skipped(batch.devices().front()) : py::object(py::bool_(false)));
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
    if (py::isinstance<py::array>(param) || is_cupy_array(param)) return param;
    const std::vector<py::ssize_t> shape(view.shape.begin(), view.shape.end());
    const std::vector<py::ssize_t> strides(view.strides.begin(), view.strides.end());
    auto held = std::make_unique<Keeper>(std::move(keeper));
    const py::capsule owner(held.get(), [](void* pointer) { delete static_cast<Keeper*>(pointer); });
    [[maybe_unused]] const Keeper* const owned = held.release();
    if (view.device != kHost) return as_cupy(view, py::make_tuple(param, owner));
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
py::object state_like(const py::object& param, double value, const py::dtype& dtype) {
  Keeper keeper;
  const ArrayView view = view_array(param, keeper);
  if (view.device != kHost) return state_on_device(view, value, dtype);
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

  bind_updater(m);
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
  bind_device(m);
  m.def("forget_feedback_words", &forget_feedback_words);

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
