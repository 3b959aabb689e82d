// The storage dtypes. To add one: a struct, its `widen` and `narrow`, and one word in `DTypes`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/target.h"
#include "core/type_list.h"

namespace onepass {

enum class DType : std::uint8_t { float32, float64, bfloat16, float16, uint16 };

HD std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

HD float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline constexpr float kSmallestFloat = 0x1p-126F;  // that is not subnormal

// The nearest float that has an odd last bit, unless the value is a float itself: rounding that to a type of fewer bits
// gives what rounding the double would (Boldo and Melquiond, 2008). What is subnormal as a float becomes zero.
HD float round_to_odd(double value) {
  const double magnitude = __builtin_fabs(value);
  if (magnitude < static_cast<double>(kSmallestFloat)) return static_cast<float>(__builtin_copysign(0.0, value));
  const auto nearest = static_cast<float>(value);
  const double back = __builtin_fabs(static_cast<double>(nearest));
  if (!(back < magnitude) && !(back > magnitude)) return nearest;  // exact, or NaN
  return float_of((bits_of(nearest) - (back > magnitude ? 1U : 0U)) | 1U);
}

struct Float32 {
  using Storage = float;
  using Compute = float;
  static constexpr DType id = DType::float32;
  static constexpr const char* name = "float32";
  HD static Compute widen(Storage value) { return value; }
  HD static Storage narrow(Compute value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Compute = double;
  static constexpr DType id = DType::float64;
  static constexpr const char* name = "float64";
  HD static Compute widen(Storage value) { return value; }
  HD static Storage narrow(Compute value) { return value; }
};

// Types that are narrower than their compute type round on the way into memory: to nearest, ties to even, or by
// chance, with `random` in [0, 65536) added below the last bit that is kept. NaN stays NaN, overflow is infinite.

struct BFloat16 {
  using Storage = std::uint16_t;
  using Compute = float;
  static constexpr DType id = DType::bfloat16;
  static constexpr const char* name = "bfloat16";
  HD static Compute widen(Storage value) { return float_of(static_cast<std::uint32_t>(value) << 16U); }
  HD static Storage narrow(Compute value) { return narrow(value, 0x7FFFU + (bits_of(value) >> 16U & 1U)); }
  HD static Storage narrow(double value) { return narrow(round_to_odd(value)); }
  HD static Storage narrow(Compute value, std::uint32_t random) {
    const std::uint32_t bits = bits_of(value);
    const bool nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    return static_cast<Storage>(nan ? bits >> 16U | 0x40U : (bits + random) >> 16U);
  }
};

// Its subnormals are ordinary numbers of the compute type, and count.
struct Float16 {
  using Storage = std::uint16_t;
  using Compute = float;
  static constexpr DType id = DType::float16;
  static constexpr const char* name = "float16";
  HD static Compute widen(Storage value) {
    const std::uint32_t sign = (value & 0x8000U) << 16U;
    const std::uint32_t rest = value & 0x7FFFU;
    if (rest < 0x400U) return float_of(bits_of(static_cast<float>(rest) * 0x1p-24F) | sign);
    if (rest > 0x7C00U) return float_of(sign | 0x7FC00000U | rest << 13U);
    return float_of(sign | (rest == 0x7C00U ? 0x7F800000U : (rest << 13U) + 0x38000000U));
  }
  HD static Storage narrow(Compute value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = bits >> 16U & 0x8000U;
    const std::uint32_t rest = bits & 0x7FFFFFFFU;
    if (rest >= 0x38800000U) return finish(sign, rest, (rest + 0xFFFU + (rest >> 13U & 1U) - 0x38000000U) >> 13U);
    // The last bit of numbers from 0.5 to 1 is worth what the last bit of a subnormal is: 2**-24.
    return static_cast<Storage>(sign | (bits_of(float_of(rest) + 0.5F) - 0x3F000000U));
  }
  HD static Storage narrow(double value) { return narrow(round_to_odd(value)); }
  HD static Storage narrow(Compute value, std::uint32_t random) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = bits >> 16U & 0x8000U;
    const std::uint32_t rest = bits & 0x7FFFFFFFU;
    if (rest >= 0x7F800000U) return finish(sign, rest, 0x7C00U);
    const float magnitude = float_of(rest);
    std::uint32_t truncated = rest < 0x38800000U
                                  ? static_cast<std::uint32_t>(static_cast<std::int32_t>(magnitude * 0x1p24F))
                                  : (rest - 0x38000000U) >> 13U;
    if (truncated > 0x7BFFU) truncated = 0x7BFFU;
    const float below = widen(static_cast<Storage>(truncated));
    const float exponent = float_of(bits_of(below) & 0x7F800000U) * 0x1p-10F;
    const float unit = exponent > 0x1p-24F ? exponent : 0x1p-24F;
    const float threshold = unit * (static_cast<float>(static_cast<std::int32_t>(65536U - random)) * 0x1p-16F);
    return static_cast<Storage>(sign | (truncated + (magnitude - below >= threshold ? 1U : 0U)));
  }

