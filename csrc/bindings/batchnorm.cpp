#include "bindings/batchnorm.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/array_view.h"
#include "bindings/buffer_pool.h"
#include "bindings/device.h"
#include "bindings/gil.h"
#include "bindings/turn.h"
#include "cpu/batchnorm.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/update.h"

namespace onepass {
namespace {

using Kind = ArgumentError::Kind;

// An array of numbers of any storage dtype on a device, but of a compute type on the host, which has no kernels for
// more.
ArrayView view_of(py::handle object, Keeper& keeper) {
  const bool on_host = is_numpy_array(object);
  const ArrayView view = view_array(object, keeper, on_host ? Holds::computed : Holds::numbers);
  if (view.device != kHost || info(view.dtype).compute == view.dtype) return view;
  return view_array(object, keeper, Holds::computed);  // which says what is wrong
}

// The arrays of one call, under their names in messages.
class Arguments {
 public:
  enum class Use : std::uint8_t { read, written };

  // Takes note of an argument that is needed, or of one that may be None.
  void need(const char* name, py::handle object, Use use) { entries_.push_back({name, object, use, {}}); }
  void allow(const char* name, py::handle object, Use use) {
    if (!object.is_none()) need(name, object, use);
  }

  // Views all. Foreign arrays come first: their own code, which exports them, may change NumPy's.
  void read() {
    for (const bool foreign : {true, false}) {
      for (Entry& entry : entries_) {
        if (is_numpy_array(entry.object) == foreign) continue;
        named(entry.name, [&] { entry.view = view_of(entry.object, keeper_); });
      }
    }
    for (const Entry& entry : entries_) {
      if (entry.use != Use::written) continue;
      named(entry.name, [&] {
        if (entry.view.copied) {
          throw ArgumentError(Kind::value, "its __dlpack__() exports a copy; the result would land there");
        }
        if (!entry.view.writable) throw ArgumentError(Kind::value, "is read-only and cannot be written");
      });
    }
  }

  // All arrays are where that one is, `whose` in words; those on a device are aligned to their items.
  void require_one_device(const char* model, const char* whose) const {
    const int device = (*this)[model].device;
    for (const Entry& entry : entries_) {
      named(entry.name, [&] {
        if (entry.view.device != device) {
          throw ArgumentError(
              Kind::value, "is on " + device_text(entry.view.device) + ", and " + whose + " on " + device_text(device));
        }
        if (device != kHost && entry.view.count > 0 &&
            reinterpret_cast<std::uintptr_t>(entry.view.data) % entry.view.itemsize() != 0) {
          throw ArgumentError(Kind::value, "its address is no multiple of its dtype's " +
                                               std::to_string(entry.view.itemsize()) +
                                               " bytes, as it has to be on a CUDA device");
        }
      });
    }
  }

  // Null if it was not given.
  const ArrayView* find(const char* name) const {
    for (const Entry& entry : entries_) {
      if (std::string_view(entry.name) == name) return &entry.view;
    }
    return nullptr;
  }
  const ArrayView& operator[](const char* name) const { return *find(name); }
  bool is_written(std::string_view name) const {
    return std::ranges::any_of(entries_, [&](const Entry& e) { return e.name == name && e.use == Use::written; });
  }
  void* data(const char* name) const {
    const ArrayView* const view = find(name);
    return view == nullptr ? nullptr : view->data;
  }

  template <class Action>
  static void named(const char* name, Action action) {
    try {
      action();
    } catch (const ArgumentError& error) {
      error.raise(name);
    }
  }

  void require_contiguous(const char* name) const {
    if (find(name) == nullptr) return;
    const ArrayView& view = (*this)[name];
    if (view.count == 0) return;
    auto expected = static_cast<std::ptrdiff_t>(view.itemsize());
    bool contiguous = true;
    for (std::size_t a = view.shape.size(); a-- > 0;) {
      if (view.shape[a] != 1 && view.strides[a] != expected) contiguous = false;
      expected *= view.shape[a];
    }
    if (contiguous) return;
    const std::string given = "strides " + shape_text(view.strides) + " in bytes, of shape " + shape_text(view.shape) +
                              ", are not those of a C-contiguous array; ";
    const std::string copy =
        (view.device == kHost ? "np.ascontiguousarray(" : "cupy.ascontiguousarray(") + std::string(name) + ")";
    named(name, [&] {
      if (is_written(name)) {
        throw ArgumentError(Kind::value,
                            given + "a result in " + copy + " would be lost, so make it contiguous from the start");
      }
      throw ArgumentError(Kind::value, given + "pass " + copy);
    });
  }

