// What Python says of a rule's coefficients for a step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/batch.h"

namespace onepass {

namespace py = pybind11;

std::vector<std::string> text(const Names& names);

// Throws ValueError for a rule that is not in the registry.
const Kernel& kernel_named(const std::string& rule);

// A rule's kernel with the names of its coefficients as Python strings: looking a dict up by one builds nothing.
struct BoundKernel {
  explicit BoundKernel(const Kernel& k);
  const Kernel* kernel;
  std::vector<py::object> keys;
};

// `recipe`: (coefficients, sign, l1, l2, decay, ema_decay, noise, max_unit_norm) for the t-th step, as
// Optimizer.surround() gives it. `coefficients` is a dict of the rule's coefficients by name, all of them and no other.
Setting read_setting(const BoundKernel& bound, py::handle recipe, std::int64_t t);

}  // namespace onepass
