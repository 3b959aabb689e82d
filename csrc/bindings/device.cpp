#include "bindings/device.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/gil.h"
#include "core/layout.h"

namespace onepass {
namespace {

// Kept for the life of the process, like the module that they belong to.
std::atomic<const cuda::Backend*> the_backend{nullptr};
std::atomic<PyObject*> the_array_type{nullptr};

py::module_ cupy() { return py::module_::import("cupy"); }

// A module that somebody has imported already, without running any code.
py::object imported(const char* name) {
  const auto key = py::reinterpret_steal<py::object>(PyUnicode_FromString(name));
  auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(key.ptr()));
  if (!module) PyErr_Clear();
  return module;
}

// Makes a device CuPy's current one for as long as this object lives.
class CupyDevice {
 public:
  explicit CupyDevice(int device) : device_(cupy().attr("cuda").attr("Device")(device)) { device_.attr("__enter__")(); }
  ~CupyDevice() {
    const auto left = py::reinterpret_steal<py::object>(
        PyObject_CallMethod(device_.ptr(), "__exit__", "OOO", Py_None, Py_None, Py_None));
    if (!left) PyErr_WriteUnraisable(device_.ptr());
  }
  CupyDevice(const CupyDevice&) = delete;
  CupyDevice& operator=(const CupyDevice&) = delete;

 private:
  py::object device_;
};

}  // namespace

void require_cuda() {
  using Kind = ArgumentError::Kind;
  if (the_backend.load(std::memory_order_relaxed) == nullptr) {
    throw ArgumentError(Kind::type,
                        "is on a CUDA device, and this build of onepass has no CUDA kernels; build it where nvcc is "
                        "found (pip install --no-binary onepass onepass, CUDA 12.4 or newer), or pass host arrays");
  }
  if (cupy_array_type()) return;
  try {
    cupy();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    throw ArgumentError(Kind::type,
                        "is on a CUDA device, and CuPy, whose streams and memory onepass uses there, cannot be "
                        "imported (" +
                            std::string(py::str(error.value())) +
                            "); install cupy-cuda12x or cupy-cuda13x, or pass host arrays");
  }
}

const cuda::Backend& backend() { return *the_backend.load(std::memory_order_relaxed); }

cuda::Place current_place(int device) {
  const py::object stream = cupy().attr("cuda").attr("get_current_stream")(device);
  return {device, reinterpret_cast<void*>(stream.attr("ptr").cast<std::uintptr_t>())};
}

int current_device() { return cupy().attr("cuda").attr("Device")().attr("id").cast<int>(); }

py::handle cupy_array_type() {
  PyObject* type = the_array_type.load(std::memory_order_acquire);
  if (type != nullptr) return type;
  const py::object module = imported("cupy");
  if (!module) return {};
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttrString(module.ptr(), "ndarray"));
  if (!found || PyType_Check(found.ptr()) == 0) {  // CuPy is in the middle of being imported
    PyErr_Clear();
    return {};
  }
  PyObject* expected = nullptr;
  if (the_array_type.compare_exchange_strong(expected, found.ptr(), std::memory_order_acq_rel)) {
    return found.release();
  }
  return expected;
}

py::object empty_on(int device, std::span<const std::ptrdiff_t> shape, DType dtype) {
  const CupyDevice current(device);
  const py::tuple lengths = py::cast(std::vector<std::ptrdiff_t>(shape.begin(), shape.end()));
  return cupy().attr("empty")(lengths, dtype == DType::uint16 ? py::dtype("uint16") : numpy_dtype(dtype));
}

py::object bytes_on(int device, std::size_t count) {
  const CupyDevice current(device);
  return cupy().attr("empty")(count, py::dtype("uint8"));
}

void fill_on(int device, const py::object& cupy_array, double value) {
  const CupyDevice current(device);
  cupy_array.attr("fill")(value);
}

std::byte* address_of(const py::object& cupy_array) {
  return reinterpret_cast<std::byte*>(cupy_array.attr("data").attr("ptr").cast<std::uintptr_t>());
}

