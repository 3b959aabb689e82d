// The backend: how a step becomes launches.
#pragma once

#include "cuda/backend.h"

namespace onepass::cuda {

const Backend& the_driver();

}  // namespace onepass::cuda
