#include "bindings/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/sums.h"

namespace onepass {
namespace {

constexpr float kNoFloat = -0.0F;
constexpr double kNoDouble = -0.0;

std::optional<double> optional_number(py::handle value) {
  if (value.is_none()) return std::nullopt;
  return value.cast<double>();
}

// A sum to which nothing was added. -0 is neutral for zeros of both signs.
void start_at_zero(Tensor& tensor) {
  std::byte* const sums = tensor.streams.data[kAccumulator];
  if (tensor.dtypes[kAccumulator] == DType::float32) {
    for (std::size_t k = 0; k < tensor.count; ++k) std::memcpy(sums + k * sizeof(float), &kNoFloat, sizeof(float));
  } else {
    for (std::size_t k = 0; k < tensor.count; ++k) std::memcpy(sums + k * sizeof(double), &kNoDouble, sizeof(double));
  }
  tensor.sum_starts = false;
}

}  // namespace

void raise_nonfinite(const std::string& name) {
  PyErr_SetString(PyExc_FloatingPointError,
                  (name + ": holds inf or NaN, and nonfinite='raise'; nothing was changed").c_str());
  throw py::error_already_set();
}

StepOptions StepOptions::read(py::handle given) {
  StepOptions options;
  if (given.is_none()) return options;
  const auto tuple = given.cast<py::tuple>();
  options.grad_scale = tuple[0].cast<double>();
  options.max_grad_norm = optional_number(tuple[1]);
  options.clip_norm = optional_number(tuple[2]);
  options.clip_value = optional_number(tuple[3]).value_or(options.clip_value);
  options.nonfinite = static_cast<NonFinite>(tuple[4].cast<int>());
  options.zero_grads = tuple[5].cast<bool>();
  return options;
}

void StepOptions::enter(Around& around) const {
  around.scaling.scale = grad_scale;
  around.clip_value = clip_value;
  around.zero_grads = zero_grads;
}

Outcome run_step(Batch& batch, const StepOptions& options, const Summation& summation, const Naming& naming, Isa& isa) {
  std::vector<Tensor>& tensors = batch.tensors();
  const bool summed = summation.calls > 1 && summation.last;
  Outcome outcome;
  if (options.needs_norm() && (summation.last || options.nonfinite != NonFinite::propagate)) {
    const std::span<const Squares> sums = batch.measure();
    const double total = ordered_sum(sums.size(), [&](std::size_t k) { return sums[k].sum; });
    const Scaling scaling{.scale = options.grad_scale, .accumulate = static_cast<double>(summation.calls)};
    const auto norm = [&](double sum) { return norm_of(sum, scaling, summed); };
    if (summation.last) outcome.grad_norm = norm(total);
    const auto bad = std::ranges::find(sums, false, &Squares::finite);
    if (options.nonfinite != NonFinite::propagate && bad != sums.end()) {
      if (options.nonfinite == NonFinite::raise) {
        raise_nonfinite(naming.name(batch.index(static_cast<std::size_t>(bad - sums.begin())), kGrad));
      }
      if (options.zero_grads) batch.zero_gradients();
      outcome.skipped = true;
      return outcome;
    }
    for (std::size_t k = 0; k < tensors.size() && summation.last; ++k) {
      if (options.max_grad_norm) tensors[k].clip = clip_factor(*outcome.grad_norm, *options.max_grad_norm);
      if (options.clip_norm) tensors[k].clip = clip_factor(norm(sums[k].sum), *options.clip_norm);
    }
  }
  if (summation.last) {
    for (Tensor& tensor : tensors) {
      if (summed && tensor.sum_starts) start_at_zero(tensor);
    }
    isa = batch.run();
  } else {
    batch.accumulate();
  }
  return outcome;
}

}  // namespace onepass
