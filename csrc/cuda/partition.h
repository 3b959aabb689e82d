// Which elements a thread works on: from block to tensor to element, the loose ends before and behind whole vectors,
// the groups of random numbers. Plain functions, which the tests run on the host for every element.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/philox.h"
#include "core/target.h"

namespace onepass::cuda {

inline constexpr unsigned kThreads = 256;
inline constexpr unsigned kVectorsOfThread = 4;
inline constexpr std::uint64_t kVectorsOfBlock = std::uint64_t{kThreads} * kVectorsOfThread;

// Elements whose random numbers are made together, in 16 lanes: a thread has every 16th of them. What is not aligned to
// vectors is worked on in the same way.
inline constexpr unsigned kGroupLanes = 16;
inline constexpr unsigned kElementsOfLane = kRandomGroup / kGroupLanes;
inline constexpr std::uint64_t kGroupsOfBlock = std::uint64_t{kThreads} / kGroupLanes * 2;

// How a tensor is worked on: in vectors that begin behind `head` elements, or in groups.
inline constexpr std::uint8_t kInGroups = 255;

constexpr std::uint64_t divide_up(std::uint64_t a, std::uint64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// Blocks for a tensor; at least one. `lanes`: elements of a vector.
constexpr std::uint64_t blocks_for(std::uint64_t count, std::uint8_t head, unsigned lanes) {
  const std::uint64_t blocks = head == kInGroups ? divide_up(count, kRandomGroup * kGroupsOfBlock)
                                                 : divide_up((count - head) / lanes, kVectorsOfBlock);
  return blocks == 0 ? 1 : blocks;
}

// The last of `count` entries that begins at `block` or before it. `first`: from an entry to its first block; that of
// entry 0 is 0, and they rise.
template <class First>
HD std::uint32_t entry_of(std::uint32_t block, std::uint32_t count, First first) {
  std::uint32_t low = 0;
  std::uint32_t high = count;
  while (high - low > 1) {
    const std::uint32_t middle = low + (high - low) / 2;
    if (first(middle) <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls vector(first element) for the vectors of a thread, and single(element) for the loose ends, which the first
// block has.
template <unsigned lanes, class Vector, class Single>
HD void for_vectors(std::uint64_t count, std::uint8_t head, std::uint64_t block, unsigned thread, Vector vector,
                    Single single) {
  const std::uint64_t vectors = (count - head) / lanes;
  const std::uint64_t behind = (block + 1) * kVectorsOfBlock;
  const std::uint64_t end = behind < vectors ? behind : vectors;
  for (std::uint64_t v = block * kVectorsOfBlock + thread; v < end; v += kThreads) vector(head + v * lanes);
  if (block != 0) return;
  const std::uint64_t tail = head + vectors * lanes;
  if (thread < head) {
    single(std::uint64_t{thread});
  } else if (tail + (thread - head) < count) {
    single(tail + (thread - head));
  }
}

// Calls visit(group, lane) for the groups of a thread. Its elements are those of element_of() that are below `count`.
template <class Visit>
HD void for_groups(std::uint64_t count, std::uint64_t block, unsigned thread, Visit visit) {
  const std::uint64_t groups = (count + kRandomGroup - 1) / kRandomGroup;
  const std::uint64_t behind = (block + 1) * kGroupsOfBlock;
  const std::uint64_t end = behind < groups ? behind : groups;
  for (std::uint64_t g = block * kGroupsOfBlock + thread / kGroupLanes; g < end; g += kThreads / kGroupLanes) {
    visit(g, thread % kGroupLanes);
  }
}

// The k-th element of a lane.
HD std::uint64_t element_of(std::uint64_t group, unsigned lane, unsigned k) {
  return group * kRandomGroup + std::uint64_t{k} * kGroupLanes + lane;
}

// Where vectors begin: the number of elements after which all of `count` addresses are aligned to a vector, or to 16
// bytes of it; kInGroups if there is none.
constexpr std::uint8_t head_of(const std::uintptr_t* addresses, const std::size_t* itemsizes, std::size_t count,
                               unsigned lanes, std::uint64_t elements) {
  for (std::uint8_t head = 0; head < lanes && head <= elements; ++head) {
    bool aligned = true;
    for (std::size_t k = 0; k < count; ++k) {
      const std::size_t vector = lanes * itemsizes[k];
      if ((addresses[k] + head * itemsizes[k]) % (vector < 16 ? vector : 16) != 0) aligned = false;
    }
    if (aligned) return head;
  }
  return kInGroups;
}

// --- Arrays in another order, or at odd addresses: they are copied into order and back -------------------------------

inline constexpr std::size_t kMaxAxes = 64;

struct Strides {
  std::uint32_t axes;
  std::uint64_t length[kMaxAxes];
  std::int64_t stride[kMaxAxes];  // bytes
};

// Where element `index` of a walk lies, in bytes.
HD std::int64_t offset_of(const Strides& strides, std::uint64_t index) {
  std::int64_t offset = 0;
  for (std::uint32_t a = strides.axes; a-- > 0;) {
    offset += static_cast<std::int64_t>(index % strides.length[a]) * strides.stride[a];
    index /= strides.length[a];
  }
  return offset;
}

}  // namespace onepass::cuda
