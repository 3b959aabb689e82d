// How a kernel runs, for runtime.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace onepass_host {

struct Order {
  int blocks = onepass_host_forwards, threads = onepass_host_forwards;
  std::uint64_t seed = 0;
};

// A small generator: the order of a seed is the same everywhere.
class Shuffle {
 public:
  explicit Shuffle(std::uint64_t seed) : state_(seed) {}
  // Below `bound`.
  std::uint64_t operator()(std::uint64_t bound) {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return (z ^ (z >> 31)) % bound;
  }
  template <class Container>
  void apply(Container& values) {
    for (std::size_t n = values.size(); n > 1; --n) std::swap(values[n - 1], values[(*this)(n)]);
  }

 private:
  std::uint64_t state_;
};

// Runs all blocks of a launch on the calling thread, with subnormals flushed and rounding to nearest.
void run(const Launch& launch, const Work& work, Order order);

// Whether the calling thread is inside a kernel.
bool running();

}  // namespace onepass_host
