// Several callers at once, with other numbers of threads and parts each time, and calls from within a body: every part
// runs once and only once. `make sanitize` builds this with ThreadSanitizer.
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

constexpr std::size_t kStride = 16;  // a cache line for each part's counter

struct Round {
  std::vector<int> calls;
  std::atomic<int> nested{0};
};

void count_call(void* context, std::size_t part) {
  auto& round = *static_cast<Round*>(context);
  ++round.calls[part * kStride];
  if (part % 5 == 0) {
    onepass::parallel_for(
        4, 3, [](void* inner, std::size_t) { static_cast<Round*>(inner)->nested.fetch_add(1); }, context);
  }
}

}  // namespace

int main() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&wrong, caller] {
      for (std::size_t k = 0; k < 3000; ++k) {
        const std::size_t parts = 1 + (k * 7 + caller) % 23;
        Round round{std::vector<int>(parts * kStride), {}};
        onepass::parallel_for(1 + (k + caller) % 6, parts, count_call, &round);
        for (std::size_t part = 0; part < parts; ++part) wrong += round.calls[part * kStride] != 1;
        wrong += round.nested != static_cast<int>(3 * ((parts + 4) / 5));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("parallel_for: %d wrong\n", wrong.load());
  return wrong == 0 ? 0 : 1;
}
