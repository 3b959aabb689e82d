// Batch normalization over Python's arrays: read, validated as a whole, then computed.
#pragma once

#include <pybind11/pybind11.h>

namespace onepass {

void bind_batchnorm(pybind11::module_& m);

}  // namespace onepass
