// The tensors of one step: read, validated as a whole, then updated. Nothing is written before all of it is known good.
#pragma once

#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "bindings/array_view.h"
#include "cpu/update.h"

namespace onepass {

// The streams of a tensor, as numbers: the parameter, its gradient, then its slots.
enum Stream : std::size_t { kParam = 0, kGrad = 1, kFirstSlot = 2 };

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
  bool checked[DTypes::size];
};

class Batch {
 public:
  void clear();

  // Takes note of a tensor, whose objects the caller keeps alive; `index` is what Naming is asked with. A null `grad`
  // or `setting` validates the rest alone.
  void add(const Kernel& kernel, py::handle param, py::handle grad, const py::object* slots, Setting* setting,
           std::size_t index);

  // Reads all arrays and judges them: each for itself, against its parameter, and that no array that is written shares
  // memory with another one. Throws before anything is written.
  void validate(const Naming& naming);

  // Releases the interpreter lock while it runs.
  Isa run() const;

 private:
  struct Entry {
    const Kernel* kernel;
    py::handle param, grad;
    const py::object* slots;
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
  ArrayView view(py::handle object);
  static void note(std::vector<Interval>& intervals, const ArrayView& view, std::uint32_t tensor, std::size_t stream);
  void read(const Entry& entry, const Naming& naming);
  void require_disjoint(const Naming& naming);
  void sort_written(const Naming& naming);
  const Interval* first_written_in(const MemoryRange& range) const;
  void compare_gradient(const Interval& grad, const Naming& naming, bool& judged_by_element) const;

  std::vector<Entry> entries_;
  std::vector<Tensor> tensors_;  // of the entries, in their order
  std::unordered_map<PyObject*, ArrayView> foreign_;
  std::deque<Walk> walks_;
  Keeper keeper_;

  // Every step reads all addresses anew, and compares them with those of the last step that passed: what has not moved
  // need not be sorted again (1000 tensors of Adam: 30 us of a step of 300).
  std::vector<Interval> written_, grads_;
  std::vector<Interval> sorted_;
  std::vector<MemoryRange> passed_written_, passed_grads_;
};

}  // namespace onepass
