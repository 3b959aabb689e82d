// Which elements the threads of a CUDA device work on (cuda/partition.h), tried on the host: over awkward tables each
// element is visited once and only once, and what is searched or computed in closed form is what trying all of it
// finds.
#include "cuda/partition.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <vector>

namespace {

using namespace onepass;
using namespace onepass::cuda;

std::size_t failures = 0;

void check(bool holds, const char* what, std::uint64_t a, std::uint64_t b = 0, std::uint64_t c = 0) {
  if (holds) return;
  ++failures;
  if (failures < 50) {
    std::printf("%s (%llu, %llu, %llu)\n", what, static_cast<unsigned long long>(a), static_cast<unsigned long long>(b),
                static_cast<unsigned long long>(c));
  }
}

// What a block of a tensor visits: visit(first element, how many, as a vector).
template <unsigned lanes, class Visit>
void visit_block(std::uint64_t count, std::uint8_t head, std::uint64_t block, Visit visit) {
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    if (head == kInGroups) {
      for_groups(count, block, thread, [&](std::uint64_t group, unsigned lane) {
        check(lane < kGroupLanes, "a lane that no group has", lane, group, count);
        for (unsigned k = 0; k < kElementsOfLane; ++k) {
          const std::uint64_t element = element_of(group, lane, k);
          check(element / kRandomGroup == group && element % kGroupLanes == lane, "an element of another group or lane",
                element, group, lane);
          if (element < count) visit(element, 1U, false);
        }
      });
    } else {
      for_vectors<lanes>(
          count, head, block, thread, [&](std::uint64_t first) { visit(first, lanes, true); },
          [&](std::uint64_t element) { visit(element, 1U, false); });
    }
  }
}

struct Tensor {
  std::uint64_t count;
  std::uint8_t head;
};

// A launch: block after block, each finds its tensor by search.
template <unsigned lanes>
void visit_table(const std::vector<Tensor>& tensors) {
  std::vector<std::uint32_t> first_blocks;
  std::uint32_t blocks = 0;
  for (const Tensor& tensor : tensors) {
    first_blocks.push_back(blocks);
    blocks += static_cast<std::uint32_t>(blocks_for(tensor.count, tensor.head, lanes));
  }
  std::vector<std::vector<unsigned char>> visits;
  for (const Tensor& tensor : tensors) visits.emplace_back(tensor.count, 0);
  std::uint32_t expected = 0;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    if (expected + 1 < tensors.size() && block == first_blocks[expected + 1]) ++expected;
    const std::uint32_t found = entry_of(block, static_cast<std::uint32_t>(tensors.size()),
                                         [&](std::uint32_t entry) { return first_blocks[entry]; });
    check(found == expected, "another tensor than the block's", found, expected, block);
    if (found >= tensors.size()) continue;
    const auto [count, head] = tensors[found];
    visit_block<lanes>(count, head, block - first_blocks[found], [&](std::uint64_t first, unsigned many, bool vector) {
      check(first < count && many <= count - first, "behind the tensor's end", first, many, count);
      check(!vector || (first >= head && (first - head) % lanes == 0), "a vector that begins anywhere", first, head);
      for (std::uint64_t k = first; k < std::min(first + many, count); ++k) ++visits[found][k];
    });
  }
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    for (std::uint64_t element = 0; element < tensors[k].count; ++element) {
      check(visits[k][element] == 1, "visited another number of times than once", element, tensors[k].count,
            tensors[k].head);
    }
  }
}

