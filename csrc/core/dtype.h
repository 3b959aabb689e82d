// The storage dtypes. To add one: a struct, its `widen` and `narrow`, and one word in `DTypes`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/target.h"
#include "core/type_list.h"

namespace onepass {

enum class DType : std::uint8_t { float32, float64 };

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

// In the order of the enumeration: an id is also a position in this list.
using DTypes = TypeList<Float32, Float64>;

struct DTypeInfo {
  const char* name;
  std::size_t itemsize;
};

template <class List>
struct DTypeTable;

template <class... Ds>
struct DTypeTable<TypeList<Ds...>> {
  static constexpr DTypeInfo rows[] = {{Ds::name, sizeof(typename Ds::Storage)}...};
};

template <class... Ds>
constexpr bool ids_are_positions(TypeList<Ds...> /*list*/) {
  std::size_t position = 0;
  return ((static_cast<std::size_t>(Ds::id) == position++) && ...);
}
static_assert(ids_are_positions(DTypes{}));

constexpr const DTypeInfo& info(DType dtype) { return DTypeTable<DTypes>::rows[static_cast<std::size_t>(dtype)]; }

}  // namespace onepass
