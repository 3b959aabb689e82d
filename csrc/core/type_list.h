// A list of types, and nothing else: rules.h and dtype.h are lists, everything else folds over them.
#pragma once

#include <cstddef>

namespace onepass {

template <class... Ts>
struct TypeList {
  static constexpr std::size_t size = sizeof...(Ts);
};

}  // namespace onepass
