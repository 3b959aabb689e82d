// A step over arrays on CUDA devices, as Python asks for it: where its memory lies, what the host knows of it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "bindings/batch.h"
#include "bindings/device.h"
#include "bindings/step.h"

namespace onepass {

// Memory of devices that steps need beside their arrays, in CuPy arrays.
class DeviceMemory {
 public:
  // At least so many bytes of a device. What was given out before stays as it is, if captured steps may know it.
  std::byte* scratch(int device, std::size_t bytes);
  void keep_all(bool keep) { keeps_ = keep; }

  // A number of float64 and a truth value without dimensions, one for each device, which steps write.
  const py::object& norm(int device);
  const py::object& skipped(int device);
  const py::object& norm() const { return norms_.at(last_norm_); }  // the last one that was asked for

 private:
  std::map<int, py::object> scratch_;
  std::map<int, std::size_t> sizes_;
  std::vector<py::object> kept_;
  bool keeps_ = false;
  std::map<int, py::object> norms_;
  std::map<int, py::object> skipped_;
  int last_norm_ = kHost;
};

// What the caller wants to know of a step without waiting for it.
struct DeviceReport {
  bool norm = false;     // in DeviceMemory::norm()
  bool skipped = false;  // in DeviceMemory::skipped()
};

// Parameters whose count of steps devices know alone, of one step: see cuda::Cohort, one for each device.
struct Deferred {
  std::span<const cuda::Cohort> cohorts;  // `share` is the number of the device among those of the batch
  std::span<const std::uint32_t> cohorts_of;
  std::int64_t* skipped = nullptr;
  std::uint64_t* feedback = nullptr;
  std::uint64_t call = 0;
};

// The devices of a batch, in the order in which they occur.
std::vector<int> devices_of(const Batch& batch);

// Enqueues a step over validated tensors. Throws FloatingPointError, before anything is written, for NonFinite::raise,
// for which it waits.
DeviceReport run_on_devices(Batch& batch, const StepOptions& options, const Summation& summation, const Naming& naming,
                            DeviceMemory& memory, bool wants_skipped, const Deferred* deferred,
                            std::unique_ptr<cuda::Plan>* plan = nullptr);

// Takes the memory of a step over these tensors that is judged and counted by devices in so many cohorts.
void reserve_for_steps(Batch& batch, DeviceMemory& memory, std::size_t cohorts);

// The passes that are no steps.
using DevicePass = void (cuda::Backend::*)(const cuda::Step& step) const;
void run_on_devices(Batch& batch, DeviceMemory& memory, DevicePass pass);

}  // namespace onepass
