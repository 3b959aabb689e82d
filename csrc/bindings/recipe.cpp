#include "bindings/recipe.h"

#include <pybind11/stl.h>

#include <utility>

#include "cpu/dispatch.h"

namespace onepass {
namespace {

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

}  // namespace

std::vector<std::string> text(const Names& names) { return {names.data, names.data + names.count}; }

const Kernel& kernel_named(const std::string& rule) {
  const Kernel* kernel = find_kernel(active_kernels(), rule);
  if (kernel == nullptr) throw py::value_error("rule: '" + rule + "' is not in the registry");
  return *kernel;
}

BoundKernel::BoundKernel(const Kernel& k) : kernel(&k) {
  for (const std::string& name : text(k.coefficients)) {
    keys.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str())));
  }
}

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
  around.scaling.sign = number(item(1), "sign");
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

}  // namespace onepass
