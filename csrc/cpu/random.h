// The random numbers of consecutive elements, as vectors of the instruction set make them (core/philox.h). Part of a
// kernel unit, behind its instruction set's header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kernel.h"
#include "core/philox.h"
#include "core/target.h"
#include "cpu/elements.h"

namespace onepass {
namespace {

// Lane l of vector k of the words of a group belongs to counter 16 * group + l.
constexpr std::size_t kCounters = 16;

using Floats = Wide<float>;
using Integers = Floats::Integers;
static_assert(WideWords::lanes * WideWords::parts == Floats::lanes);

// As many lanes for Philox as hide its latency: ten products, each of which waits for the one before.
template <std::size_t n>
struct Lanes {
  WideWords word[n];
  Lanes() = default;
  HD explicit Lanes(std::uint64_t x) {
    for (std::size_t k = 0; k < n; ++k) word[k] = WideWords(x);
  }
  HD friend Lanes operator^(Lanes a, Lanes b) {
    Lanes result;
    for (std::size_t k = 0; k < n; ++k) result.word[k] = a.word[k] ^ b.word[k];
    return result;
  }
  HD friend Lanes multiply(Lanes a, std::uint32_t x) {
    Lanes result;
    for (std::size_t k = 0; k < n; ++k) result.word[k] = multiply(a.word[k], x);
    return result;
  }
  HD friend Lanes upper(Lanes a) {
    Lanes result;
    for (std::size_t k = 0; k < n; ++k) result.word[k] = upper(a.word[k]);
    return result;
  }
};

// Groups whose numbers are made side by side, where a vector has all lanes of one: more would not fit into registers.
constexpr std::size_t kSideBySide = Floats::lanes == kCounters ? 2 : 1;

// Calls visit(which group, first lane, the four words of Floats::lanes counters) until `groups` of them are complete.
template <std::size_t groups, class Visit>
HD void for_each_counter(const RandomKey& key, const PhiloxKeys& keys, std::uint64_t first_group, Visit visit) {
  constexpr std::size_t parts = WideWords::parts;
  static_assert(groups % kSideBySide == 0);
  const CounterTail tail = counter_tail(key, first_group * kCounters);
  for (std::size_t g = 0; g < groups; g += kSideBySide) {
    for (std::size_t lane = 0; lane < kCounters; lane += Floats::lanes) {
      using L = Lanes<kSideBySide * parts>;
      L first;
      for (std::size_t k = 0; k < kSideBySide * parts; ++k) {
        const std::uint64_t block = (first_group + g + k / parts) * kCounters + lane + k % parts;
        first.word[k] = WideWords::counting(block & 0xFFFFFFFFU);
      }
      const auto output =
          philox(first, L(std::uint64_t{tail.c1}), L(std::uint64_t{tail.c2}), L(std::uint64_t{tail.c3}), keys);
      for (std::size_t k = 0; k < kSideBySide; ++k) {
        const auto word = [&](std::size_t w) __attribute__((always_inline)) {
          WideWords halves[parts];
          for (std::size_t h = 0; h < parts; ++h) halves[h] = output.word[w].word[k * parts + h];
          return WideWords::merge(halves);
        };
        visit(g + k, lane, word(0), word(1), word(2), word(3));
      }
    }
  }
}

// Numbers that were made, as a step reads them (step.h).
struct Made {
  static constexpr std::size_t kCircle = 4 * kRandomGroup;
  const float* normals;           // null: none
  const std::uint32_t* rounding;  // in a circle, whose first vector stands behind its end once more; null: none
  std::size_t first;              // element 0's place there

  HD bool rounds() const { return rounding != nullptr; }
  HD bool has_noise() const { return normals != nullptr; }
  template <class V>
  HD typename V::Integers bits(std::size_t i) const {
    return V::Integers::load(rounding + (first + i) % kCircle);
  }
  template <class V, class Lanes>
  HD V noise(std::size_t i, Lanes lanes) const {
    return lanes.template load<Float32, V>(reinterpret_cast<const std::byte*>(normals + i));
  }
};

// The same where it is known that there are those that round, and no others.
struct MadeForRounding : Made {
  HD static constexpr bool rounds() { return true; }
  HD static constexpr bool has_noise() { return false; }
};

// Makes what rounds the elements of a part, half a circle ahead of them: its multiplications, each of which waits for
// the one before, take place while the processor divides and takes roots. (Adam, all bfloat16, arrays in a cache: 0.36
// ns for an element and not 0.52, with AVX2 0.92 and not 1.13; to nearest 0.29 and 0.62.)
class RandomNumbers {
 public:
  HD explicit RandomNumbers(const Part& part) : given_(part.random) {
    if (!rounds()) return;
    keys_ = PhiloxKeys(given_.rounding->seed);
    half_ = given_.first / kHalf;
    halves_ = (given_.first + part.count + kHalf - 1) / kHalf;
    until_ = kHalf - given_.first % kHalf;
    make();
    make();
  }

  HD bool rounds() const { return given_.rounding != nullptr; }
  HD Made made() const { return {given_.noise, rounds() ? numbers_ : nullptr, given_.first % Made::kCircle}; }

  // Makes those of the vector at element i, and returns where the first vector begins that has none.
  HD std::size_t prepare(std::size_t i) {
    if (i >= until_) {
      make();
      until_ += kHalf;
    }
    return until_;
  }

 private:
  static constexpr std::size_t kHalf = Made::kCircle / 2;
  static constexpr std::size_t kVector = 16;

  __attribute__((noinline)) void make() {
    if (half_ >= halves_) return;
    std::uint32_t* const numbers = numbers_ + half_ % 2 * kHalf;
    constexpr std::size_t groups = kHalf / kRandomGroup;
    for_each_counter<groups>(*given_.rounding, keys_, half_ * groups,
                             [=](std::size_t group, std::size_t lane, Integers a, Integers b, Integers c, Integers d)
                                 __attribute__((always_inline)) {
                                   const Integers words[] = {a, b, c, d};
                                   std::uint32_t* const to = numbers + group * kRandomGroup + lane;
                                   for (std::size_t w = 0; w < 4; ++w) {
                                     (words[w] & Integers(0xFFFFU)).store(to + 2 * w * kCounters);
                                     (words[w] >> 16).store(to + (2 * w + 1) * kCounters);
                                   }
                                 });
    if (half_ % 2 == 0) __builtin_memcpy(numbers_ + Made::kCircle, numbers_, kVector * sizeof *numbers_);
    ++half_;
  }

  Randomness given_;
  PhiloxKeys keys_;
  std::uint64_t half_ = 0;
  std::uint64_t halves_ = 0;
  std::size_t until_ = ~std::size_t{0};  // the end of the half that is in use, from the part's first element
  alignas(64) std::uint32_t numbers_[Made::kCircle + kVector];
};

// As for_each_vector, where steps may be rounded by chance.
template <class V, class Visit>
HD void for_each_vector(const void* param, std::size_t itemsize, std::size_t count, RandomNumbers& random,
                        Visit visit) {
  std::size_t i = head_of(param, count, itemsize, V::lanes * itemsize);
  if (i > 0) visit(std::size_t{0}, FirstLanes{i});
  const std::size_t end = end_of_whole<V>(count);
  while (i < end) {
    const std::size_t there = random.prepare(i);
    const std::size_t until = there < end ? there : end;
    for (; i < until; i += V::lanes) visit(i, AllLanes{});
  }
  if (i < count) {
    random.prepare(i);
    visit(i, FirstLanes{count - i});
  }
}

}  // namespace
}  // namespace onepass
