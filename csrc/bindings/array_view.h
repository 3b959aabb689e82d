// The one door through which arrays enter. No other file reads a Python array.
//
// A view is read from the array object anew at each step: no pointer outlives the call that asked for it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <deque>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace onepass {

namespace py = pybind11;

// What is wrong with an argument. The caller, who knows what the argument is called, puts the name in front.
class ArgumentError : public std::runtime_error {
 public:
  enum class Kind { type, value };
  ArgumentError(Kind kind, const std::string& what) : std::runtime_error(what), kind_(kind) {}
  [[noreturn]] void raise(const std::string& name) const;  // as TypeError or ValueError: "name: what"

 private:
  Kind kind_;
};

inline constexpr int kHost = -1;  // in the place of a device's number

struct ArrayView {
  std::byte* data = nullptr;
  int device = kHost;
  DType dtype = DType::float32;
  std::size_t count = 0;
  bool writable = false;
  bool copied = false;  // DLPack's word for: not the memory that its owner sees
  std::span<const std::ptrdiff_t> shape;
  std::span<const std::ptrdiff_t> strides;  // bytes

  std::size_t itemsize() const { return info(dtype).itemsize; }
};

// The half-open range of addresses that an array touches; empty for an array without elements.
struct MemoryRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  bool empty() const { return begin == end; }
  bool meets(const MemoryRange& other) const { return begin < other.end && other.begin < end; }
  bool operator==(const MemoryRange&) const = default;
};
MemoryRange memory_range(const ArrayView& view);

// Keeps alive what views of foreign arrays (DLPack) point into. Views of NumPy arrays need nothing.
class Keeper {
 public:
  void clear();
  void hold(py::object object) { objects_.push_back(std::move(object)); }
  std::vector<std::ptrdiff_t>& numbers() { return numbers_.emplace_back(); }

 private:
  std::vector<py::object> objects_;
  std::deque<std::vector<std::ptrdiff_t>> numbers_;
};

// Whether reading an array runs no code but ours. Anything else exports its memory by a method of its own, which may do
// what it likes, to arrays that were read before it too: so those come first.
bool is_numpy_array(py::handle object);

// What an array may hold: numbers of a storage dtype, those of a compute type alone, or the low halves of split numbers
// (uint16).
enum class Holds : std::uint8_t { numbers, computed, remainders };

// CuPy's arrays do not move: what was read from one holds as long as the object lives, but for its shape.
bool is_cupy_array(py::handle object);

// "the host" or "device 1".
std::string device_text(int device);

// Throws ArgumentError for anything but an array of a supported dtype, on the host or on a CUDA device. One that is not
// CuPy's is made to wait for by CuPy's current stream.
ArrayView view_array(py::handle object, Keeper& keeper, Holds holds = Holds::numbers);
ArrayView view_numpy_array(py::handle object, Holds holds = Holds::numbers);  // of what is known to be a NumPy array

// NumPy's word for a dtype. bfloat16 is that of the package ml_dtypes.
py::dtype numpy_dtype(DType dtype);

// Throws ArgumentError unless the array can be written in place: writable and dense in memory.
void require_updatable(const ArrayView& view);

std::string shape_text(std::span<const std::ptrdiff_t> numbers);

}  // namespace onepass
