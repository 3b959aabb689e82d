#include "bindings/batch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "bindings/gil.h"
#include "core/layout.h"
#include "cpu/parallel.h"

namespace onepass {
namespace {

using Kind = ArgumentError::Kind;

template <class Action>
decltype(auto) named(const Naming& naming, std::size_t index, std::size_t stream, Action action) {
  try {
    return action();
  } catch (const ArgumentError& error) {
    error.raise(naming.name(index, stream));
  }
}

bool fits(double value, DType compute) {
  return std::isfinite(value) && (compute == DType::float64 || std::abs(value) <= std::numeric_limits<float>::max());
}

// A coefficient that is finite in float64 and not in the compute type would spread NaN without a word.
void require_finite(const Kernel& kernel, Setting& setting, DType compute) {
  bool& checked = setting.checked[static_cast<std::size_t>(compute)];
  if (checked) return;
  const auto require = [&](const char* what, double value) {
    if (!fits(value, compute)) {
      throw ArgumentError(Kind::value, "the coefficient '" + std::string(what) + "' of " + kernel.rule + " would be " +
                                           std::string(py::str(py::float_(value))) + ", which is not finite in " +
                                           info(compute).name + "; lr or another hyper-parameter is out of range");
    }
  };
  for (std::size_t k = 0; k < kernel.coefficients.count; ++k) {
    require(kernel.coefficients.data[k], setting.coefficients[k]);
  }
  require("grad_scale", setting.around.scaling.scale);
  require("l1", setting.around.l1);
  require("l2", setting.around.l2);
  require("decay", setting.around.decay);
  require("gradient_noise", setting.around.noise);
  checked = true;
}

void require_shape(const ArrayView& view, const ArrayView& param) {
  if (!std::ranges::equal(view.shape, param.shape)) {
    throw ArgumentError(
        Kind::value, "shape " + shape_text(view.shape) + " does not match its parameter's " + shape_text(param.shape));
  }
}

void require_device(const ArrayView& view, const ArrayView& param) {
  if (view.device == param.device) return;
  throw ArgumentError(Kind::value,
                      "is on " + device_text(view.device) + ", and its parameter on " + device_text(param.device));
}

void require_dtype(const ArrayView& view, DType dtype, const char* why) {
  if (view.dtype == dtype) return;
  throw ArgumentError(Kind::type,
                      std::string("dtype ") + info(view.dtype).name + ", expected " + info(dtype).name + ", " + why);
}

std::string storage_text() {
  std::string text = "parameter, gradient and states can be stored as";
  for (const StorageInfo& row : kStorages) {
    text += std::string("\n    ") + info(row.param).name + ", " + info(row.grad).name + ", " + info(row.state).name;
  }
  return text;
}

// The first row of the table for these dtypes, of which the gradient's and the states' may be open.
std::optional<std::size_t> storage_of(DType param, std::optional<DType> grad, std::optional<DType> state) {
  for (std::size_t k = 0; k < Storages::size; ++k) {
    const StorageInfo& row = kStorages[k];
    if (row.param == param && row.grad == grad.value_or(row.grad) && row.state == state.value_or(row.state)) return k;
  }
  return std::nullopt;
}

// How the units of a parameter lie in memory: see Units.
Units read_units(const ArrayView& param, const Setting& setting) {
  const auto ndim = static_cast<std::int64_t>(param.shape.size());
  std::vector<bool> inside(param.shape.size());  // axes along which a unit's weights lie
  for (const std::int64_t axis : setting.axes) {
    if (axis < -ndim || axis >= ndim) {
      throw ArgumentError(Kind::value, "max_unit_norm needs axis " + std::to_string(axis) + ", and its shape is " +
                                           shape_text(param.shape));
    }
    const auto a = static_cast<std::size_t>(axis < 0 ? axis + ndim : axis);
    if (inside[a]) {
      throw ArgumentError(Kind::value, "max_unit_norm names axis " + std::to_string(axis) + " twice, for its shape " +
                                           shape_text(param.shape));
    }
    inside[a] = true;
  }
  std::vector<std::size_t> axes;  // from the slowest in memory
  for (std::size_t a = 0; a < param.shape.size(); ++a) {
    if (param.shape[a] > 1) axes.push_back(a);
  }
  std::ranges::stable_sort(axes, std::ranges::greater{}, [&](std::size_t a) { return param.strides[a]; });
  Units units;
  units.limit = setting.unit_limit;
  if (param.count == 0) return units;
  // The four parts of Units from the innermost: run (inside), units, depth (inside), outer.
  std::size_t* const parts[] = {&units.run, &units.units, &units.depth, &units.outer};
  std::size_t part = 0;
  for (std::size_t k = axes.size(); k-- > 0;) {
    const bool is_inside = inside[axes[k]];
    while (part < 4 && (part % 2 == 0) != is_inside) ++part;
    if (part == 4) {
      throw ArgumentError(Kind::value,
                          "max_unit_norm: the weights of a unit are scattered over its memory in more than "
                          "two ways (shape " +
                              shape_text(param.shape) + ", strides " + shape_text(param.strides) + ")");
    }
    *parts[part] *= static_cast<std::size_t>(param.shape[axes[k]]);
  }
  return units;
}

}  // namespace

namespace {

Holds holds(std::size_t stream) { return stream == kRemainder ? Holds::remainders : Holds::numbers; }

}  // namespace

void Batch::clear() {
  entries_.clear();
  tensors_.clear();
  devices_.clear();
  foreign_.clear();
  walks_.clear();
  units_.clear();
  written_.clear();
  grads_.clear();
  keeper_.clear();
}

void Batch::add(const Kernel& kernel, const Arrays& arrays, Setting* setting, std::size_t index) {
  entries_.push_back({&kernel, arrays, setting, index});
}

void Batch::leave_alone(const Arrays& arrays, std::size_t index) {
  entries_.push_back({nullptr, arrays, nullptr, index});
}

void Batch::validate(const Naming& naming) {
  export_foreign(naming);
  for (std::size_t k = 0; k < entries_.size(); ++k) {
    const Entry& entry = entries_[k];
    entry.kernel != nullptr ? read(entry, naming) : note_alone(entry, k, naming);
  }
  require_disjoint(naming);
}

void Batch::renew(std::span<Setting* const> settings, const Naming& naming) {
  for (std::size_t k = 0; k < tensors_.size(); ++k) {
    Tensor& tensor = tensors_[k];
    Setting& setting = *settings[k];
    named(naming, entries_[k].index, kParam,
          [&] { require_finite(*tensor.kernel, setting, info(tensor.dtypes[kParam]).compute); });
    tensor.coefficients = setting.coefficients;
    tensor.around = &setting.around;
    tensor.key.seed = seed;
    tensor.key.t = setting.t;
  }
}

void Batch::export_foreign(const Naming& naming) {
  is_fixed_ = true;
  for (const Entry& entry : entries_) {
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const py::handle object = entry.arrays.stream[stream];
      if (!object) continue;
      is_fixed_ = is_fixed_ && is_cupy_array(object);
      if (is_numpy_array(object) || foreign_.contains(object.ptr())) continue;
      if (entry.kernel == nullptr && object.is_none()) continue;
      named(naming, entry.index, stream,
            [&] { foreign_.emplace(object.ptr(), view_array(object, keeper_, holds(stream))); });
    }
  }
}