  void require_like(const char* name, const char* other) const {
    if (find(name) == nullptr) return;
    const ArrayView& view = (*this)[name];
    const ArrayView& model = (*this)[other];
    named(name, [&] {
      if (!std::ranges::equal(view.shape, model.shape)) {
        throw ArgumentError(Kind::value, "shape " + shape_text(view.shape) + " does not match that of " + other + ", " +
                                             shape_text(model.shape));
      }
    });
    require_dtype(name, model.dtype, other);
    require_contiguous(name);
  }

  // `other`: whose compute type `dtype` is, if anybody's.
  void require_per_channel(const char* name, std::size_t channels, DType dtype, const char* other) const {
    if (find(name) == nullptr) return;
    const ArrayView& view = (*this)[name];
    named(name, [&] {
      if (view.shape.size() != 1 || !std::cmp_equal(view.shape[0], channels)) {
        throw ArgumentError(Kind::value, "shape " + shape_text(view.shape) + ", expected (" + std::to_string(channels) +
                                             ",), one value for each channel of x");
      }
    });
    require_dtype(name, dtype, other);
    require_contiguous(name);
  }

  // No written array may share memory with another one; but `same` may be exactly the array `as`.
  void require_disjoint(const char* same, const char* as) const {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      for (std::size_t k = 0; k < i; ++k) {
        const Entry& a = entries_[i];
        const Entry& b = entries_[k];
        if (a.use != Use::written && b.use != Use::written) continue;
        const MemoryRange range_a = memory_range(a.view);
        const MemoryRange range_b = memory_range(b.view);
        if (!range_a.meets(range_b)) continue;
        const Entry& written = a.use == Use::written ? a : b;
        const Entry& other = a.use == Use::written ? b : a;
        if (same != nullptr && std::string_view(written.name) == same && std::string_view(other.name) == as &&
            range_a == range_b) {
          continue;
        }
        throw py::value_error(std::string(written.name) + ": overlaps " + other.name +
                              " in memory; what is written must not share memory with anything else");
      }
    }
  }

 private:
  struct Entry {
    const char* name;
    py::handle object;
    Use use;
    ArrayView view;
  };

  void require_dtype(const char* name, DType dtype, const char* other) const {
    named(name, [&] {
      const ArrayView& view = (*this)[name];
      if (view.dtype == dtype) return;
      std::string why;
      if (other != nullptr) {
        const DType whose = (*this)[other].dtype;
        why = whose == dtype ? std::string(", the dtype of ") + other
                             : std::string(", which goes with ") + other + " of " + info(whose).name;
      }
      throw ArgumentError(Kind::type,
                          std::string("dtype ") + info(view.dtype).name + ", expected " + info(dtype).name + why);
    });
  }

  std::deque<Entry> entries_;
  Keeper keeper_;
};

using Use = Arguments::Use;

// The shape of x, seen from its channel axis.
void take_shape(batchnorm::Batch& batch, const Arguments& arguments, py::ssize_t channel_axis) {
  const ArrayView& x = arguments["x"];
  const auto ndim = static_cast<py::ssize_t>(x.shape.size());
  Arguments::named("x", [&] {
    if (ndim < 2) {
      throw ArgumentError(Kind::value, "shape " + shape_text(x.shape) + ", expected 2 or more dimensions");
    }
  });
  if (channel_axis < -ndim || channel_axis >= ndim) {
    throw py::value_error("channel_axis: " + std::to_string(channel_axis) + " is not an axis of x, whose shape is " +
                          shape_text(x.shape));
  }
  arguments.require_contiguous("x");
  const auto axis = static_cast<std::size_t>(channel_axis < 0 ? channel_axis + ndim : channel_axis);
  batch.dtype = x.dtype;
  batch.x = x.data;
  batch.outer = batch.inner = 1;
  for (std::size_t a = 0; a < axis; ++a) batch.outer *= static_cast<std::size_t>(x.shape[a]);
  batch.channels = static_cast<std::size_t>(x.shape[axis]);
  for (std::size_t a = axis + 1; a < x.shape.size(); ++a) batch.inner *= static_cast<std::size_t>(x.shape[a]);
}

// What belongs to a layer beside arrays: a list that is written at once with them, because between two lines of Python
// an interrupt may come. [What the backward pass needs, or why there is nothing; batches that the running statistics
// have seen; gradient of the residual].
class Record {
 public:
  enum Entry : std::uint8_t { saved, batches, residual_grad, size };

