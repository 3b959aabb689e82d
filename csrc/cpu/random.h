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
struct WordsSideBySide {
  WideWords word[n];
  WordsSideBySide() = default;
  HD explicit WordsSideBySide(std::uint64_t x) {
    for (std::size_t k = 0; k < n; ++k) word[k] = WideWords(x);
  }
  HD friend WordsSideBySide operator^(WordsSideBySide a, WordsSideBySide b) {
    WordsSideBySide result;
    for (std::size_t k = 0; k < n; ++k) result.word[k] = a.word[k] ^ b.word[k];
    return result;
  }
  HD friend WordsSideBySide multiply(WordsSideBySide a, std::uint32_t x) {
    WordsSideBySide result;
    for (std::size_t k = 0; k < n; ++k) result.word[k] = multiply(a.word[k], x);
    return result;
  }
  HD friend WordsSideBySide upper(WordsSideBySide a) {
    WordsSideBySide result;
    for (std::size_t k = 0; k < n; ++k) result.word[k] = upper(a.word[k]);
    return result;
  }
};

// Groups that are made at once, where a vector has all lanes of one. With fewer lanes one group fills the registers.
constexpr std::size_t kSideBySide = Floats::lanes == kCounters ? 2 : 1;

// Calls visit(which group, first lane, the four words of Floats::lanes counters) until `groups` of them are complete.
// `first_group` is a multiple of `groups`, so that all have the same tail.
template <std::size_t groups, class Visit>
HD void for_each_counter(const RandomKey& key, const PhiloxKeys& keys, std::uint64_t first_group, Visit visit) {
  constexpr std::size_t parts = WideWords::parts;
  static_assert(groups % kSideBySide == 0 && (groups & (groups - 1)) == 0);
  const CounterTail tail = counter_tail(key, first_group * kCounters);
  for (std::size_t g = 0; g < groups; g += kSideBySide) {
    for (std::size_t lane = 0; lane < kCounters; lane += Floats::lanes) {
      using L = WordsSideBySide<kSideBySide * parts>;
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
  const std::uint32_t* rounding;  // in a circle, whose first vector stands behind its end once more
  std::size_t first;              // element 0's place there
  bool has_rounding;              // whether there are any

  HD bool rounds() const { return has_rounding; }
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
class RoundingNumbers {
 public:
  // `wanted`: none are made otherwise.
  HD explicit RoundingNumbers(const Part& part, bool wanted) : random_(part.random) {
    if (!wanted) random_.rounding = nullptr;
    if (random_.rounding == nullptr) return;
    keys_ = PhiloxKeys(random_.rounding->seed);
    end_ = random_.first + part.count;
    half_ = random_.first / kHalf;
    until_ = kHalf - static_cast<std::size_t>(random_.first % kHalf);
    make();
    make();
  }
  RoundingNumbers(const RoundingNumbers&) = delete;  // Made leads here
  RoundingNumbers& operator=(const RoundingNumbers&) = delete;
  ~RoundingNumbers() = default;

  HD Made made() const {
    return {random_.noise, numbers_, static_cast<std::size_t>(random_.first % Made::kCircle),
            random_.rounding != nullptr};
  }

  // To be called before the vector at element i. Where that begins the next half, makes the one after it in the place
  // of the one before. Returns where to ask again.
  HD std::size_t prepare(std::size_t i) {
    if (i >= until_) {
      make();
      until_ += kHalf;
    }
    return until_;
  }

 private:
  static constexpr std::size_t kHalf = Made::kCircle / 2;

  __attribute__((noinline)) void make() {
    constexpr std::size_t elements = kSideBySide * kRandomGroup;
    const std::uint64_t begin = half_ * kHalf;
    for (std::uint64_t k = begin; k < begin + kHalf && k < end_; k += elements) {
      if (k + elements <= random_.first) continue;
      std::uint32_t* const numbers = numbers_ + k % Made::kCircle;
      for_each_counter<kSideBySide>(*random_.rounding, keys_, k / kRandomGroup,
                                    [=](std::size_t group, std::size_t lane, Integers a, Integers b, Integers c,
                                        Integers d) __attribute__((always_inline)) {
                                      const Integers words[] = {a, b, c, d};
                                      std::uint32_t* const to = numbers + group * kRandomGroup + lane;
                                      for (std::size_t w = 0; w < 4; ++w) {
                                        (words[w] & Integers(0xFFFFU)).store(to + 2 * w * kCounters);
                                        (words[w] >> 16).store(to + (2 * w + 1) * kCounters);
                                      }
                                    });
      if (k % Made::kCircle != 0) continue;
      // NOLINTNEXTLINE(clang-analyzer-unix.cstring.UninitializedRead): they were just made
      __builtin_memcpy(numbers_ + Made::kCircle, numbers_, Floats::lanes * sizeof *numbers_);
    }
    ++half_;
  }

  alignas(64) std::uint32_t numbers_[Made::kCircle + Floats::lanes];
  Randomness random_;
  PhiloxKeys keys_;
  std::uint64_t end_ = 0;
  std::uint64_t half_ = 0;               // the next that is made
  std::size_t until_ = ~std::size_t{0};  // the end of the half that is in use, from the part's first element
};

// As for_each_vector, where steps may be rounded by chance.
template <class V, class Visit>
HD void for_each_vector(const void* param, std::size_t itemsize, std::size_t count, RoundingNumbers& numbers,
                        Visit visit) {
  std::size_t i = head_of(param, count, itemsize, V::lanes * itemsize);
  if (i > 0) visit(std::size_t{0}, FirstLanes{i});
  const std::size_t end = end_of_whole<V>(count);
  while (i < end) {
    const std::size_t there = numbers.prepare(i);
    const std::size_t until = there < end ? there : end;
    for (; i < until; i += V::lanes) visit(i, AllLanes{});
  }
  if (i < count) {
    numbers.prepare(i);
    visit(i, FirstLanes{count - i});
  }
}

}  // namespace
}  // namespace onepass
