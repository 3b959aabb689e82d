// Sizes of this machine's caches. They decide in which order memory is visited, never what is computed.
#pragma once

#include <cstddef>

namespace onepass {

struct CacheSizes {
  std::size_t level2;  // bytes of one core's
  std::size_t level3;  // bytes, shared by cores; level2 where there is none
};

CacheSizes cache_sizes();
void set_cache_sizes(
    CacheSizes sizes);  // {0, 0}: what the machine says. For tests, which want every way through a batch

}  // namespace onepass
