#include "bindings/array_view.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <optional>

#include "bindings/device.h"
#include "bindings/dlpack.h"
#include "core/layout.h"

namespace onepass {
namespace {

using Kind = ArgumentError::Kind;

// pybind11 has no names for these.
constexpr int kNumpyHalf = 23;        // NPY_HALF
constexpr int kNumpyUserTypes = 256;  // NPY_USERDEF

PyTypeObject* ndarray_type() {
  static PyTypeObject* const type = py::detail::npy_api::get().PyArray_Type_;
  return type;
}

bool is_supported(DType dtype, Holds holds) { return holds == Holds::numbers || info(dtype).compute == dtype; }

[[noreturn]] void unsupported_dtype(const std::string& name, Holds holds) {
  std::string supported = holds == Holds::remainders ? kRemainderInfo.name : "";
  for (std::size_t k = 0; k < DTypes::size && holds != Holds::remainders; ++k) {
    const auto dtype = static_cast<DType>(k);
    if (is_supported(dtype, holds)) supported += (supported.empty() ? "" : ", ") + std::string(info(dtype).name);
  }
  throw ArgumentError(Kind::type, "dtype " + name + " is not supported; supported are " + supported);
}

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

bool is_masked(py::handle array) {
  // A masked array is an ndarray whose mask an update would ignore.
  // By the type alone: isinstance() would ask the array for its __class__, and run whatever that is.
  // And without an object that the garbage collector counts: it may run the caller's finalizers, which may resize
  // arrays that were read before.
  const auto name = py::reinterpret_steal<py::object>(PyUnicode_FromString("numpy.ma"));
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
  if (!module) {
    PyErr_Clear();
    return false;
  }
  const auto masked = py::reinterpret_steal<py::object>(PyObject_GetAttrString(module.ptr(), "MaskedArray"));
  if (!masked || PyType_Check(masked.ptr()) == 0) {
    PyErr_Clear();
    return false;
  }
  return PyObject_TypeCheck(array.ptr(), reinterpret_cast<PyTypeObject*>(masked.ptr())) != 0;
}

// What an array's own method raised, as an ArgumentError; an interrupt or a lack of memory is nobody's argument.
[[noreturn]] void rethrow(const py::error_already_set& error, const std::string& what) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw;
  throw ArgumentError(Kind::type, what + " failed: " + std::string(py::str(error.value())));
}

void count_elements(ArrayView& view) {
  view.count = 1;
  for (const std::ptrdiff_t length : view.shape) view.count *= static_cast<std::size_t>(length);
}

// The number that NumPy gave to ml_dtypes' bfloat16 when that was imported.
bool is_bfloat16(const py::detail::PyArrayDescr_Proxy& descr) {
  static std::atomic<int> known{-1};
  const int number = descr.type_num;
  if (number < kNumpyUserTypes) return false;
  if (number == known.load(std::memory_order_relaxed)) return true;
  // As in is_masked(): nothing that runs code of others.
  const auto name = py::reinterpret_steal<py::object>(PyUnicode_FromString("ml_dtypes"));
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
  const auto type =
      module ? py::reinterpret_steal<py::object>(PyObject_GetAttrString(module.ptr(), "bfloat16")) : py::object();
  if (!type) PyErr_Clear();
  if (!type || descr.typeobj != type.ptr()) return false;
  known.store(number, std::memory_order_relaxed);
  return true;
}

DType numpy_dtype_of(py::handle given, Holds holds) {
  const auto& descr = *py::detail::array_descriptor_proxy(given.ptr());
  std::optional<DType> dtype;
  switch (descr.type_num) {
    case py::detail::npy_api::NPY_USHORT_:
      if (holds == Holds::remainders) return DType::uint16;
      break;
    case py::detail::npy_api::NPY_FLOAT_:
      dtype = DType::float32;
      break;
    case py::detail::npy_api::NPY_DOUBLE_:
      dtype = DType::float64;
      break;
    case kNumpyHalf:
      dtype = DType::float16;
      break;
    default:
      if (is_bfloat16(descr)) dtype = DType::bfloat16;
  }
  if (!dtype || holds == Holds::remainders || !is_supported(*dtype, holds)) unsupported_dtype(py::str(given), holds);
  return *dtype;
}

void require_native(py::handle dtype, DType known) {
  constexpr char foreign = std::endian::native == std::endian::little ? '>' : '<';
  if (py::detail::array_descriptor_proxy(dtype.ptr())->byteorder != foreign) return;
  throw ArgumentError(Kind::type, "dtype " + std::string(py::str(dtype.attr("str"))) +
                                      " has foreign byte order; convert it with .astype(" + info(known).name + ")");
}

ArrayView view_numpy(py::handle object, Holds holds) {
  const auto* array = py::detail::array_proxy(object.ptr());
  ArrayView view;
  view.dtype = numpy_dtype_of(array->descr, holds);
  require_native(array->descr, view.dtype);
  static_assert(sizeof(py::ssize_t) == sizeof(std::ptrdiff_t));
  const auto ndim = static_cast<std::size_t>(array->nd);
  view.data = reinterpret_cast<std::byte*>(array->data);
  view.shape = {array->dimensions, ndim};
  view.strides = {array->strides, ndim};
  view.writable = (array->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
  return view;
}

// DLPack's numbers of streams: a pointer, or 1 for the default one.
py::dict stream_argument(int device) {
  py::dict arguments;
  if (device == kHost) return arguments;
  const auto stream = reinterpret_cast<std::uintptr_t>(current_place(device).stream);
  arguments["stream"] = stream == 0 ? 1 : stream;
  return arguments;
}

// The capsule of `object.__dlpack__()`, versioned where the producer knows versions.
py::object export_dlpack(py::handle object, int device) {
  const py::object method = object.attr("__dlpack__");
  const py::dict arguments = stream_argument(device);
  try {
    return method(py::arg("max_version") = py::make_tuple(1, 0), **arguments);
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method(**arguments);
}

dlpack::Device exported_device(py::handle object) {
  try {
    const auto device = object.attr("__dlpack_device__")().cast<py::tuple>();
    return {device[0].cast<std::int32_t>(), device[1].cast<std::int32_t>()};
  } catch (const py::error_already_set& error) {
    rethrow(error, type_name(object) + ".__dlpack_device__()");
  } catch (const py::cast_error&) {
    throw ArgumentError(Kind::type, type_name(object) + ".__dlpack_device__() gave no (device type, device id)");
  }
}

// The number of a device, or kHost.
int device_of(const dlpack::Device& device) {
  if (device.type == dlpack::kCpu || device.type == dlpack::kCudaHost) return kHost;
  if (device.type != dlpack::kCuda && device.type != dlpack::kCudaManaged) {
    throw ArgumentError(
        Kind::type, "is on a device (DLPack type " + std::to_string(device.type) + ") that onepass does not support");
  }
  require_cuda();
  return device.id;
}

// torch exports the memory of a lazily negated or conjugated tensor as it is: its numbers have another sign.
void require_plain_memory(py::handle object) {
  for (const char* lazy : {"is_neg", "is_conj"}) {
    if (!py::hasattr(object, lazy)) continue;
    bool set = false;
    try {
      set = py::bool_(object.attr(lazy)());
    } catch (const py::error_already_set& error) {
      rethrow(error, type_name(object) + "." + lazy + "()");
    }
    if (set) {
      throw ArgumentError(Kind::value, std::string(lazy) + "() is true of it: its memory does not hold its numbers; " +
                                           "pass .resolve_neg() or .resolve_conj()");
    }
  }
}

std::optional<DType> dlpack_dtype(const dlpack::DataType& type, Holds holds) {
  if (type.lanes != 1) return std::nullopt;
  if (holds == Holds::remainders) {
    return type.code == dlpack::kUInt && type.bits == 16 ? std::optional(DType::uint16) : std::nullopt;
  }
  std::optional<DType> dtype;
  if (type.code == dlpack::kBfloat && type.bits == 16) dtype = DType::bfloat16;
  if (type.code == dlpack::kFloat && type.bits == 16) dtype = DType::float16;
  if (type.code == dlpack::kFloat && type.bits == 32) dtype = DType::float32;
  if (type.code == dlpack::kFloat && type.bits == 64) dtype = DType::float64;
  return dtype && is_supported(*dtype, holds) ? dtype : std::nullopt;
}

ArrayView view_dlpack(py::handle object, Keeper& keeper, Holds holds) {
  // Asked first: an export from a device would synchronize it.
  const int device = py::hasattr(object, "__dlpack_device__") ? device_of(exported_device(object)) : kHost;
  require_plain_memory(object);
  py::object capsule;
  try {
    capsule = export_dlpack(object, device);
  } catch (const py::error_already_set& error) {
    rethrow(error, type_name(object) + ".__dlpack__()");
  }
  const dlpack::Tensor* tensor = nullptr;
  ArrayView view;
  view.writable = true;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
    const auto* managed =
        static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->major != 1) {
      throw ArgumentError(Kind::type, "exports DLPack version " + std::to_string(managed->major) + ", not 0 or 1");
    }
    view.copied = (managed->flags & dlpack::kIsCopied) != 0;
    view.writable = (managed->flags & dlpack::kReadOnly) == 0;
    tensor = &managed->tensor;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0) {
    tensor = &static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
  } else {
    throw ArgumentError(Kind::type, type_name(object) + ".__dlpack__() returned no DLPack capsule");
  }
  view.device = device_of(tensor->device);
  if (tensor->ndim < 0) throw ArgumentError(Kind::value, "exports a DLPack tensor of negative dimensions");
  const dlpack::DataType type = tensor->dtype;
  if (const auto dtype = dlpack_dtype(type, holds)) {
    view.dtype = *dtype;
  } else {
    unsupported_dtype(py::hasattr(object, "dtype")
                          ? std::string(py::str(object.attr("dtype")))
                          : "(DLPack code " + std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits)",
                      holds);
  }
  const auto ndim = static_cast<std::size_t>(tensor->ndim);
  std::vector<std::ptrdiff_t>& numbers = keeper.numbers();
  numbers.assign(tensor->shape, tensor->shape + ndim);
  numbers.resize(2 * ndim);
  auto c_stride = static_cast<std::ptrdiff_t>(view.itemsize());
  for (std::size_t a = ndim; a-- > 0;) {
    numbers[ndim + a] =
        tensor->strides != nullptr ? tensor->strides[a] * static_cast<std::ptrdiff_t>(view.itemsize()) : c_stride;
    c_stride *= numbers[a];
  }
  view.shape = {numbers.data(), ndim};
  view.strides = {numbers.data() + ndim, ndim};
  view.data = static_cast<std::byte*>(tensor->data);
  if (view.data != nullptr) view.data += tensor->byte_offset;
  keeper.hold(std::move(capsule));  // never renamed: its own destructor calls the deleter
  return view;
}

