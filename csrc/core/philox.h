// Random numbers from a counter: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", 2011). What an element gets depends on the seed, the step, the parameter and its own place alone, so it is
// the same for every instruction set, number of threads and division of the work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/target.h"

namespace onepass {

// Elements whose numbers are made together: 16 counters of 128 bits are 128 times 16 bits, or 64 times 32.
inline constexpr std::size_t kRandomGroup = 128;

// Numbers for different purposes have nothing to do with each other.
enum class Purpose : std::uint32_t { noise = 0, rounding = 1 };

// What is rounded: a parameter, one that was scaled back after it was rounded, an average, slots. All that belongs to
// one element in one step makes its 16 bits from one number, times an odd factor of its own, modulo 2**16: each is
// uniform, and errors of different streams look independent. (A number for each stream takes 2.4 times the time of
// rounding to nearest where everything is bfloat16, this less than 1.3.)
enum Role : std::size_t { kParamRole, kScaledRole, kEmaRole, kFirstSlotRole };
HD constexpr std::uint32_t rounding_factor(std::size_t role) {
  constexpr std::uint32_t factors[] = {0x0001, 0x1657, 0x27D5, 0x9E37, 0x85EB, 0xC2B3};
  return factors[role];
}

struct RandomKey {
  std::uint64_t seed;
  std::uint32_t index;  // of the parameter
  std::uint64_t t;
  Purpose purpose;
};

// The words of the counter of block `block`, but for the first, which is block % 2**32.
struct CounterTail {
  std::uint32_t c1, c2, c3;
};
HD CounterTail counter_tail(const RandomKey& key, std::uint64_t block) {
  return {key.index, static_cast<std::uint32_t>(key.t),
          static_cast<std::uint32_t>((block >> 32U & 0xFFFU) << 20U | static_cast<std::uint32_t>(key.purpose) << 16U |
                                     (key.t >> 32U & 0xFFFFU))};
}

// `L`: a value type of 64-bit lanes of which the lower 32 count: L(x), a ^ b, multiply(a, x) of the lower halves,
// upper(a). Only the lower halves of the result mean something.
template <class L>
struct PhiloxOutput {
  L word[4];
};

// The keys of all rounds.
struct PhiloxKeys {
  std::uint64_t key[10][2];
  PhiloxKeys() = default;
  HD explicit PhiloxKeys(std::uint64_t seed) {
    auto k0 = static_cast<std::uint32_t>(seed);
    auto k1 = static_cast<std::uint32_t>(seed >> 32U);
    for (auto& round : key) {
      round[0] = k0;
      round[1] = k1;
      k0 += 0x9E3779B9U;
      k1 += 0xBB67AE85U;
    }
  }
};

template <class L>
HD PhiloxOutput<L> philox(L c0, L c1, L c2, L c3, const PhiloxKeys& keys) {
  ONEPASS_UNROLL
  for (const auto& round : keys.key) {
    const L a = multiply(c0, 0xD2511F53U);
    const L b = multiply(c2, 0xCD9E8D57U);
    c0 = upper(b) ^ c1 ^ L(round[0]);
    c1 = b;
    c2 = upper(a) ^ c3 ^ L(round[1]);
    c3 = a;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace onepass
