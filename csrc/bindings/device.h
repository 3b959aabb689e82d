// CUDA devices as the bindings see them: the extension with the kernels, where it is installed, and CuPy, whose streams
// and memory are used.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <span>

#include "bindings/array_view.h"
#include "core/dtype.h"
#include "cuda/backend.h"

namespace onepass {

namespace py = pybind11;

// Throws ArgumentError, with what to do, unless there are kernels and CuPy.
void require_cuda();

// After require_cuda().
const cuda::Backend& backend();
cuda::Place current_place(int device);  // CuPy's current stream there
int current_device();

// cupy.ndarray; null as long as nobody has imported CuPy.
py::handle cupy_array_type();

// New CuPy arrays in C order, not initialized. Where there is no room, CuPy's own error.
py::object empty_on(int device, std::span<const std::ptrdiff_t> shape, DType dtype);
py::object bytes_on(int device, std::size_t count);
void fill_on(int device, const py::object& cupy_array, double value);
std::byte* address_of(const py::object& cupy_array);
// An array like the viewed one in shape, memory order and device: zeros, or elements that are `value`.
py::object state_on_device(const ArrayView& view, double value, const py::dtype& dtype);
// A CuPy array over the viewed memory, which `owner` holds.
py::object as_cupy(const ArrayView& view, const py::object& owner);

void bind_device(py::module_& m);

}  // namespace onepass
