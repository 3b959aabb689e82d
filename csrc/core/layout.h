// Walking arrays whose elements lie in different orders in memory.
//
// A parameter is dense, so it is updated in the order of its memory, whatever its axes are. An array of the same shape
// with other strides is visited in that same order: element k of the walk belongs to element k of the parameter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace onepass {

struct Axis {
  std::size_t length;
  std::ptrdiff_t stride;  // bytes, of the array that is walked
};

// The axes of `strides` in the memory order of a dense array (`dense_strides`), slowest first, neighbours merged where
// one step serves for both. Empty for an array of one element.
std::vector<Axis> walk_axes(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> dense_strides,
                            std::span<const std::ptrdiff_t> strides);

// True if the strides, those of axes of length 1 aside, are a permutation of contiguous ones.
bool is_dense(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> strides, std::size_t itemsize);

// True unless strides alone show that no two elements share memory.
bool repeats(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> strides, std::size_t itemsize);

// True if element by element both lie in the same order, of items of these sizes. Axes of length 1 do not count.
bool same_order(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> a, std::size_t itemsize_a,
                std::span<const std::ptrdiff_t> b, std::size_t itemsize_b);

// Calls visit(byte offset of the run's first element, elements in the run, stride in bytes) for elements
// [begin, begin + count) of the walk.
template <class Visit>
void for_each_run(std::span<const Axis> axes, std::size_t begin, std::size_t count, Visit visit) {
  if (axes.empty()) {
    if (count > 0) visit(std::ptrdiff_t{0}, count, std::ptrdiff_t{0});
    return;
  }
  const Axis inner = axes.back();
  while (count > 0) {
    std::size_t index = begin;
    const std::size_t start = index % inner.length;
    std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(start) * inner.stride;
    index /= inner.length;
    for (std::size_t a = axes.size() - 1; a-- > 0;) {
      offset += static_cast<std::ptrdiff_t>(index % axes[a].length) * axes[a].stride;
      index /= axes[a].length;
    }
    const std::size_t run = inner.length - start < count ? inner.length - start : count;
    visit(offset, run, inner.stride);
    begin += run;
    count -= run;
  }
}

// Copies elements [begin, begin + count) of the walk over `base` into a contiguous buffer, or back.
void gather(std::span<const Axis> axes, const void* base, std::size_t itemsize, std::size_t begin, std::size_t count,
            void* buffer);
void scatter(std::span<const Axis> axes, void* base, std::size_t itemsize, std::size_t begin, std::size_t count,
             const void* buffer);

}  // namespace onepass