namespace {

py::tuple as_tuple(std::span<const std::ptrdiff_t> numbers) {
  py::tuple tuple(numbers.size());
  for (std::size_t k = 0; k < numbers.size(); ++k) tuple[k] = numbers[k];
  return tuple;
}

// The strides of an array of another dtype that lies in the order of a dense one.
std::vector<std::ptrdiff_t> scaled_strides(const ArrayView& view, std::ptrdiff_t itemsize) {
  std::vector<std::ptrdiff_t> strides(view.strides.begin(), view.strides.end());
  for (std::ptrdiff_t& stride : strides) stride = stride / static_cast<std::ptrdiff_t>(view.itemsize()) * itemsize;
  return strides;
}

py::object cupy_array(std::span<const std::ptrdiff_t> shape, const py::dtype& dtype, const py::object& memory,
                      std::span<const std::ptrdiff_t> strides) {
  return cupy().attr("ndarray")(as_tuple(shape), dtype, memory, as_tuple(strides));
}

// A dense device array, to be copied as a whole.
ArrayView view_dense(const py::object& array, Keeper& keeper) {
  const ArrayView view =
      view_array(array, keeper,
                 array.attr("dtype").attr("name").cast<std::string>() == "uint16" ? Holds::remainders : Holds::numbers);
  if (view.device == kHost) throw py::type_error("expected an array on a CUDA device");
  require_updatable(view);
  return view;
}

// A NumPy array of the same numbers, shape and memory order.
py::object to_host(const py::object& array) {
  Keeper keeper;
  const ArrayView view = view_dense(array, keeper);
  auto host = py::module_::import("numpy").attr("empty")(view.count, array.attr("dtype")).cast<py::array>();
  const cuda::Place place = current_place(view.device);
  void* const to = host.mutable_data();
  without_interpreter_lock([&] {
    if (view.count > 0) backend().copy(place, to, view.data, view.count * view.itemsize());
    return true;
  });
  return py::array(host.dtype(), std::vector<py::ssize_t>(view.shape.begin(), view.shape.end()),
                   std::vector<py::ssize_t>(view.strides.begin(), view.strides.end()), to, host);
}

// Copies a NumPy array of the same shape and dtype, in any order, into a device array.
void overwrite(const py::object& array, const py::array& value) {
  Keeper keeper;
  const ArrayView view = view_dense(array, keeper);
  if (!py::dtype(value.dtype()).equal(array.attr("dtype")) ||
      !py::object(value.attr("shape")).equal(array.attr("shape"))) {
    throw py::type_error("overwrite: shape or dtype differ");
  }
  if (view.count == 0) return;
  const std::size_t itemsize = view.itemsize();
  std::vector<std::byte> in_order(view.count * itemsize);
  const std::vector<std::ptrdiff_t> strides(value.strides(), value.strides() + value.ndim());
  gather(walk_axes(view.shape, view.strides, strides), value.data(), itemsize, 0, view.count, in_order.data());
  const cuda::Place place = current_place(view.device);
  without_interpreter_lock([&] {
    backend().copy(place, view.data, in_order.data(), in_order.size());
    return true;
  });
}

}  // namespace

py::object state_on_device(const ArrayView& view, double value, const py::dtype& dtype) {
  const CupyDevice current(view.device);
  const py::object flat = cupy().attr("zeros")(view.count, dtype);
  py::object state = cupy_array(view.shape, dtype, flat.attr("data"), scaled_strides(view, dtype.itemsize()));
  if (value != 0.0) state.attr("fill")(value);
  return state;
}

py::object as_cupy(const ArrayView& view, const py::object& owner) {
  const CupyDevice current(view.device);
  const py::object cuda = cupy().attr("cuda");
  const py::object memory = cuda.attr("UnownedMemory")(reinterpret_cast<std::uintptr_t>(view.data),
                                                       view.count * view.itemsize(), owner, view.device);
  return cupy_array(view.shape, numpy_dtype(view.dtype), cuda.attr("MemoryPointer")(memory, 0), view.strides);
}

void bind_device(py::module_& m) {
  m.def("to_host", &to_host, py::arg("array"));
  m.def("overwrite", &overwrite, py::arg("array"), py::arg("value"));
  m.def("is_cupy_array", &is_cupy_array, py::arg("array"));
  m.def(
      "use_backend",
      [](const py::capsule& capsule) {
        the_backend.store(
            static_cast<const cuda::Backend*>(PyCapsule_GetPointer(capsule.ptr(), cuda::kBackendCapsule)));
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      },
      py::arg("capsule"));
  // (name, compute capability, bytes of memory) of each device; RuntimeError where CUDA cannot be used.
  m.def("cuda_devices", [] {
    py::list rows;
    if (the_backend.load() == nullptr) return rows;
    for (const cuda::DeviceInfo& device : backend().devices()) {
      rows.append(py::make_tuple(device.name, py::make_tuple(device.major, device.minor), device.memory));
    }
    return rows;
  });
  // The architectures that there is code for; None without kernels.
  m.def("cuda_architectures", []() -> py::object {
    if (the_backend.load() == nullptr) return py::none();
    return py::str(backend().architectures());
  });
}

}  // namespace onepass
