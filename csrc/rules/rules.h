// The list of all rules. Kernel tables, tests, benchmarks and the Python registry read it; a rule that is not here does
// not exist, and one that is here is tested and measured by itself.
#pragma once

#include "core/type_list.h"
#include "rules/adam.h"
#include "rules/adasqrt.h"
#include "rules/momentum.h"
#include "rules/second_moment.h"
#include "rules/sgd.h"
#include "rules/traffic.h"

namespace onepass {
namespace {

using Rules = TypeList<Sgd, Momentum, SecondMoment<false, false>, SecondMoment<true, false>, SecondMoment<false, true>,
                       SecondMoment<true, true>, Adam, AmsGrad, AdaSqrt>;

using Yardsticks = TypeList<Traffic<0>, Traffic<1>, Traffic<2>, Traffic<3>>;

}  // namespace
}  // namespace onepass