// Whoever says so of memory that is not there would have the device stop at the first access, and all that it holds
// lost.
void require_memory_on(const ArrayView& view) {
  if (view.device == kHost || view.count == 0) return;
  std::string what;
  try {
    const int device = backend().device_of(view.data);
    if (device == view.device) return;
    what = "its memory is that of " + device_text(device);
  } catch (const std::runtime_error& error) {
    what = error.what();
  }
  throw ArgumentError(Kind::type, "is on a CUDA device, " + device_text(view.device) + ", it says: " + what);
}

// --- Arrays of CuPy, and of those who know the CUDA array interface alone --------------------------------------------

// Attribute names that every step asks for.
struct CupyNames {
  py::str data{"data"}, ptr{"ptr"}, device_id{"device_id"}, shape{"shape"}, strides{"strides"}, dtype{"dtype"};
};

std::size_t integer(const py::object& value) {
  const std::size_t number = PyLong_AsSize_t(value.ptr());
  if (number == std::numeric_limits<std::size_t>::max() && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

void append_numbers(std::vector<std::ptrdiff_t>& numbers, const py::object& tuple) {
  for (const py::handle number : py::tuple(tuple)) numbers.push_back(number.cast<std::ptrdiff_t>());
}

void set_shape(ArrayView& view, const std::vector<std::ptrdiff_t>& numbers) {
  const std::size_t ndim = numbers.size() / 2;
  view.shape = {numbers.data(), ndim};
  view.strides = {numbers.data() + ndim, ndim};
}

ArrayView view_cupy(py::handle object, Keeper& keeper, Holds holds) {
  require_cuda();
  static const auto* const names = new CupyNames;  // for the life of the process: freed in no order with Python
  ArrayView view;
  view.dtype = numpy_dtype_of(object.attr(names->dtype), holds);
  const py::object memory = object.attr(names->data);
  view.data = reinterpret_cast<std::byte*>(integer(memory.attr(names->ptr)));
  view.device = memory.attr(names->device_id).cast<int>();
  view.writable = true;
  std::vector<std::ptrdiff_t>& numbers = keeper.numbers();
  append_numbers(numbers, object.attr(names->shape));
  append_numbers(numbers, object.attr(names->strides));
  set_shape(view, numbers);
  return view;
}

ArrayView view_cuda_interface(py::handle object, Keeper& keeper, Holds holds) {
  require_cuda();
  const std::string what = type_name(object) + ".__cuda_array_interface__";
  ArrayView view;
  try {
    const auto given = object.attr("__cuda_array_interface__").cast<py::dict>();
    const py::object dtype = py::module_::import("numpy").attr("dtype")(given["typestr"]);
    view.dtype = numpy_dtype_of(dtype, holds);
    require_native(dtype, view.dtype);
    if (given.contains("mask") && !given["mask"].is_none()) {
      throw ArgumentError(Kind::type, "has a mask, which would be ignored");
    }
    const auto data = given["data"].cast<std::pair<std::uintptr_t, bool>>();
    view.data = reinterpret_cast<std::byte*>(data.first);
    view.writable = !data.second;
    std::vector<std::ptrdiff_t>& numbers = keeper.numbers();
    append_numbers(numbers, given["shape"]);
    const std::size_t ndim = numbers.size();
    if (given.contains("strides") && !given["strides"].is_none()) {
      append_numbers(numbers, given["strides"]);
    } else {
      numbers.resize(2 * ndim);
      auto stride = static_cast<std::ptrdiff_t>(view.itemsize());
      for (std::size_t a = ndim; a-- > 0; stride *= numbers[a]) numbers[ndim + a] = stride;
    }
    if (numbers.size() != 2 * ndim) throw ArgumentError(Kind::value, what + " has a stride too many or too few");
    set_shape(view, numbers);
    view.device = current_device();
    if (view.data != nullptr) {
      try {
        view.device = backend().device_of(view.data);
      } catch (const std::runtime_error& error) {
        throw ArgumentError(Kind::type, std::string("is on a CUDA device, it says: ") + error.what());
      }
    }
    if (given.contains("stream") && !given["stream"].is_none()) {
      backend().follow(current_place(view.device), reinterpret_cast<void*>(given["stream"].cast<std::uintptr_t>()));
    }
  } catch (const py::error_already_set& error) {
    rethrow(error, what);
  } catch (const py::cast_error&) {
    throw ArgumentError(Kind::type, what + " is not as version 3 of the interface has it");
  } catch (const std::runtime_error& error) {
    if (dynamic_cast<const ArgumentError*>(&error) != nullptr) throw;
    throw ArgumentError(Kind::value, error.what());
  }
  keeper.hold(py::reinterpret_borrow<py::object>(object));
  return view;
}

}  // namespace

void ArgumentError::raise(const std::string& name) const {
  const std::string message = name + ": " + what();
  if (kind_ == Kind::type) throw py::type_error(message);
  throw py::value_error(message);
}

MemoryRange memory_range(const ArrayView& view) {
  if (view.count == 0) return {};
  std::ptrdiff_t low = 0;
  auto high = static_cast<std::ptrdiff_t>(view.itemsize());
  for (std::size_t a = 0; a < view.shape.size(); ++a) {
    const std::ptrdiff_t reach = (view.shape[a] - 1) * view.strides[a];
    (reach < 0 ? low : high) += reach;
  }
  const auto start = reinterpret_cast<std::uintptr_t>(view.data);
  return {start + static_cast<std::uintptr_t>(low), start + static_cast<std::uintptr_t>(high)};
}

void Keeper::clear() {
  objects_.clear();
  numbers_.clear();
}

bool is_numpy_array(py::handle object) { return PyObject_TypeCheck(object.ptr(), ndarray_type()) != 0; }

py::dtype numpy_dtype(DType dtype) {
  if (dtype != DType::bfloat16) return py::dtype(info(dtype).name);
  return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
}

ArrayView view_numpy_array(py::handle object, Holds holds) {
  if (Py_TYPE(object.ptr()) != ndarray_type() && is_masked(object)) {
    throw ArgumentError(Kind::type, "is a masked array, whose mask would be ignored; pass its .data");
  }
  ArrayView view = view_numpy(object, holds);
  count_elements(view);
  return view;
}

bool is_cupy_array(py::handle object) {
  const py::handle type = cupy_array_type();
  return type && PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr())) != 0;
}

