#pragma once

#include <initializer_list>

#include "core/kernel.h"

// Everything under rules/ and simd/ has internal linkage (an unnamed namespace): each kernel unit, compiled for its own
// instruction set, must export its table and not one symbol more.
namespace onepass {
namespace {

// Null names are left out, so that one template can name the slots of a whole family.
constexpr Names names(std::initializer_list<const char*> given) {
  Names result{};
  for (const char* name : given) {
    if (name != nullptr) result.data[result.count++] = name;
  }
  return result;
}

}  // namespace
}  // namespace onepass
