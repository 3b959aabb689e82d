#include "bindings/device_step.h"

#include <algorithm>

#include "bindings/gil.h"

namespace onepass {
namespace {

struct Shares {
  std::vector<cuda::Share> shares;
  std::vector<std::uint8_t> of;  // for each tensor; empty where there is one share
};

Shares shares_of(const Batch& batch) {
  const std::vector<int> devices = devices_of(batch);
  constexpr std::size_t most = 255;
  if (devices.size() > most) throw std::runtime_error("a step is over more than 255 devices");
  Shares result;
  for (const int device : devices) result.shares.push_back({current_place(device), nullptr});
  if (devices.size() > 1) {
    for (const int device : batch.devices()) {
      result.of.push_back(static_cast<std::uint8_t>(std::ranges::find(devices, device) - devices.begin()));
    }
  }
  return result;
}

void take_scratch(cuda::Step& step, Shares& shares, DeviceMemory& memory) {
  step.shares = shares.shares;
  step.shares_of = shares.of;
  for (std::size_t k = 0; k < shares.shares.size(); ++k) {
    const std::size_t bytes = backend().scratch_bytes(step, k);
    if (bytes > 0) shares.shares[k].scratch = memory.scratch(shares.shares[k].place.device, bytes);
  }
}

}  // namespace

std::byte* DeviceMemory::scratch(int device, std::size_t bytes) {
  std::size_t& size = sizes_[device];
  py::object& array = scratch_[device];
  if (size < bytes) {
    py::object larger = bytes_on(device, bytes);
    if (keeps_ && array) kept_.push_back(std::move(array));
    array = std::move(larger);
    size = bytes;
  }
  return address_of(array);
}

const py::object& DeviceMemory::norm(int device) {
  py::object& array = norms_[device];
  if (!array) array = empty_on(device, {}, DType::float64);
  last_norm_ = device;
  return array;
}

const py::object& DeviceMemory::skipped(int device) {
  py::object& array = skipped_[device];
  if (!array) array = bytes_on(device, 1).attr("view")("bool").attr("reshape")(py::tuple());
  return array;
}

std::vector<int> devices_of(const Batch& batch) {
  std::vector<int> devices;
  for (const int device : batch.devices()) {
    if (std::ranges::find(devices, device) == devices.end()) devices.push_back(device);
  }
  return devices;
}

DeviceReport run_on_devices(Batch& batch, const StepOptions& options, const Summation& summation, const Naming& naming,
                            DeviceMemory& memory, bool wants_skipped, const Deferred* deferred,
                            std::unique_ptr<cuda::Plan>* plan) {
  DeviceReport report;
  if (batch.tensors().empty()) return report;
  Shares shares = shares_of(batch);
  cuda::Step step;
  step.tensors = batch.tensors();
  step.updates = summation.last;
  step.plan = plan;
  cuda::Judgement judgement;
  if (options.needs_norm() && (summation.last || options.nonfinite != NonFinite::propagate)) {
    judgement.scaling = {.scale = options.grad_scale, .accumulate = static_cast<double>(summation.calls)};
    judgement.summed = summation.calls > 1 && summation.last;
    judgement.skips = options.nonfinite == NonFinite::skip;
    if (summation.last) {
      judgement.max_grad_norm = options.max_grad_norm;
      judgement.clip_norm = options.clip_norm;
    }
    step.judgement = &judgement;
    step.raises = options.nonfinite == NonFinite::raise;
  }
  if (deferred != nullptr) {
    step.cohorts = deferred->cohorts;
    step.cohorts_of = deferred->cohorts_of;
    step.skipped = deferred->skipped;
    step.feedback = judgement.skips ? deferred->feedback : nullptr;
    step.call = deferred->call;
  }
  take_scratch(step, shares, memory);
  const int first = shares.shares.front().place.device;
  report.norm = step.judgement != nullptr && summation.last;
  report.skipped = step.judgement != nullptr && wants_skipped;
  if (report.norm) step.grad_norm = reinterpret_cast<double*>(address_of(memory.norm(first)));
  if (report.skipped) step.skipped_now = reinterpret_cast<bool*>(address_of(memory.skipped(first)));
  const auto bad = without_interpreter_lock([&] { return backend().step(step); });
  if (bad) raise_nonfinite(naming.name(batch.index(*bad), kGrad));
  return report;
}

void reserve_for_steps(Batch& batch, DeviceMemory& memory, std::size_t cohorts) {
  Shares shares = shares_of(batch);
  const cuda::Judgement judgement;
  const std::vector<cuda::Cohort> room(cohorts);
  cuda::Step step;
  step.tensors = batch.tensors();
  step.judgement = &judgement;
  step.cohorts = room;
  take_scratch(step, shares, memory);
  memory.norm(shares.shares.front().place.device);
}

void run_on_devices(Batch& batch, DeviceMemory& memory, DevicePass pass) {
  if (batch.tensors().empty()) return;
  Shares shares = shares_of(batch);
  cuda::Step step;
  step.tensors = batch.tensors();
  take_scratch(step, shares, memory);
  without_interpreter_lock([&] {
    (backend().*pass)(step);
    return true;
  });
}

}  // namespace onepass