ArrayView Batch::view(py::handle object, std::size_t stream) {
  if (foreign_.empty()) return view_numpy_array(object, holds(stream));
  const auto found = foreign_.find(object.ptr());
  return found != foreign_.end() ? found->second : view_numpy_array(object, holds(stream));
}

void Batch::note(std::vector<Interval>& intervals, const ArrayView& view, std::uint32_t tensor, std::size_t stream) {
  Interval& interval = intervals.emplace_back();
  interval.range = memory_range(view);
  interval.tensor = tensor;
  interval.stream = static_cast<std::uint32_t>(stream);
}

void Batch::read(const Entry& entry, const Naming& naming) {
  const Kernel& kernel = *entry.kernel;
  const std::size_t index = entry.index;
  const ArrayView p = named(naming, index, kParam, [&] {
    const ArrayView view = this->view(entry.arrays.stream[kParam], kParam);
    require_updatable(view);
    if (!devices_.empty() && (devices_.front() == kHost) != (view.device == kHost)) {
      throw ArgumentError(Kind::value, "is on " + device_text(view.device) + ", and " +
                                           naming.name(entries_.front().index, kParam) + " on " +
                                           device_text(devices_.front()) +
                                           "; parameters of one optimizer are all on the host or all on CUDA devices");
    }
    return view;
  });
  const auto position = static_cast<std::uint32_t>(tensors_.size());
  const bool is_split = static_cast<bool>(entry.arrays.stream[kRemainder]);
  Walk* walk = nullptr;
  Tensor tensor;
  tensor.kernel = &kernel;
  tensor.count = p.count;
  const auto enter = [&](const ArrayView& view, std::size_t stream, bool written) {
    tensor.streams.data[stream] = view.data;
    tensor.dtypes[stream] = view.dtype;
    note(written ? written_ : grads_, view, position, stream);
    if (same_order(p.shape, p.strides, p.itemsize(), view.strides, view.itemsize())) return;
    if (walk == nullptr) walk = &walks_.emplace_back();
    walk->axes[stream] = walk_axes(p.shape, p.strides, view.strides);
    walk->gather[stream] = true;
  };
  enter(p, kParam, true);

  std::optional<DType> state;
  for (std::size_t k = 0; k < kernel.slots.count; ++k) {
    named(naming, index, kFirstSlot + k, [&] {
      const ArrayView slot = view(entry.arrays.stream[kFirstSlot + k], kFirstSlot + k);
      require_updatable(slot);
      require_device(slot, p);
      require_shape(slot, p);
      if (!storage_of(p.dtype, std::nullopt, slot.dtype)) {
        throw ArgumentError(Kind::type, std::string("dtype ") + info(slot.dtype).name +
                                            " does not match its parameter's " + info(p.dtype).name + "; " +
                                            storage_text());
      }
      if (state) require_dtype(slot, *state, "the dtype of the other states");
      state = slot.dtype;
      enter(slot, kFirstSlot + k, true);
    });
  }
  const auto read_other = [&](std::size_t stream, auto judge) {
    if (!entry.arrays.stream[stream]) return;
    named(naming, index, stream, [&] {
      const ArrayView array = view(entry.arrays.stream[stream], stream);
      require_updatable(array);
      require_device(array, p);
      require_shape(array, p);
      judge(array);
      enter(array, stream, true);
    });
  };
  read_other(kRemainder, [&](const ArrayView&) {
    if (p.dtype != DType::bfloat16) {
      throw ArgumentError(
          Kind::type, std::string("a split master needs a parameter of bfloat16, and its is ") + info(p.dtype).name);
    }
  });
  read_other(kEma, [&](const ArrayView& array) {
    if (is_split) return require_dtype(array, DType::float32, "the dtype of the split master");
    require_dtype(array, p.dtype, "the dtype of its parameter");
  });
  read_other(kMirror, [&](const ArrayView& array) {
    if (array.dtype == DType::bfloat16 || array.dtype == DType::float16) return;
    throw ArgumentError(Kind::type, std::string("dtype ") + info(array.dtype).name + ", expected bfloat16 or float16");
  });
  read_other(kAccumulator, [&](const ArrayView& array) {
    require_dtype(array, info(p.dtype).compute, "in which gradients are summed");
  });

  std::optional<DType> grad;
  if (entry.arrays.stream[kGrad]) {
    named(naming, index, kGrad, [&] {
      const ArrayView g = view(entry.arrays.stream[kGrad], kGrad);
      require_device(g, p);
      require_shape(g, p);
      grad = g.dtype;
      if (!storage_of(p.dtype, grad, state)) {
        throw ArgumentError(Kind::type, std::string("dtype ") + info(g.dtype).name +
                                            " does not match its parameter's " + info(p.dtype).name +
                                            (state ? std::string(" and its states' ") + info(*state).name : "") + "; " +
                                            storage_text());
      }
      if (zero_grads && (!g.writable || g.copied)) {
        throw ArgumentError(Kind::value, "is read-only and cannot be zeroed");
      }
      if (zero_grads && repeats(g.shape, g.strides, g.itemsize())) {
        throw ArgumentError(Kind::value, "strides " + shape_text(g.strides) + " of shape " + shape_text(g.shape) +
                                             " may repeat elements, which cannot be zeroed as they are read");
      }
      enter(g, kGrad, zero_grads);
    });
  }
  tensor.storage = storage_of(p.dtype, grad, state).value_or(0);  // there is one: it was looked up above
  if (entry.setting != nullptr) {
    named(naming, index, kParam, [&] {
      require_finite(kernel, *entry.setting, info(p.dtype).compute);
      tensor.coefficients = entry.setting->coefficients;
      tensor.around = &entry.setting->around;
      tensor.key = {seed, static_cast<std::uint32_t>(index), entry.setting->t, Purpose::noise};
      if (entry.setting->unit_limit > 0.0) tensor.units = &units_.emplace_back(read_units(p, *entry.setting));
    });
  }
  tensor.stochastic = stochastic;
  tensor.walk = walk;
  tensors_.push_back(tensor);
  devices_.push_back(p.device);
}