  explicit Record(py::list list) : list_(std::move(list)) {
    if (list_.size() != size) throw py::value_error("record: wrong number of entries");
  }
  py::object operator[](Entry entry) const { return list_[entry]; }

  // Writes entries, then lets go of what they were: that may run code of others, which finds the record whole.
  void set(std::initializer_list<std::pair<Entry, py::object>> values) {
    py::object before[size];
    std::size_t k = 0;
    for (const auto& [entry, value] : values) {
      before[k++] = list_[entry];
      PyList_SetItem(list_.ptr(), entry, py::object(value).release().ptr());
    }
  }

 private:
  py::list list_;
};

// What a layer tells of itself to a forward pass: the channels and the dtype that x must have, and where it keeps what.
struct Layer {
  std::size_t channels;
  std::string dtype;
  Record record;
  py::object kept;         // of the layer's own, for its backward pass
  py::object overwritten;  // what the record holds after a forward pass in place
  Turnstile& turn;

  explicit Layer(const py::tuple& given)
      : channels(given[0].cast<std::size_t>()),
        dtype(given[1].cast<std::string>()),
        record(given[2]),
        kept(given[3]),
        overwritten(given[4]),
        turn(given[5].cast<Turnstile&>()) {}
};

void require_layer(const batchnorm::Batch& batch, const Arguments& arguments, const Layer& layer) {
  Arguments::named("x", [&] {
    if (batch.channels != layer.channels) {
      throw ArgumentError(Kind::value,
                          "shape " + shape_text(arguments["x"].shape) + " has " + std::to_string(batch.channels) +
                              " channels along channel_axis; this layer has " + std::to_string(layer.channels));
    }
    if (info(info(batch.dtype).compute).name != layer.dtype) {
      throw ArgumentError(Kind::type, std::string("dtype ") + info(batch.dtype).name + ", expected " + layer.dtype +
                                          ", the dtype of this layer");
    }
  });
}

// 1 / sqrt(eps) is what a channel without variance is multiplied with.
void require_eps(double eps, DType dtype) {
  const double largest = dtype == DType::float32 ? static_cast<double>(std::numeric_limits<float>::max())
                                                 : std::numeric_limits<double>::max();
  if (eps >= std::numeric_limits<double>::min() && 1.0 / std::sqrt(eps) <= largest) return;
  throw py::value_error("eps: " + std::string(py::str(py::float_(eps))) + " is too small for " + info(dtype).name +
                        ", where 1 / sqrt(eps) would be infinite");
}

// (Name of the instruction set that ran.)
template <class Call>
const char* run(Isa (*pass)(const Call&, std::size_t), const Call& call, std::size_t arrays) {
  const std::size_t bytes = arrays * call.count() * info(call.dtype).itemsize;
  if (bytes < kReleaseBytes && bytes < serial_bytes()) return isa_name(pass(call, 1));
  return isa_name(without_interpreter_lock([&] { return pass(call, thread_count()); }));
}

// --- On a device -----------------------------------------------------------------------------------------------------

// What tests take away from devices.
std::atomic<std::size_t> most_shared{SIZE_MAX};
std::atomic<unsigned> most_cluster{cuda::BatchnormLimits{}.cluster};

void set_device_limits(std::optional<std::size_t> shared, std::optional<unsigned> cluster) {
  most_shared = shared.value_or(SIZE_MAX);
  most_cluster = cluster.value_or(cuda::BatchnormLimits{}.cluster);
}

template <class DeviceCall>
DeviceCall on_device(const batchnorm::Batch& batch) {
  DeviceCall call;
  call.dtype = batch.dtype;
  call.outer = batch.outer;
  call.channels = batch.channels;
  call.inner = batch.inner;
  call.limits = {most_shared, most_cluster};
  call.x = batch.x;
  call.weight = batch.weight;
  call.bias = batch.bias;
  call.relu = batch.relu;
  return call;
}

// What a call needs beside its arrays. All that may fail comes before the first write: so this is made first.
struct OnDevice {
  cuda::Place place;
  py::object scratch;

  OnDevice(int device, const cuda::BatchnormShape& shape, bool sums, std::byte*& memory)
      : place(current_place(device)) {
    const std::size_t bytes = sums ? backend().batchnorm_scratch_bytes(shape) : 0;
    if (bytes == 0) return;
    scratch = bytes_on(device, bytes);
    memory = address_of(scratch);
    // A graph writes it at each launch, whenever that may be.
    if (backend().is_capturing(place)) scratch.inc_ref();
  }