 private:
  HD static Storage finish(std::uint32_t sign, std::uint32_t rest, std::uint32_t finite) {
    if (rest > 0x7F800000U) return static_cast<Storage>(sign | 0x7E00U | (rest >> 13U & 0x3FFU));
    return static_cast<Storage>(sign | (finite < 0x7C00U ? finite : 0x7C00U));
  }
};

// A float32 number in two halves: a bfloat16 parameter, and what is missing. The parameter is the number rounded to
// nearest with ties away from zero, because with ties to even the halves of two numbers would be the same. What was
// missing from an old number is left out where somebody has written a zero into the parameter, or an infinity that it
// would make NaN.
struct Split {
  std::uint16_t high;
  std::uint16_t low;
  HD static Split of(float value) {
    const std::uint32_t given = bits_of(value);
    const bool nan = (given & 0x7FFFFFFFU) > 0x7F800000U;
    const std::uint32_t bits = nan ? (given & 0x80000000U) | 0x7FC00000U : given;
    return {static_cast<std::uint16_t>((bits + 0x8000U) >> 16U), static_cast<std::uint16_t>(bits & 0xFFFFU)};
  }
  HD float value() const {
    const auto missing = static_cast<std::int32_t>(static_cast<std::int16_t>(low));
    const std::uint32_t magnitude = high & 0x7FFFU;
    const bool alone = magnitude == 0 || (magnitude == 0x7F80U && missing > 0);
    return float_of((static_cast<std::uint32_t>(high) << 16U) + (alone ? 0U : static_cast<std::uint32_t>(missing)));
  }
};

// In the order of the enumeration: an id is also a position in this list.
using DTypes = TypeList<Float32, Float64, BFloat16, Float16>;
using ComputeTypes = TypeList<Float32, Float64>;

struct DTypeInfo {
  const char* name;
  std::size_t itemsize;
  DType compute;
};

template <class List>
struct DTypeTable;

template <class... Ds>
struct DTypeTable<TypeList<Ds...>> {
  static constexpr DTypeInfo rows[] = {
      {Ds::name, sizeof(typename Ds::Storage),
       sizeof(typename Ds::Compute) == sizeof(float) ? DType::float32 : DType::float64}...};
};

template <class... Ds>
constexpr bool ids_are_positions(TypeList<Ds...> /*list*/) {
  std::size_t position = 0;
  return ((static_cast<std::size_t>(Ds::id) == position++) && ...);
}
static_assert(ids_are_positions(DTypes{}) && ids_are_positions(ComputeTypes{}));

// The low half of a split number is no storage dtype: nothing computes with it.
inline constexpr DTypeInfo kRemainderInfo = {"uint16", sizeof(std::uint16_t), DType::uint16};

constexpr const DTypeInfo& info(DType dtype) {
  return dtype == DType::uint16 ? kRemainderInfo : DTypeTable<DTypes>::rows[static_cast<std::size_t>(dtype)];
}

// In which types a parameter, its gradient and its states may be stored together.
template <class P, class G, class S>
struct Storage {
  using Param = P;
  using Grad = G;
  using State = S;
  using Compute = typename P::Compute;
};

using Storages = TypeList<
    Storage<Float32, Float32, Float32>, Storage<Float32, BFloat16, Float32>, Storage<Float32, Float16, Float32>,
    Storage<Float32, Float32, BFloat16>, Storage<BFloat16, BFloat16, Float32>, Storage<BFloat16, BFloat16, BFloat16>,
    Storage<BFloat16, Float32, Float32>, Storage<Float16, Float16, Float32>, Storage<Float64, Float64, Float64>>;

struct StorageInfo {
  DType param, grad, state;
};

template <class List>
struct StorageTable;

template <class... Ss>
struct StorageTable<TypeList<Ss...>> {
  static constexpr StorageInfo rows[] = {{Ss::Param::id, Ss::Grad::id, Ss::State::id}...};
};

inline constexpr const auto& kStorages = StorageTable<Storages>::rows;

// The position in `Storages`; Storages::size if they cannot be stored together.
constexpr std::size_t find_storage(DType param, DType grad, DType state) {
  for (std::size_t k = 0; k < Storages::size; ++k) {
    if (kStorages[k].param == param && kStorages[k].grad == grad && kStorages[k].state == state) return k;
  }
  return Storages::size;
}

}  // namespace onepass