const Batch::Interval* Batch::first_written_in(const MemoryRange& range) const {
  // The first written range that ends behind the beginning of this one.
  const auto found =
      std::ranges::upper_bound(sorted_, range.begin, {}, [](const Interval& interval) { return interval.range.end; });
  return found != sorted_.end() && found->range.meets(range) ? &*found : nullptr;
}

void Batch::compare_gradient(const Interval& grad, const Naming& naming, bool& judged_by_element) const {
  const Interval* written = first_written_in(grad.range);
  if (written == nullptr) return;
  const Tensor& tensor = tensors_[grad.tensor];
  if (tensor.walk != nullptr && tensor.walk->gather[kGrad]) {
    // A strided gradient may lie around what is written without touching it: compare runs, and within them elements.
    judged_by_element = true;
    written = nullptr;
    const std::size_t itemsize = info(tensor.dtypes[kGrad]).itemsize;
    const auto base = reinterpret_cast<std::uintptr_t>(tensor.streams.data[kGrad]);
    const auto visit = [&](std::ptrdiff_t offset, std::size_t run, std::ptrdiff_t stride) {
      const std::uintptr_t first = base + static_cast<std::uintptr_t>(offset);
      const std::uintptr_t last = first + static_cast<std::uintptr_t>(static_cast<std::ptrdiff_t>(run - 1) * stride);
      const MemoryRange range{std::min(first, last), std::max(first, last) + itemsize};
      if (written != nullptr || first_written_in(range) == nullptr) return;
      for (std::size_t k = 0; k < run && written == nullptr; ++k) {
        const std::uintptr_t at = first + static_cast<std::uintptr_t>(static_cast<std::ptrdiff_t>(k) * stride);
        written = first_written_in({at, at + itemsize});
      }
    };
    for_each_run(tensor.walk->axes[kGrad], 0, tensor.count, visit);
    if (written == nullptr) return;
  }
  throw py::value_error(name(grad, naming) + ": overlaps " + name(*written, naming) +
                        " in memory, which the step writes");
}

