#include "bindings/device_counts.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <tuple>

#include "bindings/gil.h"

namespace onepass {
namespace {

cuda::Row as_row(const Setting& setting, std::int64_t t) {
  cuda::Row row{};
  std::ranges::copy(setting.coefficients, row.coefficients);
  row.decay = setting.around.decay;
  row.noise = setting.around.noise;
  row.ema_decay = setting.around.ema_decay;
  row.t = t;
  return row;
}

void write(int device, void* to, const void* from, std::size_t bytes) {
  const cuda::Place place = current_place(device);
  without_interpreter_lock([&] {
    backend().copy(place, to, from, bytes);
    return true;
  });
}

std::uint64_t said_by(const std::uint64_t* feedback) {
  return std::atomic_ref<std::uint64_t>(*const_cast<std::uint64_t*>(feedback)).load(std::memory_order_acquire);
}

// Words of the host's memory that devices write, for the life of the process. One that comes back is given out again
// when the last step that was told of it has written: until then it may be under way.
class FeedbackWords {
 public:
  std::uint64_t* take() {
    for (;;) {
      if (std::uint64_t* const word = take_free()) return word;
      // Without the lock: CuPy may let other threads of Python run.
      const py::object memory =
          py::module_::import("cupy").attr("cuda").attr("alloc_pinned_memory")(sizeof(std::uint64_t));
      auto* const word = reinterpret_cast<std::uint64_t*>(memory.attr("ptr").cast<std::uintptr_t>());
      memory.inc_ref();  // for the life of the process
      const std::scoped_lock lock(mutex_);
      free_.push_back(word);
    }
  }
  void forget() {
    const std::scoped_lock lock(mutex_);
    free_.clear();
    waiting_.clear();
  }
  void give(std::uint64_t* word, std::int64_t call) {
    const std::scoped_lock lock(mutex_);
    waiting_.push_back({word, static_cast<std::uint64_t>(call)});
  }

 private:
  struct Waiting {
    std::uint64_t* word;
    std::uint64_t call;
  };
  std::uint64_t* take_free() {
    const std::scoped_lock lock(mutex_);
    std::erase_if(waiting_, [&](const Waiting& one) {
      if (said_by(one.word) >> 32U < one.call) return false;
      free_.push_back(one.word);
      return true;
    });
    if (free_.empty()) return nullptr;
    std::uint64_t* const word = free_.back();
    free_.pop_back();
    return word;
  }

  std::mutex mutex_;
  std::vector<std::uint64_t*> free_;
  std::vector<Waiting> waiting_;
};

FeedbackWords& feedback_words() {
  static auto* const words = new FeedbackWords;  // freed in no order with Python
  return *words;
}

}  // namespace

void forget_feedback_words() { feedback_words().forget(); }

DeviceCounts::~DeviceCounts() {
  if (feedback_ != nullptr) feedback_words().give(feedback_, calls_ + (unsure_ ? 1 : 0));
}

DeviceCounts::DeviceCounts(std::span<const std::size_t> groups, std::span<const std::int64_t> counts,
                           std::span<const int> devices, const std::vector<bool>& together, std::int64_t skipped,
                           int first_device)
    : first_device_(first_device), skipped_(skipped), feedback_(feedback_words().take()) {
  std::map<std::tuple<std::size_t, std::int64_t, bool>, std::uint32_t> known;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const auto [found, is_new] =
        known.try_emplace({groups[i], counts[i], together[i]}, static_cast<std::uint32_t>(cohorts_.size()));
    if (is_new) cohorts_.push_back({groups[i], counts[i], 0, 0, 0, {}, {}, 0, 0});
    Cohort& cohort = cohorts_[found->second];
    ++cohort.members;
    std::size_t& length = lengths_.try_emplace(devices[i], 1).first->second;
    if (cohort.places.try_emplace(devices[i], length).second) length += 2;
    cohort_of_.push_back(found->second);
  }
  for (const auto& [device, length] : lengths_) {
    std::vector<std::int64_t> start(length, 0);
    start[0] = skipped;
    for (const Cohort& cohort : cohorts_) {
      const auto place = cohort.places.find(device);
      if (place != cohort.places.end()) start[place->second] = cohort.count;
    }
    ledgers_[device] = bytes_on(device, length * sizeof(std::int64_t));
    write(device, ledger(device), start.data(), length * sizeof(std::int64_t));
  }
  *feedback_ = static_cast<std::uint64_t>(skipped) & 0xFFFFFFFFU;
}