std::string device_text(int device) { return device == kHost ? "the host" : "device " + std::to_string(device); }

ArrayView view_array(py::handle object, Keeper& keeper, Holds holds) {
  if (is_numpy_array(object)) return view_numpy_array(object, holds);
  const bool is_type = PyType_Check(object.ptr()) != 0;
  ArrayView view;
  if (is_cupy_array(object)) {
    view = view_cupy(object, keeper, holds);
  } else if (!is_type && py::hasattr(object, "__dlpack__")) {
    view = view_dlpack(object, keeper, holds);
    count_elements(view);
    require_memory_on(view);
  } else if (!is_type && py::hasattr(object, "__cuda_array_interface__")) {
    view = view_cuda_interface(object, keeper, holds);
  } else {
    const bool scalar = py::isinstance(object, py::module_::import("numpy").attr("generic"));
    throw ArgumentError(Kind::type, "expected a NumPy array or an object with __dlpack__, got " + type_name(object) +
                                        (scalar ? ", which is a NumPy scalar and no array" : ""));
  }
  count_elements(view);
  return view;
}

void require_updatable(const ArrayView& view) {
  if (view.copied) throw ArgumentError(Kind::value, "its __dlpack__() exports a copy; an update would land there");
  if (!view.writable) throw ArgumentError(Kind::value, "is read-only and cannot be updated in place");
  if (!is_dense(view.shape, view.strides, view.itemsize())) {
    throw ArgumentError(Kind::value,
                        "strides " + shape_text(view.strides) + " of shape " + shape_text(view.shape) +
                            " leave gaps, repeat or run backwards; arrays that are updated must be dense in "
                            "memory (C, Fortran or permuted order)");
  }
}

std::string shape_text(std::span<const std::ptrdiff_t> numbers) {
  std::string text = "(";
  for (std::size_t k = 0; k < numbers.size(); ++k) text += (k > 0 ? ", " : "") + std::to_string(numbers[k]);
  return text + (numbers.size() == 1 ? ",)" : ")");
}

}  // namespace onepass