  // Not with the interpreter lock: the queue may be full, of what waits for it.
  template <class Call>
  void run(void (cuda::Backend::*pass)(const cuda::Place&, const Call&) const, const Call& call) const {
    without_interpreter_lock([&] {
      (backend().*pass)(place, call);
      return true;
    });
  }
};

// --- New arrays ------------------------------------------------------------------------------------------------------

// Like `model`, where that is. On the host it comes from the pool, and lies well beside `beside`.
py::object new_like(const ArrayView& model, const void* beside, void*& data) {
  if (model.device != kHost) {
    py::object array = empty_on(model.device, model.shape, model.dtype);
    data = address_of(array);
    return array;
  }
  py::array array = pooled_array(model.shape, model.dtype, beside);
  data = array.mutable_data();
  return array;
}

// One value for each channel.
py::object new_per_channel(int device, std::size_t channels, DType dtype, void*& data) {
  if (device != kHost) {
    const std::ptrdiff_t shape[] = {static_cast<std::ptrdiff_t>(channels)};
    py::object array = empty_on(device, shape, dtype);
    data = address_of(array);
    return array;
  }
  py::array array(py::dtype(info(dtype).name), static_cast<py::ssize_t>(channels));
  data = array.mutable_data();
  return array;
}
py::object new_statistics(int device, std::size_t channels, double*& data) {
  void* memory = nullptr;
  py::object array = new_per_channel(device, channels, DType::float64, memory);
  data = static_cast<double*>(memory);
  return array;
}

// Aligned, wherever the caller's array lies.
std::vector<double> copy_of(const ArrayView& view) {
  std::vector<double> values(view.count);
  if (!values.empty()) std::memcpy(values.data(), view.data, view.count * sizeof(double));
  return values;
}

// A copy, and where it is; None if there is no such parameter. On a device the pass itself writes it.
py::object copy_of_parameter(const ArrayView* view, void*& copied) {
  if (view == nullptr) return py::none();
  py::object copy = new_per_channel(view->device, view->count, view->dtype, copied);
  if (view->device == kHost && view->count > 0) std::memcpy(copied, view->data, view->count * view->itemsize());
  return copy;
}

constexpr std::int64_t kMostBatches = std::int64_t{1} << 62;  // of what a state_dict may hold

// (y, mean, invstd, name of the instruction set that ran, or "cuda"). `given_layer`: None, or what makes a Layer.
py::tuple forward(const py::object& x, const py::object& weight, const py::object& bias, const py::object& running_mean,
                  const py::object& running_var, const py::object& residual, const py::object& out, bool training,
                  double momentum, bool unbiased, double eps, py::ssize_t channel_axis, bool relu,
                  const std::optional<py::tuple>& given_layer) {
  Arguments arguments;
  arguments.need("x", x, Use::read);
  arguments.allow("weight", weight, Use::read);
  arguments.allow("bias", bias, Use::read);
  arguments.allow("running_mean", running_mean, training ? Use::written : Use::read);
  arguments.allow("running_var", running_var, training ? Use::written : Use::read);
  arguments.allow("residual", residual, Use::read);
  arguments.allow("out", out, Use::written);
  if (running_mean.is_none() != running_var.is_none()) {
    const bool mean = running_mean.is_none();
    throw py::type_error(std::string(mean ? "running_mean" : "running_var") + ": expected an array, because " +
                         (mean ? "running_var" : "running_mean") + " is given");
  }
  if (!training && running_mean.is_none()) {
    throw py::type_error("running_mean: expected an array, because training is False");
  }
  arguments.read();
  arguments.require_one_device(given_layer ? "running_mean" : "x", given_layer ? "this layer" : "x");

  batchnorm::ForwardCall call;
  take_shape(call, arguments, channel_axis);
  std::optional<Layer> layer = given_layer ? std::optional<Layer>(*given_layer) : std::nullopt;
  if (layer) require_layer(call, arguments, *layer);
  for (const char* name : {"weight", "bias", "running_mean", "running_var"}) {
    arguments.require_per_channel(name, call.channels, info(call.dtype).compute, "x");
  }
  arguments.require_like("residual", "x");
  arguments.require_like("out", "x");
  if (training && call.channels > 0 && call.per_channel() == 1) {
    throw py::value_error(
        "x: shape " + shape_text(arguments["x"].shape) +
        " has one value for each channel, whose variance has no meaning; training needs at least two");
  }
  require_eps(eps, info(call.dtype).compute);
  arguments.require_disjoint(training ? nullptr : "out", "x");

  const int device = arguments["x"].device;
  const py::object y = out.is_none() ? new_like(arguments["x"], call.x, call.y) : out;
  if (!out.is_none()) call.y = arguments.data("out");
  const py::object mean = new_statistics(device, call.channels, call.mean);
  const py::object invstd = new_statistics(device, call.channels, call.invstd);
  call.weight = arguments.data("weight");
  call.bias = arguments.data("bias");
  call.residual = arguments.data("residual");
  call.relu = relu;
  call.eps = eps;
  call.training = training;
  call.running_mean = arguments.data("running_mean");
  call.running_var = arguments.data("running_var");
  call.momentum = momentum;
  call.unbiased = unbiased;

  // Everything that may fail comes before the first write.
  const bool empty = call.count() == 0;
  py::object saved;
  py::object batches;
  py::object own_weight;  // which the pass reads, whether the layer keeps them or not
  py::object own_bias;
  void* weight_used = nullptr;
  void* bias_used = nullptr;
  if (layer) {
    const py::object y_or_none = relu && !residual.is_none() ? y : py::none();
    const bool in_place = call.y == call.x && !empty;
    // Copies of the parameters, made after foreign arrays have run what they like, and used by both passes.
    own_weight = copy_of_parameter(arguments.find("weight"), weight_used);
    own_bias = copy_of_parameter(arguments.find("bias"), bias_used);
    saved =
        in_place ? layer->overwritten : py::make_tuple(x, y_or_none, mean, invstd, own_weight, own_bias, layer->kept);
    const auto count = layer->record[Record::batches].cast<std::int64_t>();
    batches = py::int_(training && !empty ? std::min(count + 1, kMostBatches) : count);
  }
  const char* ran = "cuda";
  if (device == kHost) {
    if (layer) {
      call.weight = weight_used;
      call.bias = bias_used;
    }
    if (layer && training) layer->turn.writes();
    ran = run(&batchnorm::forward, call, residual.is_none() ? 2 : 3);
  } else {
    auto there = on_device<cuda::BatchnormForward>(call);
    there.residual = call.residual;
    there.y = call.y;
    there.eps = eps;
    there.training = training;
    there.running_mean = call.running_mean;
    there.running_var = call.running_var;
    there.momentum = momentum;
    there.unbiased = unbiased;
    there.mean = call.mean;
    there.invstd = call.invstd;
    there.weight_used = weight_used;
    there.bias_used = bias_used;
    const OnDevice pass(device, there, training, there.scratch);
    if (layer && training) layer->turn.writes();
    pass.run(&cuda::Backend::batchnorm_forward, there);
  }
  if (layer) layer->record.set({{Record::batches, batches}, {Record::saved, saved}});
  return py::make_tuple(y, mean, invstd, ran);
}

// (dx, dweight, dbias, dresidual or None, name of the instruction set that ran, or "cuda"). `given_layer`: None, or
// (record, what it holds after this pass, whether the forward pass had a residual, turn).
py::tuple backward(const py::object& dy, const py::object& x, const py::object& mean, const py::object& invstd,
                   const py::object& weight, const py::object& bias, const py::object& y, const py::object& out,
                   const py::object& weight_grad, const py::object& bias_grad, bool training, py::ssize_t channel_axis,
                   bool relu, const std::optional<py::tuple>& given_layer) {
  Arguments arguments;
  arguments.need("dy", dy, Use::read);
  arguments.need("x", x, Use::read);
  arguments.need("mean", mean, Use::read);
  arguments.need("invstd", invstd, Use::read);
  arguments.allow("weight", weight, Use::read);
  arguments.allow("bias", bias, Use::read);
  arguments.allow("y", y, Use::read);
  arguments.allow("out", out, Use::written);
  arguments.allow("weight_grad", weight_grad, Use::written);
  arguments.allow("bias_grad", bias_grad, Use::written);
  arguments.read();
  arguments.require_one_device("x", "x");

  batchnorm::BackwardCall call;
  take_shape(call, arguments, channel_axis);
  arguments.require_like("dy", "x");
  arguments.require_like("y", "x");
  arguments.require_like("out", "x");
  for (const char* name : {"mean", "invstd"}) {
    arguments.require_per_channel(name, call.channels, DType::float64, nullptr);
  }
  for (const char* name : {"weight", "bias", "weight_grad", "bias_grad"}) {
    arguments.require_per_channel(name, call.channels, info(call.dtype).compute, "x");
  }
  arguments.require_disjoint(nullptr, nullptr);

  const int device = arguments["x"].device;
  const py::object dx = out.is_none() ? new_like(arguments["x"], call.x, call.dx) : out;
  if (!out.is_none()) call.dx = arguments.data("out");
  py::object dresidual = py::none();
  if (relu && !y.is_none()) dresidual = new_like(arguments["x"], call.dx, call.dresidual);
  call.dy = arguments.data("dy");
  call.weight = arguments.data("weight");
  call.bias = arguments.data("bias");
  call.y = relu ? arguments.data("y") : nullptr;
  call.relu = relu;
  call.frozen = !training;
  const auto gradient = [&](const char* name, const py::object& given, void*& to) -> py::object {
    to = arguments.data(name);
    return given.is_none() ? new_per_channel(device, call.channels, info(call.dtype).compute, to) : given;
  };
  const py::object dweight = gradient("weight_grad", weight_grad, call.dweight);
  const py::object dbias = gradient("bias_grad", bias_grad, call.dbias);
  std::optional<Record> record;
  py::object saved;
  bool had_residual = false;
  Turnstile* turn = nullptr;
  if (given_layer) {
    record.emplace((*given_layer)[0]);
    saved = (*given_layer)[1];
    had_residual = (*given_layer)[2].cast<bool>();
    turn = &(*given_layer)[3].cast<Turnstile&>();
  }
  const char* ran = "cuda";
  if (device == kHost) {
    const std::vector<double> means = copy_of(arguments["mean"]);
    const std::vector<double> invstds = copy_of(arguments["invstd"]);
    call.mean = means.data();
    call.invstd = invstds.data();
    if (turn != nullptr) turn->writes();
    ran = run(&batchnorm::backward, call, 3);
  } else {
    auto there = on_device<cuda::BatchnormBackward>(call);
    there.dy = call.dy;
    there.y = call.y;
    there.frozen = call.frozen;
    there.mean = reinterpret_cast<const double*>(arguments["mean"].data);
    there.invstd = reinterpret_cast<const double*>(arguments["invstd"].data);
    there.dx = call.dx;
    there.dresidual = call.dresidual;
    there.dweight = call.dweight;
    there.dbias = call.dbias;
    const OnDevice pass(device, there, true, there.scratch);
    if (turn != nullptr) turn->writes();
    pass.run(&cuda::Backend::batchnorm_backward, there);
  }
  if (record) {
    const py::object residual_grad = !had_residual ? py::none() : relu ? dresidual : dy;
    record->set({{Record::saved, saved}, {Record::residual_grad, residual_grad}});
  }
  return py::make_tuple(dx, dweight, dbias, dresidual, ran);
}

constexpr const char* kMiddleOfPass = "this layer is in the middle of a pass; nothing was done";

}  // namespace