std::int64_t* DeviceCounts::ledger(int device) const {
  return reinterpret_cast<std::int64_t*>(address_of(ledgers_.at(device)));
}

void DeviceCounts::prepare(std::int64_t steps, const RowOf& row_of) {
  for (Cohort& cohort : cohorts_) {
    std::vector<cuda::Row> rows;
    rows.reserve(static_cast<std::size_t>(steps));
    for (std::int64_t k = 1; k <= steps; ++k) {
      rows.push_back(as_row(row_of(cohort.group, cohort.count + k), cohort.count + k));
    }
    cohort.first = cohort.count + 1;
    cohort.prepared = steps;
    for (const auto& [device, place] : cohort.places) {
      const std::size_t bytes = rows.size() * sizeof(cuda::Row);
      py::object array = bytes_on(device, bytes);
      write(device, address_of(array), rows.data(), bytes);
      cohort.rows[device] = std::move(array);
    }
  }
  prepared_ = true;
}

bool DeviceCounts::fits(std::span<const std::size_t> stepped, std::span<const int> devices) const {
  if (devices.empty() || devices.front() != first_device_) return false;
  std::vector<std::size_t> members(cohorts_.size(), 0);
  for (const std::size_t i : stepped) ++members[cohort_of_[i]];
  for (std::size_t c = 0; c < cohorts_.size(); ++c) {
    if (members[c] != 0 && members[c] != cohorts_[c].members) return false;
  }
  return true;
}

void DeviceCounts::refresh() {
  const Counted counted = read();
  for (std::size_t i = 0; i < cohort_of_.size(); ++i) {
    Cohort& cohort = cohorts_[cohort_of_[i]];
    cohort.count = counted.counts[i];
    cohort.attempts = cohort.judged = 0;
  }
  skipped_ = counted.skipped;
  calls_ = 0;
  *feedback_ = static_cast<std::uint64_t>(skipped_) & 0xFFFFFFFFU;
}

