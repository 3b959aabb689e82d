#pragma once

#include "core/kernel.h"
#include "simd/one_lane.h"

namespace onepass {
namespace {

constexpr Isa kIsa = Isa::scalar;

template <class S>
using Wide = OneLane<S>;
using WideWords = OneWord;

}  // namespace
}  // namespace onepass