void Batch::note_alone(const Entry& entry, std::size_t position, const Naming& naming) {
  for (std::size_t stream = 0; stream < kStreams; ++stream) {
    const py::handle object = entry.arrays.stream[stream];
    if (!object || object.is_none()) continue;
    named(naming, entry.index, stream,
          [&] { note(written_, view(object, stream), static_cast<std::uint32_t>(position), stream); });
  }
}

void Batch::require_disjoint(const Naming& naming) {
  const auto same = [](const std::vector<Interval>& now, const std::vector<MemoryRange>& passed) {
    return std::ranges::equal(now, passed, {}, &Interval::range);
  };
  const auto remember = [](const std::vector<Interval>& now, std::vector<MemoryRange>& passed) {
    passed.clear();
    for (const Interval& interval : now) passed.push_back(interval.range);
  };
  if (!same(written_, passed_written_)) {
    passed_written_.clear();
    passed_grads_.clear();
    sort_written(naming);
    remember(written_, passed_written_);
  } else if (same(grads_, passed_grads_)) {
    return;
  }
  passed_grads_.clear();
  bool judged_by_element = false;
  for (const Interval& grad : grads_) {
    if (!grad.range.empty()) compare_gradient(grad, naming, judged_by_element);
  }
  // Other strides over the same range may judge otherwise: look again next time.
  if (!judged_by_element) remember(grads_, passed_grads_);
}

