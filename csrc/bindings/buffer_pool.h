// Memory of large outputs, kept from call to call. A fresh array of tens of megabytes costs more in page faults than
// the arithmetic that fills it.
#pragma once

#include <pybind11/numpy.h>

#include <cstddef>
#include <span>

#include "core/dtype.h"

namespace onepass {

namespace py = pybind11;

// A C-contiguous array, not initialized. Its memory goes back to the pool with the last reference to it. `like`: an
// address whose place within a cache line the array shall share, so that one loop is aligned in both.
py::array pooled_array(std::span<const std::ptrdiff_t> shape, DType dtype, const void* like);

// At import, when no other thread may fork in the middle of it.
void create_pool();

// Frees what the pool keeps. Arrays in use are not touched.
void empty_cache();

// The most bytes that the pool keeps; arrays in use do not count.
std::size_t cache_limit();
void set_cache_limit(std::size_t bytes);
std::size_t cached_bytes();

}  // namespace onepass
