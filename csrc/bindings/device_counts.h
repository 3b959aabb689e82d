// Counts of steps that devices keep, because the host cannot know them: a step that is skipped for a gradient that is
// not finite does not count, and a captured one runs whenever its graph is launched.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "bindings/device.h"
#include "bindings/device_step.h"

namespace onepass {

class DeviceCounts {
 public:
  // What a row of a group's count `t` is: the coefficients and what surrounds them.
  using RowOf = std::function<const Setting&(std::size_t group, std::int64_t t)>;

  // For each parameter its group, its count and its device, and whether it is stepped together with the others of
  // these.
  DeviceCounts(std::span<const std::size_t> groups, std::span<const std::int64_t> counts, std::span<const int> devices,
               const std::vector<bool>& together, std::int64_t skipped, int first_device);
  ~DeviceCounts();
  DeviceCounts(const DeviceCounts&) = delete;
  DeviceCounts& operator=(const DeviceCounts&) = delete;

  // Keeps the rows of the next `steps` counts on the devices.
  void prepare(std::int64_t steps, const RowOf& row_of);
  bool is_prepared() const { return prepared_; }

  // Whether a step of these parameters, on these devices, is one of whole cohorts and of the first device's counts.
  bool fits(std::span<const std::size_t> stepped, std::span<const int> devices) const;

  // Of one step.
  struct Call {
    std::vector<cuda::Cohort> cohorts;
    std::vector<std::uint32_t> cohorts_of;
    std::vector<cuda::Row> rows;
    Deferred deferred;
  };
  // The rows that the step may need; waits for the devices if there would be too many.
  void begin(Call& call, std::span<const std::size_t> stepped, std::span<const int> devices, const RowOf& row_of);
  void done(std::span<const std::size_t> stepped, bool judged);

  // What the devices have counted; waits for them.
  struct Counted {
    std::vector<std::int64_t> counts;  // of each parameter
    std::int64_t skipped;
    std::int64_t left_out;          // steps, for want of rows
    void require_complete() const;  // throws RuntimeError if there are any
  };
  Counted read() const;

 private:
  void refresh();

  struct Cohort {
    std::size_t group;
    std::int64_t count;     // when the host last knew it
    std::int64_t attempts;  // to step since, and those of them that may have been skipped
    std::int64_t judged;
    std::size_t members;
    std::map<int, std::size_t> places;  // in the ledger of each device: the count, and the steps that were left out
    std::map<int, py::object> rows;     // prepared
    std::int64_t first, prepared;
  };
  std::vector<std::int64_t> read_ledger(int device) const;
  std::int64_t* ledger(int device) const;

  std::vector<Cohort> cohorts_;
  std::vector<std::uint32_t> cohort_of_;  // each parameter
  std::map<int, py::object> ledgers_;     // int64: skipped steps, then what belongs to each cohort
  std::map<int, std::size_t> lengths_;
  int first_device_;
  std::int64_t skipped_;    // when the host last knew it
  std::int64_t calls_ = 0;  // since, of steps that may have been skipped
  py::object pinned_;       // memory of the host that devices write
  std::uint64_t* feedback_ = nullptr;
  bool prepared_ = false;
  bool unsure_ = false;  // a step has begun that may have failed when it was counted already
};

// For tests: the next counts ask for memory of their own.
void forget_feedback_words();

}  // namespace onepass