void Batch::sort_written(const Naming& naming) {
  sorted_.clear();
  for (const Interval& interval : written_) {
    if (!interval.range.empty()) sorted_.push_back(interval);
  }
  std::ranges::sort(sorted_, {}, [](const Interval& interval) { return interval.range.begin; });
  for (std::size_t k = 1; k < sorted_.size(); ++k) {
    const Interval& a = sorted_[k - 1];
    const Interval& b = sorted_[k];
    if (!a.range.meets(b.range)) continue;
    const bool in_order = a.tensor < b.tensor || (a.tensor == b.tensor && a.stream < b.stream);
    throw py::value_error(
        name(in_order ? b : a, naming) + ": overlaps " + name(in_order ? a : b, naming) +
        " in memory; arrays that a step writes must not share memory" +
        (a.stream == kGrad || b.stream == kGrad ? ", or interleave (zero_grads writes gradients)" : ""));
  }
}

namespace {

// Calls action(threads), without the interpreter lock where the work is worth it.
template <class Action>
auto with_threads(std::span<const Tensor> tensors, Action action) {
  std::size_t bytes = 0;
  for (const Tensor& tensor : tensors) bytes += traffic(tensor);
  if (bytes < kReleaseBytes && bytes < serial_bytes()) return action(std::size_t{1});
  const std::size_t threads = thread_count();
  return without_interpreter_lock([&] { return action(threads); });
}

}  // namespace

Isa Batch::run() const {
  return with_threads(tensors_, [&](std::size_t threads) { return update(tensors_, threads); });
}

std::span<const Squares> Batch::measure() {
  sums_.resize(tensors_.size());
  with_threads(tensors_, [&](std::size_t threads) {
    onepass::measure(tensors_, threads, sums_);
    return true;
  });
  return sums_;
}

void Batch::accumulate() const {
  with_threads(tensors_, [&](std::size_t threads) {
    onepass::accumulate(tensors_, threads);
    return true;
  });
}

void Batch::zero_gradients() const {
  with_threads(tensors_, [&](std::size_t threads) {
    onepass::zero_gradients(tensors_, threads);
    return true;
  });
}

void Batch::exchange() const {
  with_threads(tensors_, [&](std::size_t threads) {
    onepass::exchange(tensors_, threads);
    return true;
  });
}

void Batch::show() const {
  with_threads(tensors_, [&](std::size_t threads) {
    onepass::show(tensors_, threads);
    return true;
  });
}

}  // namespace onepass
