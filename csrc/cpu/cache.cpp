#include "cpu/cache.h"

#include <algorithm>
#include <atomic>
#include <fstream>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace onepass {
namespace {

// Bytes of the cache of a level that the first CPU has a share in; 0 if the machine does not say. The C library is
// asked last: for a processor made of several dies it counts the caches of all of them.
std::size_t size_of_level(int level) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    int found = 0;
    std::string type;
    std::size_t kibibytes = 0;  // "1024K"
    if (!(std::ifstream(folder + "level") >> found) || found != level) continue;
    if (!(std::ifstream(folder + "type") >> type) || type == "Instruction") continue;
    if (std::ifstream(folder + "size") >> kibibytes) return kibibytes * 1024;
  }
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
  const long size = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return static_cast<std::size_t>(size);
#endif
  return 0;
}

CacheSizes find_sizes() {
  const std::size_t level2 = size_of_level(2);
  const std::size_t core = level2 > 0 ? level2 : std::size_t{512} << 10;  // what small cores have
  return {core, std::max(core, size_of_level(3))};
}

std::atomic<std::size_t> chosen_level2{0};
std::atomic<std::size_t> chosen_level3{0};

}  // namespace

CacheSizes cache_sizes() {
  static const CacheSizes found = find_sizes();
  const CacheSizes chosen{chosen_level2.load(std::memory_order_relaxed), chosen_level3.load(std::memory_order_relaxed)};
  return chosen.level2 == 0 ? found : chosen;
}

void set_cache_sizes(CacheSizes sizes) {
  chosen_level2.store(sizes.level2, std::memory_order_relaxed);
  chosen_level3.store(std::max(sizes.level2, sizes.level3), std::memory_order_relaxed);
}

}  // namespace onepass
