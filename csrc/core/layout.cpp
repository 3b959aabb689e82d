#include "core/layout.h"

#include <algorithm>

namespace onepass {
namespace {

template <class Item>
void copy_run(const std::byte* from, std::ptrdiff_t from_stride, std::byte* to, std::ptrdiff_t to_stride,
              std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) {
    Item item;
    std::memcpy(&item, from, sizeof item);  // any alignment
    std::memcpy(to, &item, sizeof item);
    from += from_stride;
    to += to_stride;
  }
}

void copy_items(const std::byte* from, std::ptrdiff_t from_stride, std::byte* to, std::ptrdiff_t to_stride,
                std::size_t count, std::size_t itemsize) {
  switch (itemsize) {
    case 2:
      return copy_run<std::uint16_t>(from, from_stride, to, to_stride, count);
    case 4:
      return copy_run<std::uint32_t>(from, from_stride, to, to_stride, count);
    default:
      return copy_run<std::uint64_t>(from, from_stride, to, to_stride, count);
  }
}

}  // namespace

std::vector<Axis> walk_axes(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> dense_strides,
                            std::span<const std::ptrdiff_t> strides) {
  std::vector<std::size_t> order;
  for (std::size_t a = 0; a < shape.size(); ++a) {
    if (shape[a] != 1) order.push_back(a);
  }
  std::ranges::sort(order, [&](std::size_t a, std::size_t b) { return dense_strides[a] > dense_strides[b]; });
  std::vector<Axis> axes;
  for (const std::size_t a : order) {
    const Axis axis{static_cast<std::size_t>(shape[a]), strides[a]};
    if (!axes.empty() && axes.back().stride == axis.stride * static_cast<std::ptrdiff_t>(axis.length)) {
      axes.back() = {axes.back().length * axis.length, axis.stride};
    } else {
      axes.push_back(axis);
    }
  }
  return axes;
}

bool is_dense(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> strides, std::size_t itemsize) {
  // C order, and Fortran order for a matrix, are nearly all there is: look before sorting.
  auto expected = static_cast<std::ptrdiff_t>(itemsize);
  bool c_order = true;
  for (std::size_t a = shape.size(); a-- > 0;) {
    if (shape[a] == 0) return true;
    if (shape[a] != 1 && strides[a] != expected) c_order = false;
    expected *= shape[a];
  }
  if (c_order) return true;
  const std::ptrdiff_t total = expected;
  auto reached = static_cast<std::ptrdiff_t>(itemsize);
  while (reached < total) {
    const std::ptrdiff_t before = reached;
    for (std::size_t a = 0; a < shape.size(); ++a) {
      if (shape[a] != 1 && strides[a] == reached) {
        reached *= shape[a];
        break;
      }
    }
    if (reached == before) return false;
  }
  return true;
}

bool repeats(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> strides, std::size_t itemsize) {
  if (is_dense(shape, strides, itemsize)) return false;  // nearly always, and without asking for memory
  std::vector<std::size_t> axes;
  for (std::size_t k = 0; k < shape.size(); ++k) {
    if (shape[k] == 0) return false;
    if (shape[k] > 1) axes.push_back(k);
  }
  const auto step = [&](std::size_t k) { return strides[k] < 0 ? -strides[k] : strides[k]; };
  std::ranges::sort(axes, {}, step);
  auto extent = static_cast<std::ptrdiff_t>(itemsize);  // of the elements along the axes so far
  for (const std::size_t k : axes) {
    if (step(k) < extent) return true;
    extent += (shape[k] - 1) * step(k);
  }
  return false;
}

bool same_order(std::span<const std::ptrdiff_t> shape, std::span<const std::ptrdiff_t> a, std::size_t itemsize_a,
                std::span<const std::ptrdiff_t> b, std::size_t itemsize_b) {
  const auto size_a = static_cast<std::ptrdiff_t>(itemsize_a);
  const auto size_b = static_cast<std::ptrdiff_t>(itemsize_b);
  for (std::size_t k = 0; k < shape.size(); ++k) {
    if (shape[k] != 1 && a[k] * size_b != b[k] * size_a) return false;
  }
  return true;
}

void gather(std::span<const Axis> axes, const void* base, std::size_t itemsize, std::size_t begin, std::size_t count,
            void* buffer) {
  auto* to = static_cast<std::byte*>(buffer);
  for_each_run(axes, begin, count, [&](std::ptrdiff_t offset, std::size_t run, std::ptrdiff_t stride) {
    copy_items(static_cast<const std::byte*>(base) + offset, stride, to, static_cast<std::ptrdiff_t>(itemsize), run,
               itemsize);
    to += run * itemsize;
  });
}

void scatter(std::span<const Axis> axes, void* base, std::size_t itemsize, std::size_t begin, std::size_t count,
             const void* buffer) {
  const auto* from = static_cast<const std::byte*>(buffer);
  for_each_run(axes, begin, count, [&](std::ptrdiff_t offset, std::size_t run, std::ptrdiff_t stride) {
    copy_items(from, static_cast<std::ptrdiff_t>(itemsize), static_cast<std::byte*>(base) + offset, stride, run,
               itemsize);
    from += run * itemsize;
  });
}

}  // namespace onepass