template <unsigned lanes>
void try_tables() {
  std::vector<std::uint64_t> counts;
  for (std::uint64_t count = 0; count < 40; ++count) counts.push_back(count);
  for (const std::uint64_t middle :
       {std::uint64_t{kRandomGroup}, std::uint64_t{kThreads}, kVectorsOfBlock, kVectorsOfBlock * lanes,
        2 * kVectorsOfBlock * lanes, 5 * kVectorsOfBlock * lanes, kThreads * std::uint64_t{lanes}, std::uint64_t{4096},
        kRandomGroup * kGroupsOfBlock, 3 * kRandomGroup * kGroupsOfBlock, std::uint64_t{100'000}}) {
    for (std::uint64_t count = middle - 9; count <= middle + 9; ++count) counts.push_back(count);
  }
  // Each count with each head, alone and side by side with all others, in order and shuffled.
  std::vector<Tensor> tensors;
  for (const std::uint64_t count : counts) {
    for (std::uint8_t head = 0; head < lanes && head <= count; ++head) tensors.push_back({count, head});
    tensors.push_back({count, kInGroups});
  }
  for (const Tensor& tensor : tensors) visit_table<lanes>({tensor});
  visit_table<lanes>(tensors);
  std::ranges::shuffle(tensors, std::mt19937(lanes));
  visit_table<lanes>(tensors);
  visit_table<lanes>(std::vector<Tensor>(700, {0, 0}));
  visit_table<lanes>(std::vector<Tensor>(700, {1, kInGroups}));
}

// Counts beyond 32 bits: what some blocks visit, in closed form.
template <unsigned lanes>
void try_large(std::uint64_t count, std::uint8_t head) {
  const bool grouped = head == kInGroups;
  const std::uint64_t before = grouped ? 0 : head;
  const std::uint64_t of_block = grouped ? kRandomGroup * kGroupsOfBlock : kVectorsOfBlock * lanes;
  const std::uint64_t in_blocks = grouped ? count : (count - before) / lanes * lanes;
  const std::uint64_t blocks = blocks_for(count, head, lanes);
  check((blocks - 1) * of_block < in_blocks && blocks * of_block >= in_blocks, "blocks too many or too few", blocks,
        count, head);
  check(blocks < 1U << 31U, "more blocks than a grid has", blocks, count, head);
  for (const std::uint64_t block : {std::uint64_t{0}, blocks / 2, blocks - 1}) {
    const std::uint64_t begin = before + block * of_block;
    const std::uint64_t end = before + std::min((block + 1) * of_block, in_blocks);
    std::vector<unsigned char> inside(end - begin, 0);
    std::vector<unsigned char> ends(count - in_blocks, 0);  // the loose ones, which the first has
    visit_block<lanes>(count, head, block, [&](std::uint64_t first, unsigned many, bool /*vector*/) {
      for (std::uint64_t k = first; k < first + many; ++k) {
        if (k >= begin && k < end) {
          ++inside[k - begin];
        } else {
          const std::uint64_t end_of_all = before + in_blocks;
          const bool loose = k < before || (k >= end_of_all && k < count);
          check(loose, "an element of another block", k, block, count);
          if (loose) ++ends[k < before ? k : k - in_blocks];
        }
      }
    });
    const auto all = [](const std::vector<unsigned char>& visits, unsigned char times) {
      return std::ranges::all_of(visits, [&](unsigned char visit) { return visit == times; });
    };
    check(all(inside, 1), "of a block beyond 32 bits, not each element once", block, count, head);
    check(all(ends, block == 0 ? 1 : 0), "loose ends, not once or not by the first block", block, count, head);
  }
}

template <unsigned lanes>
void try_all_large() {
  for (const std::uint64_t power : {32U, 33U, 38U, 40U}) {
    for (std::uint64_t count = (std::uint64_t{1} << power) - 5; count <= (std::uint64_t{1} << power) + 17; ++count) {
      for (std::uint8_t head = 0; head < lanes; ++head) try_large<lanes>(count, head);
      try_large<lanes>(count, kInGroups);
    }
  }
}

// --- Where vectors begin ---------------------------------------------------------------------------------------------

void try_heads() {
  std::mt19937_64 random(1);
  const auto below = [&](std::uint64_t end) { return random() % end; };
  std::size_t with_head = 0;
  for (std::size_t trial = 0; trial < 400'000; ++trial) {
    const unsigned lanes = 1U << below(4);
    const std::size_t count = 1 + below(8);
    // Addresses of arrays that all begin `common` elements before a vector, or, one time in four, anywhere.
    const std::uint64_t common = below(lanes);
    const std::uint64_t elements = below(20);
    std::uintptr_t addresses[8];
    std::size_t itemsizes[8];
    for (std::size_t k = 0; k < count; ++k) {
      itemsizes[k] = std::size_t{2} << below(3);
      addresses[k] = (std::uintptr_t{1} << 40U) + 64 * below(100) - common * itemsizes[k];
      if (below(4 * count) == 0) addresses[k] += below(32);
    }
    std::uint8_t expected = kInGroups;
    for (unsigned head = lanes; head-- > 0;) {
      if (head > elements) continue;
      bool aligned = true;
      for (std::size_t k = 0; k < count; ++k) {
        const std::uintptr_t alignment = std::min<std::uintptr_t>(16, lanes * itemsizes[k]);
        aligned = aligned && ((addresses[k] + head * itemsizes[k]) & (alignment - 1)) == 0;
      }
      if (aligned) expected = static_cast<std::uint8_t>(head);
    }
    const std::uint8_t found = head_of(addresses, itemsizes, count, lanes, elements);
    check(found == expected, "another head than the first that aligns all", found, expected, lanes);
    if (found != 0 && found != kInGroups) ++with_head;
  }
  check(with_head > 50'000, "too few trials that have a head", with_head);
}

// --- Arrays in another order -----------------------------------------------------------------------------------------

void try_strides(const std::vector<std::uint64_t>& lengths, const std::vector<std::int64_t>& steps) {
  Strides strides{};
  strides.axes = static_cast<std::uint32_t>(lengths.size());
  std::uint64_t count = 1;
  for (std::size_t a = 0; a < lengths.size(); ++a) {
    strides.length[a] = lengths[a];
    strides.stride[a] = steps[a];
    count *= lengths[a];
  }
  // As nested loops go.
  std::vector<std::uint64_t> position(lengths.size(), 0);
  std::int64_t offset = 0;
  for (std::uint64_t index = 0; index < count; ++index) {
    check(offset_of(strides, index) == offset, "another place than nested loops come to", index, count, lengths.size());
    for (std::size_t a = lengths.size(); a-- > 0;) {
      offset += steps[a];
      if (++position[a] < lengths[a]) break;
      offset -= static_cast<std::int64_t>(lengths[a]) * steps[a];
      position[a] = 0;
    }
  }
}

void try_all_strides() {
  try_strides({}, {});
  try_strides({1}, {4});
  try_strides({7}, {-12});
  try_strides({3, 1, 5}, {20, 999, -4});
  try_strides({2, 3, 4, 5}, {1, 2, 6, 24});
  try_strides({4, 3}, {0, 8});
  std::mt19937_64 random(2);
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<std::uint64_t> lengths(random() % 7);
    std::vector<std::int64_t> steps(lengths.size());
    for (std::uint64_t& length : lengths) length = 1 + random() % 6;
    for (std::int64_t& step : steps) step = static_cast<std::int64_t>(random() % 4001) - 2000;
    try_strides(lengths, steps);
  }
  try_strides(std::vector<std::uint64_t>(kMaxAxes, 1), std::vector<std::int64_t>(kMaxAxes, 3));

  // Beyond 32 bits: of elements, and of bytes.
  Strides large{};
  large.axes = 3;
  const std::uint64_t lengths[] = {5, 3'000'000'000, 7};
  const std::int64_t steps[] = {-(std::int64_t{1} << 44U), 2, 6'000'000'000};
  std::copy(std::begin(lengths), std::end(lengths), large.length);
  std::copy(std::begin(steps), std::end(steps), large.stride);
  for (int trial = 0; trial < 10'000; ++trial) {
    const std::uint64_t a = random() % lengths[0];
    const std::uint64_t b = random() % lengths[1];
    const std::uint64_t c = random() % lengths[2];
    const std::int64_t expected = static_cast<std::int64_t>(a) * steps[0] + static_cast<std::int64_t>(b) * steps[1] +
                                  static_cast<std::int64_t>(c) * steps[2];
    check(offset_of(large, (a * lengths[1] + b) * lengths[2] + c) == expected, "another place, beyond 32 bits", a, b,
          c);
  }
}

template <unsigned... lanes>
void try_vectors() {
  ((try_tables<lanes>(), try_all_large<lanes>()), ...);
}

}  // namespace

int main() {
  try_vectors<1, 2, 4, 8>();
  try_heads();
  try_all_strides();
  std::printf("%zu failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
