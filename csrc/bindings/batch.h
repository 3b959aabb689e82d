// The tensors of one step: read, validated as a whole, then updated. Nothing is written before all of it is known good.
#pragma once

#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "bindings/array_view.h"
#include "cpu/update.h"

namespace onepass {

// What arguments are called in messages. Asked only when something is wrong.
class Naming {
 public:
  virtual std::string name(std::size_t index, std::size_t stream) const = 0;

 protected:
  Naming() = default;
  Naming(const Naming&) = default;
  Naming& operator=(const Naming&) = default;
  ~Naming() = default;
};

// A rule's coefficients and surroundings for some of the tensors of a step.
struct Setting {
  double coefficients[kMaxCoefficients];
  Around around;
  std::uint64_t t;
  double unit_limit;               // 0: none
  std::vector<std::int64_t> axes;  // along which a unit's weights lie
  bool checked[ComputeTypes::size];
};

// The objects of one tensor, which the caller keeps alive; null for streams that it does not have.
struct Arrays {
  py::handle stream[kStreams];
};

class Batch {
 public:
  void clear();

  // Takes note of a tensor; `index` is what Naming is asked with, and what random numbers depend on. Without a
  // gradient or a setting the rest is validated alone.
  void add(const Kernel& kernel, const Arrays& arrays, Setting* setting, std::size_t index);

  // Arrays that this step neither reads nor writes, and that nothing which it writes may meet. After all add()s.
  void leave_alone(const Arrays& arrays, std::size_t index);

  // How tensors are stored, and gradients are left, in this step.
  std::uint64_t seed = 0;
  bool stochastic = false;
  bool zero_grads = false;

  // Reads all arrays and judges them: each for itself, against its parameter, and that no array that is written shares
  // memory with another one. Throws before anything is written.
  void validate(const Naming& naming);

  // New settings for the tensors of a batch that was validated before, if it is_fixed(). As add() and validate() would.
  void renew(std::span<Setting* const> settings, const Naming& naming);
  // Whether all arrays are CuPy's: those do not move.
  bool is_fixed() const { return is_fixed_; }

  std::vector<Tensor>& tensors() { return tensors_; }  // as validated, in the order in which they were added
  // Where each tensor lies: on the host all of them, or on CUDA devices all of them.
  std::span<const int> devices() const { return devices_; }
  bool on_host() const { return devices_.empty() || devices_.front() == kHost; }
  std::size_t index(std::size_t tensor) const { return entries_[tensor].index; }

  // The passes over tensors on the host (update.h). They release the interpreter lock while they run.
  Isa run() const;
  std::span<const Squares> measure();
  void accumulate() const;
  void zero_gradients() const;
  void exchange() const;
  void show() const;

 private:
  struct Entry {
    const Kernel* kernel;  // null: left alone
    Arrays arrays;
    Setting* setting;
    std::size_t index;
  };

  struct Interval {
    MemoryRange range;
    std::uint32_t tensor;  // position in this batch
    std::uint32_t stream;
  };

  std::string name(const Interval& interval, const Naming& naming) const {
    return naming.name(entries_[interval.tensor].index, interval.stream);
  }
  void export_foreign(const Naming& naming);
  ArrayView view(py::handle object, std::size_t stream);
  static void note(std::vector<Interval>& intervals, const ArrayView& view, std::uint32_t tensor, std::size_t stream);
  void read(const Entry& entry, const Naming& naming);
  void note_alone(const Entry& entry, std::size_t position, const Naming& naming);
  void require_disjoint(const Naming& naming);
  void sort_written(const Naming& naming);
  const Interval* first_written_in(const MemoryRange& range) const;
  void compare_gradient(const Interval& grad, const Naming& naming, bool& judged_by_element) const;

  std::vector<Entry> entries_;
  std::vector<Tensor> tensors_;  // of the entries, in their order
  std::vector<int> devices_;     // of the tensors
  bool is_fixed_ = false;
  std::unordered_map<PyObject*, ArrayView> foreign_;
  std::deque<Walk> walks_;
  std::deque<Units> units_;
  std::vector<Squares> sums_;
  Keeper keeper_;

  // Every step reads all addresses anew, and compares them with those of the last step that passed: what has not moved
  // need not be sorted again (1000 tensors of Adam: 30 us of a step of 300).
  std::vector<Interval> written_, grads_;
  std::vector<Interval> sorted_;
  std::vector<MemoryRange> passed_written_, passed_grads_;
};

}  // namespace onepass