void DeviceCounts::begin(Call& call, std::span<const std::size_t> stepped, std::span<const int> devices,
                         const RowOf& row_of) {
  if (unsure_ && !prepared_) refresh();
  unsure_ = true;
  // Counts between which a cohort's lies: whatever the device has said by now, the rest may have been skipped or not.
  struct Between {
    std::int64_t least, most;
  };
  const auto counts_of = [&](const Cohort& cohort) -> Between {
    const std::uint64_t said = said_by(feedback_);
    const auto known_calls = static_cast<std::int64_t>(said >> 32U);
    const std::int64_t skips = static_cast<std::uint32_t>(said) - static_cast<std::uint32_t>(skipped_);
    const std::int64_t now = cohort.count + cohort.attempts;
    // Skips of calls that another cohort was in, and not this one, are not its own.
    return {now - std::min(skips + calls_ - known_calls, cohort.judged), now - (cohort.judged == calls_ ? skips : 0)};
  };
  constexpr std::int64_t most_rows = 64;
  static_assert(most_rows <= cuda::kMostRows);
  std::vector<std::uint32_t> concerned;
  for (const std::size_t i : stepped) {
    if (std::ranges::find(concerned, cohort_of_[i]) == concerned.end()) concerned.push_back(cohort_of_[i]);
  }
  const bool too_many = !prepared_ && std::ranges::any_of(concerned, [&](std::uint32_t c) {
    const Between between = counts_of(cohorts_[c]);
    return between.most - between.least >= most_rows;
  });
  if (too_many) refresh();
  std::vector<std::size_t> first_row(cohorts_.size(), 0);
  std::vector<std::int64_t> row_count(cohorts_.size(), 0);
  call.rows.clear();
  for (const std::uint32_t c : concerned) {
    if (prepared_) continue;
    const Between between = counts_of(cohorts_[c]);
    first_row[c] = call.rows.size();
    row_count[c] = between.most - between.least + 1;
    for (std::int64_t t = between.least + 1; t <= between.most + 1; ++t) {
      call.rows.push_back(as_row(row_of(cohorts_[c].group, t), t));
    }
  }

  // One for each cohort and device.
  call.cohorts.clear();
  call.cohorts_of.clear();
  std::map<std::pair<std::uint32_t, int>, std::uint32_t> numbers;
  std::vector<int> shares;
  for (std::size_t k = 0; k < stepped.size(); ++k) {
    const int device = devices[k];
    if (std::ranges::find(shares, device) == shares.end()) shares.push_back(device);
    const std::uint32_t c = cohort_of_[stepped[k]];
    const auto [found, is_new] = numbers.try_emplace({c, device}, static_cast<std::uint32_t>(call.cohorts.size()));
    call.cohorts_of.push_back(found->second);
    if (!is_new) continue;
    Cohort& cohort = cohorts_[c];
    cuda::Cohort& one = call.cohorts.emplace_back();
    one.share = static_cast<std::size_t>(std::ranges::find(shares, device) - shares.begin());
    one.clock = ledger(device) + cohort.places.at(device);
    one.resident = prepared_;
    if (prepared_) {
      one.rows = reinterpret_cast<const cuda::Row*>(address_of(cohort.rows.at(device)));
      one.first = cohort.first;
      one.count = cohort.prepared;
    } else {
      one.rows = call.rows.data() + first_row[c];
      one.first = one.rows->t;
      one.count = row_count[c];
    }
    one.around = row_of(cohort.group, one.first).around;
  }
  call.deferred = {call.cohorts, call.cohorts_of, ledger(devices.front()), prepared_ ? nullptr : feedback_,
                   static_cast<std::uint64_t>(calls_ + 1)};
}

void DeviceCounts::done(std::span<const std::size_t> stepped, bool judged) {
  std::vector<bool> seen(cohorts_.size(), false);
  for (const std::size_t i : stepped) {
    if (seen[cohort_of_[i]]) continue;
    seen[cohort_of_[i]] = true;
    ++cohorts_[cohort_of_[i]].attempts;
    if (judged) ++cohorts_[cohort_of_[i]].judged;
  }
  if (judged) ++calls_;
  unsure_ = false;
}

void DeviceCounts::Counted::require_complete() const {
  if (left_out == 0) return;
  throw std::runtime_error(std::to_string(left_out) +
                           " captured steps ran beyond those that prepare_capture() was told of, and changed nothing; "
                           "call it again, with more");
}

std::vector<std::int64_t> DeviceCounts::read_ledger(int device) const {
  std::vector<std::int64_t> ledger(lengths_.at(device));
  const cuda::Place place = current_place(device);
  const std::int64_t* const from = this->ledger(device);
  without_interpreter_lock([&] {
    backend().synchronize(device);
    backend().copy(place, ledger.data(), from, ledger.size() * sizeof(std::int64_t));
    return true;
  });
  return ledger;
}

DeviceCounts::Counted DeviceCounts::read() const {
  std::map<int, std::vector<std::int64_t>> ledgers;
  for (const auto& [device, length] : lengths_) ledgers[device] = read_ledger(device);
  Counted counted{{}, ledgers.at(first_device_)[0], 0};  // judgements are counted there
  std::vector<std::int64_t> of_cohorts;
  for (const Cohort& cohort : cohorts_) {
    const auto& [device, place] = *cohort.places.begin();
    of_cohorts.push_back(ledgers.at(device)[place]);
    counted.left_out = std::max(counted.left_out, ledgers.at(device)[place + 1]);
  }
  for (const std::uint32_t c : cohort_of_) counted.counts.push_back(of_cohorts[c]);
  return counted;
}

}  // namespace onepass