void bind_batchnorm(py::module_& m) {
  create_pool();
  py::class_<Turnstile>(m, "Turn")
      .def(py::init([] { return std::make_unique<Turnstile>("layer", kMiddleOfPass); }))
      .def("__enter__", &Turnstile::take)
      .def("writes", &Turnstile::writes)
      .def("__exit__", [](Turnstile& turn, const py::args& /*exception*/) { turn.leave(); });
  m.def("batch_norm_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("residual"), py::arg("out"), py::arg("training"), py::arg("momentum"),
        py::arg("unbiased"), py::arg("eps"), py::arg("channel_axis"), py::arg("relu"), py::arg("layer"));
  m.def("batch_norm_backward", &backward, py::arg("dy"), py::arg("x"), py::arg("mean"), py::arg("invstd"),
        py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("out"), py::arg("weight_grad"), py::arg("bias_grad"),
        py::arg("training"), py::arg("channel_axis"), py::arg("relu"), py::arg("layer") = py::none());
  m.def("set_batch_norm_limits", &set_device_limits, py::arg("shared"), py::arg("cluster"));
  m.def("empty_cache", &empty_cache);
  m.def("cache_limit", &cache_limit);
  m.def("set_cache_limit", &set_cache_limit, py::arg("count"));
  m.def("cached_bytes", &cached_bytes);
}

}  // namespace onepass
