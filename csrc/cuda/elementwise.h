// The loop over the elements of a table's tensors, for whatever is done to them. Part of a CUDA unit.
#pragma once

#include "core/elements.h"
#include "core/normal.h"
#include "core/philox.h"
#include "cuda/launch.h"
#include "cuda/pack.h"
#include "cuda/partition.h"
#include "cuda/tables.h"
#include "simd/one_lane.h"

namespace onepass::cuda {
namespace {

struct NoRandom {
  HD bool rounds() const { return false; }
  HD bool has_noise() const { return false; }
  template <class V>
  HD typename V::Integers bits(std::size_t /*i*/) const {
    return {};
  }
  template <class V, class Lanes>
  HD V noise(std::size_t /*i*/, Lanes /*lanes*/) const {
    return V(0);
  }
};

// Those of one element.
struct OwnRandom {
  bool has_bits, has_normal;
  std::uint32_t bits_of_one;
  float normal;
  HD bool rounds() const { return has_bits; }
  HD bool has_noise() const { return has_normal; }
  template <class V>
  HD typename V::Integers bits(std::size_t /*i*/) const {
    return {{bits_of_one}};
  }
  template <class V, class Lanes>
  HD V noise(std::size_t /*i*/, Lanes /*lanes*/) const {
    return V(static_cast<typename V::Scalar>(normal));
  }
};

// The random words of a counter.
struct RandomWords {
  std::uint32_t word[4];
  HD RandomWords(const RandomKey& key, const PhiloxKeys& keys, std::uint64_t counter) {
    const CounterTail tail = counter_tail(key, counter);
    const auto output = philox(OneWord(counter & 0xFFFFFFFFU), OneWord(std::uint64_t{tail.c1}),
                               OneWord(std::uint64_t{tail.c2}), OneWord(std::uint64_t{tail.c3}), keys);
    ONEPASS_UNROLL
    for (unsigned w = 0; w < 4; ++w) word[w] = static_cast<std::uint32_t>(output.word[w].value);
  }
};

// Calls visit(element, random) for the elements of a lane of a group, as the CPU numbers them: 16 counters give a group
// its bits for rounding, and as many each of its halves its normal numbers.
template <class Visit>
HD void for_random_elements(const RandomKey& key, bool rounds, bool noisy, std::uint64_t group, unsigned lane,
                            std::uint64_t count, Visit visit) {
  constexpr unsigned in_half = kElementsOfLane / 2;
  const PhiloxKeys keys(key.seed);
  OwnRandom random{rounds, noisy, 0, 0.0F};
  RandomKey own = key;
  own.purpose = Purpose::rounding;
  std::uint32_t bits[4] = {};
  if (rounds) {
    const RandomWords words(own, keys, group * kGroupLanes + lane);
    ONEPASS_UNROLL
    for (unsigned w = 0; w < 4; ++w) bits[w] = words.word[w];
  }
  own.purpose = Purpose::noise;
  ONEPASS_UNROLL
  for (unsigned half = 0; half < 2; ++half) {
    float normals[in_half] = {};
    if (noisy) {
      const RandomWords words(own, keys, (group * 2 + half) * kGroupLanes + lane);
      using F = OneLane<float>;
      const auto one = normal_pair<F>(OneInteger(words.word[0]), OneInteger(words.word[1]));
      const auto two = normal_pair<F>(OneInteger(words.word[2]), OneInteger(words.word[3]));
      normals[0] = one.first.value;
      normals[1] = one.second.value;
      normals[2] = two.first.value;
      normals[3] = two.second.value;
    }
    ONEPASS_UNROLL
    for (unsigned k = 0; k < in_half; ++k) {
      const unsigned place = half * in_half + k;
      const std::uint64_t element = element_of(group, lane, place);
      if (element >= count) return;
      random.bits_of_one = place % 2 == 0 ? bits[place / 2] & 0xFFFFU : bits[place / 2] >> 16U;
      random.normal = normals[k];
      visit(element, random);
    }
  }
}

// Body: what is done, made from (table, entry), with
//   Scalar, lanes        of the vectors
//   needed               false: nothing is to be done
//   key, rounds, noisy   of random numbers
//   run<V>(element, random)
//   blocks               for which a multiprocessor shall have room; left to itself, the compiler spills registers so
//                        that there is room for one more
template <class Body, class TableType>
__global__ void __launch_bounds__(kThreads, Body::blocks) for_elements(const __grid_constant__ TableType table) {
  const std::uint32_t k =
      entry_of(blockIdx.x, table.tensors, [&](std::uint32_t e) { return table.entries[e].first_block; });
  const auto& entry = table.entries[k];
  const Body body(table, entry);
  if (!body.needed) return;
  const std::uint64_t block = blockIdx.x - entry.first_block;
  using One = Pack<typename Body::Scalar, 1>;
  if (entry.head != kInGroups) {
    for_vectors<Body::lanes>(
        entry.count, entry.head, block, threadIdx.x,
        [&](std::uint64_t i) { body.template run<Pack<typename Body::Scalar, Body::lanes>>(i, NoRandom{}); },
        [&](std::uint64_t i) { body.template run<One>(i, NoRandom{}); });
    return;
  }
  for_groups(entry.count, block, threadIdx.x, [&](std::uint64_t group, unsigned lane) {
    if constexpr (Body::has_random) {
      for_random_elements(body.key, body.rounds, body.noisy, table.first / kRandomGroup + group, lane,
                          table.first + entry.count, [&](std::uint64_t element, const OwnRandom& random) {
                            body.template run<One>(element - table.first, random);
                          });
    } else {
      for (unsigned place = 0; place < kElementsOfLane; ++place) {
        const std::uint64_t element = element_of(group, lane, place);
        if (element < entry.count) body.template run<One>(element, NoRandom{});
      }
    }
  });
}

// Pointers of an entry by the names of streams.
template <std::size_t streams>
HD Streams streams_of(const Entry<streams>& entry) {
  Streams result{};
  ONEPASS_UNROLL
  for (std::size_t stream = 0; stream < streams; ++stream) result.data[stream] = entry.data[stream];
  return result;
}

template <class S, std::size_t streams>
HD const Setting<S>& setting_of(const Table<S, streams>& table, const Entry<streams>& entry) {
  return table.on_device != nullptr ? table.on_device[entry.setting] : table.settings[entry.setting];
}

template <class S, std::size_t streams>
HD bool is_skipped(const Table<S, streams>& table) {
  return table.verdict != nullptr && table.verdict->skip != 0;
}

template <class S, std::size_t streams>
HD RandomKey key_of(const Table<S, streams>& table, const Entry<streams>& entry, std::uint64_t t) {
  return {table.seed, entry.index, t, Purpose::noise};
}

}  // namespace
}  // namespace onepass::cuda
