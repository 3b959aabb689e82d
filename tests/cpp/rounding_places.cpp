// Updates that round by chance give the same bits on every instruction set and in any pieces, wherever in a tensor
// their elements lie: at every place within the groups of random numbers, and where places have more than 32 bits, or
// their counters do.
//
// Prints what is wrong, and how many comparisons were made.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/dtype.h"
#include "core/kernel.h"
#include "core/philox.h"
#include "cpu/dispatch.h"
#include "cpu/float_mode.h"

namespace {

using namespace onepass;

constexpr RandomKey kKey{12345, 6, 7, Purpose::rounding};
constexpr std::size_t kMost = 1300;
constexpr std::size_t kStreamsOfAdam = 4;

using Bits = std::vector<std::uint16_t>;

// Parameters, gradients and two moments, in bfloat16.
struct Arrays {
  Bits of[kStreamsOfAdam];

  explicit Arrays(std::size_t count) {
    std::uint32_t seed = 1;
    for (Bits& bits : of) {
      bits.resize(count);
      for (std::uint16_t& value : bits) {
        seed = seed * 1664525U + 1013904223U;
        value = BFloat16::narrow(0.5F + static_cast<float>(seed >> 8U) * 0x1p-24F);
      }
    }
  }
  bool operator==(const Arrays&) const = default;
};

// One step of elements that follow upon `first`, in pieces of `piece`; with a mirror, which nobody looks at, in the
// loop that has everything.
Arrays step(Isa isa, std::uint64_t first, std::size_t count, std::size_t piece, bool mirrored) {
  set_isa(isa);
  Arrays arrays(count);
  Bits mirror(count);
  const double coefficients[kMaxCoefficients] = {0.1, 0.5, 0.25, 0.01, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5};
  const Kernel& adam = *find_kernel(active_kernels(), "adam");
  const UpdateFn update = adam.whole[find_storage(DType::bfloat16, DType::bfloat16, DType::bfloat16)];
  const Around around;
  for (std::size_t begin = 0; begin < count; begin += piece) {
    Part part{};
    for (std::size_t k = 0; k < kStreamsOfAdam; ++k) {
      part.streams.data[k] = reinterpret_cast<std::byte*>(arrays.of[k].data() + begin);
    }
    if (mirrored) part.streams.data[kMirror] = reinterpret_cast<std::byte*>(mirror.data() + begin);
    part.count = std::min(piece, count - begin);
    part.coefficients = coefficients;
    part.around = &around;
    part.clip = 1.0;
    part.mirror = DType::bfloat16;
    part.random = {nullptr, &kKey, first + begin};
    const FloatMode mode;
    update(part);
  }
  return arrays;
}

}  // namespace

int main() {
  constexpr std::uint64_t counters_of_group = 16;
  constexpr std::uint64_t places_of_32_bits = std::uint64_t{1} << 32U;
  constexpr std::uint64_t counters_of_32_bits = places_of_32_bits / counters_of_group * kRandomGroup;
  std::vector<std::uint64_t> places = {0, 1, 127, 128, 250, 255, 256, 300, 384, 500, 511, 512, 1000, 1023, 100003};
  for (const std::uint64_t boundary : {places_of_32_bits, counters_of_32_bits, std::uint64_t{1} << 43U}) {
    for (const std::uint64_t before : {0, 5, 128, 256, 500}) places.push_back(boundary - before);
  }
  std::size_t compared = 0;
  std::size_t wrong = 0;
  for (const std::uint64_t first : places) {
    const Arrays untouched(kMost);
    const Arrays want = step(Isa::scalar, first, kMost, kMost, false);
    if (want.of[kParam] == untouched.of[kParam]) std::printf("nothing moved\n"), ++wrong;
    for (const Isa isa : available_isas()) {
      for (const bool mirrored : {false, true}) {
        for (const std::size_t piece :
             {kMost, std::size_t{1024}, std::size_t{257}, std::size_t{128}, std::size_t{17}}) {
          ++compared;
          if (step(isa, first, kMost, piece, mirrored) == want) continue;
          ++wrong;
          std::printf("%s, from place %llu in pieces of %zu%s: other bits\n", isa_name(isa),
                      static_cast<unsigned long long>(first), piece, mirrored ? ", with a mirror" : "");
        }
      }
    }
    for (const std::size_t count : {std::size_t{1}, std::size_t{15}, std::size_t{129}, std::size_t{513}}) {
      for (const Isa isa : available_isas()) {
        ++compared;
        if (step(isa, first, count, count, false) == step(Isa::scalar, first, count, 1, true)) continue;
        ++wrong;
        std::printf("%s, %zu elements from place %llu: other bits\n", isa_name(isa), count,
                    static_cast<unsigned long long>(first));
      }
    }
  }
  std::printf("%zu comparisons, %zu wrong\n", compared, wrong);
  return wrong == 0 ? 0 : 1;
}
