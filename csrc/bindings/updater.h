// The class that an optimizer steps with.
#pragma once

#include <pybind11/pybind11.h>

namespace onepass {

void bind_updater(const pybind11::module_& m);

}  // namespace onepass
