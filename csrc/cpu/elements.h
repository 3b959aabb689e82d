// What the loops of the CPU over the elements of a tensor share: which lanes of a vector count, where a loop begins.
// Part of a kernel unit, behind its instruction set's header.
#pragma once

#include "core/elements.h"

namespace onepass {
namespace {

// How many elements to take first so that wide stores do not straddle cache lines. Large NumPy arrays start 16 bytes
// behind a line; aligned, AVX-512 takes 12 % less for Adam over 4000 floats, 30 % less for SGD.
HD std::size_t head_of(const void* param, std::size_t count, std::size_t itemsize, std::size_t alignment) {
  constexpr std::size_t worth_it = 1024;
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(param) % alignment;
  if (count < worth_it || misaligned % itemsize != 0) return 0;
  return (alignment - misaligned) % alignment / itemsize;
}

struct FirstLanes {
  std::size_t count;
  template <class D, class V>
  HD V load(const std::byte* from) const {
    return V::template load_part<D>(from, count);
  }
  template <class D, class V>
  HD void store(V value, std::byte* to) const {
    value.template store_part<D>(to, count);
  }
  template <class D, class V>
  HD void store_nearest(V value, std::byte* to) const {
    value.template store_nearest_part<D>(to, count);
  }
  template <class V>
  HD V join(const std::byte* high, const std::byte* low) const {
    return V::join_part(high, low, count);
  }
  template <class V>
  HD void split(V value, std::byte* high, std::byte* low) const {
    value.split_part(high, low, count);
  }
};

template <class S>
HD Surroundings<S> surroundings_of(const Part& part) {
  Surroundings<S> around(*part.around);
  around.set_scale(part.around->scaling, part.clip, part.streams.data[kAccumulator] != nullptr);
  return around;
}

// Whole vectors begin before it.
template <class V>
HD std::size_t end_of_whole(std::size_t count) {
  return count < V::lanes ? 0 : count - V::lanes + 1;
}

// Calls visit(first element, lanes) for a few elements up to where the parameter is aligned, then for whole vectors,
// then for the rest.
template <class V, class Visit>
HD void for_each_vector(const void* param, std::size_t itemsize, std::size_t count, Visit visit) {
  std::size_t i = head_of(param, count, itemsize, V::lanes * itemsize);
  if (i > 0) visit(std::size_t{0}, FirstLanes{i});
  const std::size_t end = end_of_whole<V>(count);
  for (; i < end; i += V::lanes) visit(i, AllLanes{});
  if (i < count) visit(i, FirstLanes{count - i});
}

}  // namespace
}  // namespace onepass
