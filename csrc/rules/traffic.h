// The yardstick of every rule: the same streams, loaded and stored by the same loop, with arithmetic that costs
// nothing.
#pragma once

#include "core/target.h"
#include "rules/names.h"

namespace onepass {
namespace {

template <int slot_count>
struct Traffic {
  static constexpr const char* all_names[] = {"traffic0", "traffic1", "traffic2", "traffic3"};
  static constexpr const char* name = all_names[slot_count];
  static constexpr Names slots = names(
      {slot_count > 0 ? "slot0" : nullptr, slot_count > 1 ? "slot1" : nullptr, slot_count > 2 ? "slot2" : nullptr});
  static constexpr Names coefficients = names({"step"});
  template <class S>
  struct Coefs {
    S step;
  };
  template <class V, class C>
  HD static V step(V g, V* s, const C& c) {
    for (int k = 0; k < slot_count; ++k) s[k] = s[k] + g;
    return V(c.step) * g;
  }
};

}  // namespace
}  // namespace onepass
