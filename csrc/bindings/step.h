// What surrounds the update in one step, as Python asks for it: scaling, clipping, what to do about gradients that are
// not finite, sums of gradients.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "bindings/batch.h"

namespace onepass {

enum class NonFinite : std::uint8_t { propagate, skip, raise };

struct StepOptions {
  double grad_scale = 1.0;
  std::optional<double> max_grad_norm;  // of all tensors together
  std::optional<double> clip_norm;      // of each
  double clip_value = std::numeric_limits<double>::infinity();
  NonFinite nonfinite = NonFinite::propagate;
  bool zero_grads = false;

  // None, or (grad_scale, max_grad_norm, clip_norm, clip_value, nonfinite, zero_grads), in range.
  static StepOptions read(py::handle given);
  bool needs_norm() const { return max_grad_norm || clip_norm || nonfinite != NonFinite::propagate; }
  void enter(Around& around) const;
};

// Where the call stands among those whose gradients are summed up.
struct Summation {
  std::int64_t calls = 1;  // in a sum
  bool last = true;
};

struct Outcome {
  std::optional<double> grad_norm;
  bool skipped = false;
};

[[noreturn]] void raise_nonfinite(const std::string& name);  // FloatingPointError

// Validated tensors on the host: measures the gradients if that is asked for, judges and clips, then updates (or adds
// to the accumulators). Throws FloatingPointError, before anything is written, for NonFinite::raise.
Outcome run_step(Batch& batch, const StepOptions& options, const Summation& summation, const Naming& naming, Isa& isa);

}  // namespace onepass
