// Dividing a list of tensors of unequal size into contiguous parts of equal traffic.
//
// An element's arithmetic does not depend on the part that it falls into: parts decide speed and never bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace onepass {

inline constexpr std::size_t kCacheLine = 64;

struct Extent {
  std::uintptr_t address;  // of the parameter: the array at whose cache lines a tensor may be cut
  std::size_t itemsize;
  std::size_t count;  // elements
  std::size_t end;    // bytes of traffic of this tensor and all before it: the last one's is the total
};

// The position of byte `target` of the total traffic: a tensor and an element of it, on a cache line of the parameter
// (where that is aligned to its items), so that no two threads write one line of it.
struct Cut {
  std::size_t tensor;
  std::size_t element;
};

inline Cut cut_at(std::span<const Extent> extents, std::size_t target) {
  const auto found = std::ranges::upper_bound(extents, target, {}, &Extent::end);
  if (found == extents.end()) return {extents.size(), 0};
  const auto tensor = static_cast<std::size_t>(found - extents.begin());
  const std::size_t start = tensor == 0 ? 0 : extents[tensor - 1].end;
  const std::size_t per_element = (found->end - start) / found->count;
  const std::size_t element = (target - start) / per_element;
  const std::size_t misaligned = (found->address + element * found->itemsize) % kCacheLine / found->itemsize;
  return {tensor, element - std::min(element, misaligned)};
}

// Calls visit(tensor, first element, element count) for all that belongs to part `part` of `parts`.
template <class Visit>
void for_each_in_part(std::span<const Extent> extents, std::size_t part, std::size_t parts, Visit visit) {
  if (extents.empty()) return;
  // floor(total * k / parts), without the product's overflow.
  const std::size_t total = extents.back().end;
  const auto boundary = [&](std::size_t k) { return total / parts * k + total % parts * k / parts; };
  const Cut begin = part == 0 ? Cut{0, 0} : cut_at(extents, boundary(part));
  const Cut end = part + 1 == parts ? Cut{extents.size(), 0} : cut_at(extents, boundary(part + 1));
  for (std::size_t t = begin.tensor; t < extents.size() && t <= end.tensor; ++t) {
    const std::size_t first = t == begin.tensor ? begin.element : 0;
    const std::size_t last = t == end.tensor ? end.element : extents[t].count;
    if (first < last) visit(t, first, last - first);
  }
}

}  // namespace onepass
