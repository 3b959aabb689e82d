// What the CUDA extension offers to the bindings, which live in the module for the CPU: plain C++, without a header of
// CUDA. Both modules are built together, from one source; the capsule's name says so.
//
// Work is enqueued on the stream that is given and nobody waits for it. Memory belongs to the caller. Errors are
// std::bad_alloc and std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/tensor.h"
#include "cuda/batchnorm.h"

namespace onepass::cuda {

struct DeviceInfo {
  std::string name;
  int major, minor;  // compute capability
  std::size_t memory;
};

// Where work goes.
struct Place {
  int device;
  void* stream;
};

// What all gradients of a step together decide.
struct Judgement {
  std::optional<double> max_grad_norm;  // of all tensors together
  std::optional<double> clip_norm;      // of each
  Scaling scaling;
  bool summed = false;  // the norm is that of a mean
  bool skips = false;   // gradients that are not finite: nothing is updated
};

// What changes with the count of steps, in float64.
struct Row {
  double coefficients[kMaxCoefficients];
  double decay, noise, ema_decay;
  std::int64_t t;
};

// Parameters that are stepped together, on one device, whose count of steps that device alone knows. The next step
// takes the row of the count that follows.
struct Cohort {
  std::size_t share;
  std::int64_t* clock;        // on the device: the count, and how many steps were left out for want of a row
  const Row* rows;            // of counts first ... first + count - 1; in the device's memory if `resident`
  std::int64_t first, count;  // at most kMostRows unless resident
  bool resident;
  Around around;  // what does not change with the count
};
inline constexpr std::int64_t kMostRows = 128;

// One device's share of a step.
struct Share {
  Place place;
  std::byte* scratch;  // scratch_bytes() of the device's memory, aligned to 256 bytes; null where it is 0
};

// The launches of a step, kept for the next one of the same tensors (their settings may differ), the same judgement and
// the same scratch memory: filling tables for 1000 tensors takes 30 times as long as launching them. A step of anything
// else fills it anew.
class Plan {
 public:
  Plan() = default;
  virtual ~Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
};

struct Step {
  std::span<const Tensor> tensors;          // of all devices
  std::unique_ptr<Plan>* plan = nullptr;    // null: nothing is kept
  std::span<const std::uint8_t> shares_of;  // for each tensor the share it belongs to; empty: the first
  std::span<const Share> shares;
  const Judgement* judgement = nullptr;       // null: no norm is needed
  bool raises = false;                        // looks at what is judged, and waits for it: see Backend::step()
  bool updates = true;                        // false: gradients are added to the accumulators
  std::span<const Cohort> cohorts;            // empty: Tensor::coefficients and around say all
  std::span<const std::uint32_t> cohorts_of;  // for each tensor its cohort
  // In the first share's memory, of what is judged; null: not wanted.
  double* grad_norm = nullptr;
  bool* skipped_now = nullptr;
  std::int64_t* skipped = nullptr;    // a count of skipped steps, to which is added
  std::uint64_t* feedback = nullptr;  // memory of the host that devices write: `call` << 32 | that count
  std::uint64_t call = 0;
};

class Backend {
 public:
  Backend() = default;
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  // Throws std::runtime_error, in CUDA's words, where the driver is missing or too old.
  virtual std::vector<DeviceInfo> devices() const = 0;
  virtual std::string architectures() const = 0;  // for which there is code
  // Copies between the host and a device, and waits for it.
  virtual void copy(const Place& place, void* to, const void* from, std::size_t bytes) const = 0;
  virtual bool is_capturing(const Place& place) const = 0;
  virtual void synchronize(int device) const = 0;
  virtual int device_of(const void* memory) const = 0;  // throws std::runtime_error for memory of no device
  // What comes later on the stream of `place` begins after what is enqueued on another stream now.
  virtual void follow(const Place& place, void* stream) const = 0;

  virtual std::size_t scratch_bytes(const Step& step, std::size_t share) const = 0;
  // With Step::raises the first tensor whose gradient is not finite, if there is one; nothing was updated then.
  virtual std::optional<std::size_t> step(const Step& step) const = 0;
  // These use tensors and shares of a Step alone.
  virtual void zero_gradients(const Step& step) const = 0;
  // Exchanges parameters and their averages; mirrors follow the parameters.
  virtual void exchange(const Step& step) const = 0;
  // Mirrors take the parameters as they are.
  virtual void show(const Step& step) const = 0;

  // Batch normalization (batchnorm.h).
  virtual std::size_t batchnorm_scratch_bytes(const BatchnormShape& shape) const = 0;
  virtual void batchnorm_forward(const Place& place, const BatchnormForward& call) const = 0;
  virtual void batchnorm_backward(const Place& place, const BatchnormBackward& call) const = 0;
};

inline constexpr const char* kBackendCapsule = "onepass._cuda.backend";

}  // namespace onepass::cuda
