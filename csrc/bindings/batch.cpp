#include "bindings/batch.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

bool fits(double value, DType dtype) {
  return std::isfinite(value) && (dtype == DType::float64 || std::abs(value) <= std::numeric_limits<float>::max());
}

// A coefficient that is finite in float64 and not in the compute type would spread NaN without a word.
void require_finite(const Kernel& kernel, Setting& setting, DType dtype) {
  bool& checked = setting.checked[static_cast<std::size_t>(dtype)];
  if (checked) return;
  const auto require = [&](const char* what, double value) {
    if (!fits(value, dtype)) {
      throw ArgumentError(Kind::value, "the coefficient '" + std::string(what) + "' of " + kernel.rule + " would be " +
                                           std::string(py::str(py::float_(value))) + ", which is not finite in " +
                                           info(dtype).name + "; lr or another hyper-parameter is out of range");
    }
  };
  for (std::size_t k = 0; k < kernel.coefficients.count; ++k) {
    require(kernel.coefficients.data[k], setting.coefficients[k]);
  }
  require("scale", setting.around.scale);
  require("l1", setting.around.l1);
  require("l2", setting.around.l2);
  require("decay", setting.around.decay);
  checked = true;
}

void require_match(const ArrayView& view, const ArrayView& param) {
  bool same_shape = view.shape.size() == param.shape.size();
  for (std::size_t a = 0; same_shape && a < param.shape.size(); ++a) same_shape = view.shape[a] == param.shape[a];
  if (!same_shape) {
    throw ArgumentError(
        Kind::value, "shape " + shape_text(view.shape) + " does not match its parameter's " + shape_text(param.shape));
  }
  if (view.dtype != param.dtype) {
    throw ArgumentError(Kind::type, std::string("dtype ") + info(view.dtype).name + " does not match its parameter's " +
                                        info(param.dtype).name);
  }
}

}  // namespace

void Batch::clear() {
  entries_.clear();
  tensors_.clear();
  foreign_.clear();
  walks_.clear();
  written_.clear();
  grads_.clear();
  keeper_.clear();
}

void Batch::add(const Kernel& kernel, py::handle param, py::handle grad, const py::object* slots, Setting* setting,
                std::size_t index) {
  entries_.push_back({&kernel, param, grad, slots, setting, index});
}

void Batch::validate(const Naming& naming) {
  export_foreign(naming);
  for (const Entry& entry : entries_) read(entry, naming);
  require_disjoint(naming);
}

void Batch::export_foreign(const Naming& naming) {
  const auto export_one = [&](py::handle object, const Entry& entry, std::size_t stream) {
    if (!object || is_numpy_array(object) || foreign_.contains(object.ptr())) return;
    named(naming, entry.index, stream, [&] { foreign_.emplace(object.ptr(), view_array(object, keeper_)); });
  };
  for (const Entry& entry : entries_) {
    export_one(entry.param, entry, kParam);
    export_one(entry.grad, entry, kGrad);
    for (std::size_t k = 0; k < entry.kernel->slots.count; ++k) export_one(entry.slots[k], entry, kFirstSlot + k);
  }
}

ArrayView Batch::view(py::handle object) {
  if (foreign_.empty()) return view_numpy_array(object);
  const auto found = foreign_.find(object.ptr());
  return found != foreign_.end() ? found->second : view_numpy_array(object);
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
    const ArrayView view = this->view(entry.param);
    require_updatable(view);
    if (entry.setting != nullptr) require_finite(kernel, *entry.setting, view.dtype);
    return view;
  });
  const auto position = static_cast<std::uint32_t>(tensors_.size());
  Walk* walk = nullptr;
  const auto walk_if_needed = [&](const ArrayView& view, std::size_t stream) {
    if (same_order(p.shape, p.strides, view.strides)) return;
    if (walk == nullptr) walk = &walks_.emplace_back();
    walk->axes[stream - kGrad] = walk_axes(p.shape, p.strides, view.strides);
    walk->gather[stream - kGrad] = true;
  };

  Tensor tensor;
  tensor.kernel = &kernel;
  tensor.dtype = p.dtype;
  tensor.count = p.count;
  tensor.streams.param = p.data;
  note(written_, p, position, kParam);
  for (std::size_t k = 0; k < kernel.slots.count; ++k) {
    named(naming, index, kFirstSlot + k, [&] {
      const ArrayView slot = view(entry.slots[k]);
      require_updatable(slot);
      require_match(slot, p);
      tensor.streams.slots[k] = slot.data;
      walk_if_needed(slot, kFirstSlot + k);
      note(written_, slot, position, kFirstSlot + k);
    });
  }
  if (entry.grad) {
    named(naming, index, kGrad, [&] {
      const ArrayView g = view(entry.grad);
      require_match(g, p);
      tensor.streams.grad = g.data;
      walk_if_needed(g, kGrad);
      note(grads_, g, position, kGrad);
    });
  }
  if (entry.setting != nullptr) {
    tensor.coefficients = entry.setting->coefficients;
    tensor.around = &entry.setting->around;
  }
  tensor.walk = walk;
  tensors_.push_back(tensor);
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
  if (tensor.walk != nullptr && tensor.walk->gather[0]) {
    // A strided gradient may lie around what is written without touching it: compare runs, and within them elements.
    judged_by_element = true;
    written = nullptr;
    const std::size_t itemsize = info(tensor.dtype).itemsize;
    const auto base = reinterpret_cast<std::uintptr_t>(tensor.streams.grad);
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
    for_each_run(tensor.walk->axes[0], 0, tensor.count, visit);
    if (written == nullptr) return;
  }
  throw py::value_error(name(grad, naming) + ": overlaps " + name(*written, naming) +
                        " in memory, which the step writes");
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
    throw py::value_error(name(in_order ? b : a, naming) + ": overlaps " + name(in_order ? a : b, naming) +
                          " in memory; arrays that a step writes must not share memory");
  }
}

Isa Batch::run() const {
  std::size_t bytes = 0;
  for (const Tensor& tensor : tensors_) bytes += traffic(tensor);
  if (bytes < kReleaseBytes && bytes < serial_bytes()) return update(tensors_, 1);
  const std::size_t threads = thread_count();
  return without_interpreter_lock([&] { return update(tensors_, threads); });
}

}  // namespace onepass
